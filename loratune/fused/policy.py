"""Levels and plans: the activations that each decoder layer saves for its backward, on the device or on the host.

A saved activation takes memory until the backward. A dropped one is computed again. In a Llama layer the candidates,
with T tokens, width d, MLP width m, and query and key-value widths q and k, are (bytes per token in half precision;
multiply-adds per token to compute the activation again):

    input        2 d            cannot be recomputed: every level saves it, on the device or on the host
    heads        2 (q + 2 k)    d (q + 2 k)
    attended     2 q            attention's forward, and the heads
    stream       2 d            q d
    gate_up      4 m            2 d m

All but attention cost d multiply-adds for two bytes, so the order in which they are dropped does not matter. The
largest is dropped first, which is simplest. A plan between two levels gives the first layers the frugal level and the
other layers the generous one.

    none         saves everything
    wide         drops gate_up, so the MLP can run in tiles of tokens and gate_up is never whole
    hosted       as wide; saved activations go to host memory, copied while the neighbours compute
    selective    drops gate_up and heads
    staged       as selective, in host memory
    full         saves the input alone; the layer runs again, except for the down projection
    offload      as full; the input goes to host memory

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174; the selection follows
Korthikanti et al. 2022, arXiv:2205.05198. This module imports no torch, since the command line reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """Amount of activations that one layer saves on the device, in descending order."""

    NONE = 0
    WIDE = 1
    HOSTED = 2
    SELECTIVE = 3
    STAGED = 4
    FULL = 5
    OFFLOAD = 6

    @property
    def keeps_gate_up(self) -> bool:
        """True if the output of gate and up, (T, 2 m), is saved."""
        return self < Level.WIDE

    @property
    def keeps_heads(self) -> bool:
        """True if query, key and value, (T, q + 2 k), are saved."""
        return self < Level.SELECTIVE

    @property
    def keeps_attended(self) -> bool:
        """True if attention's output and logsumexp are saved, and the residual stream behind attention."""
        return self < Level.FULL

    @property
    def on_host(self) -> bool:
        """True if saved activations go to host memory."""
        return self in (Level.HOSTED, Level.STAGED, Level.OFFLOAD)


TILE = 8192
"""Default size of an MLP tile, in tokens: enough to fill the widest product of a GPU."""


@dataclass(frozen=True)
class ActivationPlan:
    """The level of each layer, and other memory settings of a run: tensors on the host, weights held twice."""

    levels: tuple[Level, ...]
    tile: int = TILE
    """Tokens that pass through the MLP at once, in layers that do not save gate and up."""
    embeddings_on_host: bool = False
    """The table of input embeddings is in host memory, unless the head shares it. A row reads its own entries."""
    optimizer_on_host: bool = False
    """The adapters' masters and moments are in host memory, read and written once per step."""
    hold_transposed: bool = False
    """Weights with adapters are held transposed as well, in precisions whose backward needs the transposed weight."""

    @classmethod
    def uniform(cls, level: Level, layers: int, tile: int = TILE) -> ActivationPlan:
        """One level for all layers."""
        return cls((level,) * layers, tile)

    @classmethod
    def spread(
        cls, level: Level, count: int, among: Level, first: int, other: Level, layers: int, tile: int
    ) -> ActivationPlan:
        """As `mixed(among, first, other, …)`, but `count` of the first layers, evenly spaced, have `level`."""
        at = {round((index + 0.5) * first / count) for index in range(count)} if count else set()
        return cls(tuple(level if i in at else among if i < first else other for i in range(layers)), tile)

    @classmethod
    def mixed(cls, frugal: Level, first: int, other: Level, layers: int, tile: int = TILE) -> ActivationPlan:
        """`frugal` for the first `first` layers, `other` for the rest."""
        return cls((frugal,) * first + (other,) * (layers - first), tile)

    @classmethod
    def smallest(cls, layers: int) -> ActivationPlan:
        """The plan that takes the least memory."""
        return cls((Level.OFFLOAD,) * layers, 1024, embeddings_on_host=True, optimizer_on_host=True)

    def __str__(self) -> str:
        runs: list[tuple[Level, int]] = []
        for level in self.levels:
            if runs and runs[-1][0] == level:
                runs[-1] = level, runs[-1][1] + 1
            else:
                runs.append((level, 1))
        if len(runs) > 4:
            runs = [(level, self.levels.count(level)) for level in sorted(set(self.levels), reverse=True)]
        words = [f"{level.name.lower()} x {count}" for level, count in runs]
        extras = {
            "embeddings on the host": self.embeddings_on_host,
            "optimizer on the host": self.optimizer_on_host,
            "weights kept both ways": self.hold_transposed,
        }
        return ", ".join(words + [word for word, chosen in extras.items() if chosen])


def tiles(tokens: int, tile: int) -> Sequence[slice]:
    """Cuts a row into tiles of at most `tile` tokens and nearly equal size, in multiples of 64 tokens."""
    count = -(-tokens // max(1, tile))
    step = max(1, -(-tokens // count))
    step = -(-step // 64) * 64 if count > 1 else step
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
