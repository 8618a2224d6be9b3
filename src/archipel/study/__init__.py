"""The study: arms, controls and seeds of one question, trained, sampled and held against real clips in one table."""
