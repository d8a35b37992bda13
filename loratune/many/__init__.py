"""Many adapters that train together over one base."""
