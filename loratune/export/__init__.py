"""What leaves the house: merged checkpoints."""
