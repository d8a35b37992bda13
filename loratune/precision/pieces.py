"""Pieces of a quantised weight, so that only one piece of it is dense at a time. No torch is imported."""

from __future__ import annotations

PIECE_ELEMENTS = 1 << 25
"""A piece may always have this many elements: 64 MiB in bfloat16."""

PIECE_STEP = 256
"""Rows or columns of a piece are a multiple of this, so that its product fills whole tiles of a GPU's product."""


def pieces(length: int, other: int, tokens: int, step: int = PIECE_STEP) -> list[slice]:
    """Cuts `length` rows (or columns) of `other` elements each into pieces of nearly equal size.

    A piece may be as large as the larger operand of its product, which exists anyway. Fewer, larger products are
    faster: by 1 % of a step if whole weights may be dense.

    Args:
        tokens: rows of the other operand.
    """
    at_once = max(PIECE_ELEMENTS, tokens * max(length, other))
    count = -(-length * other // at_once)
    size = -(-length // (count * step)) * step
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def piece_elements(length: int, other: int, ranks: int, tokens: int) -> int:
    """Elements of the largest piece, with the adapter columns of `ranks` beside it."""
    return int(pieces(length, other, tokens)[0].stop) * (other + ranks)
