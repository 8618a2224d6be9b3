"""Faults really made against stores and islands, and the servers they are made against: a folder of the clone."""
