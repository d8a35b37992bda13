"""The heart: adapters as swapped module instances, from selection to file."""
