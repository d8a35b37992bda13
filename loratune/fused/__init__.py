"""Decoder layers that run as one autograd node."""
