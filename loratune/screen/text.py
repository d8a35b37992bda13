"""Text for a terminal: model output without control characters, and curves in one line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "._-=+*#@"
# Control characters could move the cursor or set colours. Those below 32 become their pictures, the others U+FFFD.
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(range(127, 160), 0xFFFD)
# Characters that reverse the order of others become U+FFFD too (Trojan Source, CVE-2021-42574). So do halves of
# surrogate pairs, which mean bytes of file names that are not UTF-8 and cannot be printed.
_VISIBLE |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)), 0xFFFD)


def visible(text: str) -> str:
    """The text with visible symbols for control characters, except line ends and tabs."""
    return text.translate(_VISIBLE)


def curve(values: Sequence[float], width: int, *, top: float | None = None, ascii_only: bool = False) -> str:
    """A curve of `values` in at most `width` characters. Each character shows the mean of consecutive values.

    Args:
        top: value of the highest block, with 0 as the lowest. None: the range of the values.
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
