"""From settings to a finished output folder."""
