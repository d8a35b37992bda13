"""Checkpoints for other programs: merged and quantised."""
