"""What leaves the house: merged and quantised checkpoints."""
