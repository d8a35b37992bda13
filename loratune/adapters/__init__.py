"""Adapters made from other adapters and from checkpoints; works on files only."""
