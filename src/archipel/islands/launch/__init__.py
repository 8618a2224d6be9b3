"""Launchers: each decides only where the same command, ``archipel train RUN NAME``, runs."""
