"""Text for a terminal: a model's words without its control characters, and curves in one line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "._-=+*#@"
# Characters that would move the cursor or set colours: those below 32 as their pictures, the others as one sign.
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(range(127, 160), 0xFFFD)


def visible(text: str) -> str:
    """The text with control characters (but line ends and tabs) as signs: a model's output gives no orders."""
    return text.translate(_VISIBLE)


def curve(values: Sequence[float], width: int, *, top: float | None = None, ascii_only: bool = False) -> str:
    """The course of `values` in at most `width` characters, each the mean of its share.

    Without `top` the lowest value is the lowest block and the highest the highest; with it, blocks go from 0 to it.
    """
    if not values:
        return ""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    width = min(width, len(finite))
    edges = [round(i * len(finite) / width) for i in range(width + 1)]
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = (min(means), max(means)) if top is None else (0.0, top)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)
