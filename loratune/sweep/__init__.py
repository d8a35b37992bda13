"""From a jobs file to a ranking."""
