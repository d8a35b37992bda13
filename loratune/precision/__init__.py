"""Frozen weights in every precision: dense, 4-bit NF4 and 8-bit FP8."""
