"""Runs: from settings to a finished output folder."""
