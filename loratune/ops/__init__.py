"""Pure functions of tensors: each a PyTorch reference that runs anywhere and is the oracle of its faster twins."""
