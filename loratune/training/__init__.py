"""Training: objectives, the optimizer step, the loop, checkpoints, and whole runs."""
