"""Displays with rich. Functions here take finished values and a console, and make no decisions."""
