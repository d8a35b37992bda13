"""Adapters on a model: selecting layers, replacing them, switching, merging, saving and loading."""
