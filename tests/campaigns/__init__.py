"""Campaigns: many inputs against one property; a small sample in `make test`, the whole by one command each."""
