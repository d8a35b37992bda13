"""Pure functions of tensors: PyTorch references, which run anywhere and define the results, and their faster
twins."""
