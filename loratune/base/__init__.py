"""The frozen model: loading it, and running one packed row through it."""
