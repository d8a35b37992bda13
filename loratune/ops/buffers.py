"""Device memory that kernel launches of one forward share and reuse.

Two kinds of buffer outlive a launch:

    counters   (264,) int32 zeros. Thread blocks that share a split reduction count themselves here; the last block
               sets its counter back to zero. Launches on one stream follow one another, so they can share the
               counters. Two streams cannot, so each forward has its own instance.
    tables     constant descriptions of a launch, copied to the device once, such as the tiles of `ops.low_rank`.

The buffers are freed with their owner.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

COUNTERS = 264
"""Counters of one device: twice the multiprocessors of an H200. No launch splits reductions among more blocks."""


class KernelBuffers:
    """Counters and tables by device, made when first used. For launches on one stream at a time."""

    def __init__(self) -> None:
        self._counters: dict[torch.device, Tensor] = {}
        self._tables: dict[Hashable, tuple[Tensor, ...]] = {}

    def counters(self, device: torch.device) -> Tensor:
        """(COUNTERS,) int32; every launch leaves them zero."""
        if device not in self._counters:
            self._counters[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        return self._counters[device]

    def table(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The result of `make`, called once for each key. The key determines the tensors and their device."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]
