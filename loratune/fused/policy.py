"""What a layer keeps from its forward for its backward, as one setting.

Whatever is kept costs memory until the backward, whatever is not is computed again. In a Llama layer the candidates,
with T tokens, width d, MLP width m and query and key-value widths q and k (bytes a token in half precision; the
products that have to run again if it is dropped, in multiply-adds a token):

    input        2 d            cannot be recomputed: every policy keeps it, on the device or on the host
    heads        2 (q + 2 k)    d (q + 2 k)
    attended     2 q            attention's forward, and the heads
    stream       2 d            q d
    gate_up      4 m            2 d m

All but attention cost d multiply-adds for each pair of bytes, so no choice among them is better than another by its
own price, and the order is that of convenience: what is widest goes first. The frontier between two policies is
filled by layers: the first n layers run under the frugal one, the others under the other.

    none         everything is kept
    wide         gate_up is dropped, and with it the need to hold it whole: the MLP runs in tiles of tokens
    hosted       as wide, and all that is kept waits on the host, copied while the neighbours compute
    selective    gate_up and heads are dropped
    staged       as selective, on the host
    full         only the input is kept; the layer runs again but for the down projection
    offload      as full, and the input waits on the host

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174; the selection follows
Korthikanti et al. 2022, arXiv:2205.05198. This module imports no torch: the estimate reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How much one layer keeps, from all to nothing on the device."""

    NONE = 0
    WIDE = 1
    HOSTED = 2
    SELECTIVE = 3
    STAGED = 4
    FULL = 5
    OFFLOAD = 6

    @property
    def keeps_gate_up(self) -> bool:
        """Gate and up, (T, 2 m)."""
        return self < Level.WIDE

    @property
    def keeps_heads(self) -> bool:
        """Query, key and value, (T, q + 2 k)."""
        return self < Level.SELECTIVE

    @property
    def keeps_attended(self) -> bool:
        """Attention's output with its logsumexp, and its sum with the residual stream."""
        return self < Level.FULL

    @property
    def on_host(self) -> bool:
        """What is kept waits on the host."""
        return self in (Level.HOSTED, Level.STAGED, Level.OFFLOAD)


TILE = 8192
"""Tokens of one tile of the MLP, where a plan does not say otherwise: enough to fill the widest product."""


@dataclass(frozen=True)
class ActivationPlan:
    """One level for each layer, and the tiles of the MLP in layers that do not keep gate and up."""

    levels: tuple[Level, ...]
    tile: int = TILE
    """Tokens; at most this many run through the MLP at once."""
    embeddings_on_host: bool = False
    """The table of input embeddings lies in host memory, of which a row's own are read; not if the head shares it."""
    optimizer_on_host: bool = False
    """Masters and moments of the adapters lie in host memory, read and written once a step."""
    both_ways: bool = False
    """Weights in 8 bits that carry adapters are kept transposed as well, so that the backward need not turn them."""

    @classmethod
    def uniform(cls, level: Level, layers: int, tile: int = TILE) -> ActivationPlan:
        """The same level for all layers."""
        return cls((level,) * layers, tile)

    @classmethod
    def spread(
        cls, level: Level, count: int, among: Level, first: int, other: Level, layers: int, tile: int
    ) -> ActivationPlan:
        """As `mixed`, with `count` of the frugal layers, evenly spread among them, at another level."""
        at = {round((index + 0.5) * first / count) for index in range(count)} if count else set()
        return cls(tuple(level if i in at else among if i < first else other for i in range(layers)), tile)

    @classmethod
    def mixed(cls, frugal: Level, first: int, other: Level, layers: int, tile: int = TILE) -> ActivationPlan:
        """`frugal` for the first so many layers, `other` for the rest."""
        return cls((frugal,) * first + (other,) * (layers - first), tile)

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
        said = {
            "embeddings on the host": self.embeddings_on_host,
            "optimizer on the host": self.optimizer_on_host,
            "weights kept both ways": self.both_ways,
        }
        return ", ".join(words + [word for word, so in said.items() if so])


def tiles(tokens: int, tile: int) -> Sequence[slice]:
    """A row of tokens in tiles of at most `tile`, as equal as can be (in multiples of 64)."""
    count = -(-tokens // max(1, tile))
    step = max(1, -(-tokens // count))
    step = -(-step // 64) * 64 if count > 1 else step
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
