"""Sweeps: from a jobs file to a ranking."""
