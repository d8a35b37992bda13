"""Several adapters in one packed row: products and updates."""
