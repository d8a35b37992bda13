"""Bytes that one fused decoder layer holds and needs, by level: `fused.block` told as a ledger of its tensors.

An estimate that leaves out what is short-lived is wrong by gigabytes, since the widest tensors of a layer live for
one product. So this module walks through forward and backward of `fused.block` in their order, writes down each
tensor
when it is made and strikes it when it is let go of, rounded as PyTorch's allocator rounds, and reads off the highest
sum. It must be changed with `fused.block`; the tests of the estimate measure whether it has been.

No torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loratune.fused.policy import Level, tiles
from loratune.precision.pieces import piece_elements

ROUND = 512
"""PyTorch's allocator hands out multiples of this."""

TILE_OF_RANKS = 64
"""Ranks of a projection are padded to a multiple of this in a border (`precision.border`)."""

_LINE = 128
"""Columns of a border in 8 bits are a multiple of this, three for each rank (`precision.fp8`)."""

_WIDEST_BORDER = 8
"""Such a border is at most this part of a weight's smaller side."""

MEASURE_ROOM = 64
"""Columns behind a row for its measure (`ops.measure`), which takes `MEASURE` bytes where a row has no room."""
MEASURE = 128

_PADDING = 128
"""Tokens that FlashAttention's backward adds to each document."""

_QKV, _OUTPUT, _GATE_UP, _DOWN = range(4)


def rounded(size: float) -> int:
    """Bytes as they are allocated."""
    return -(-int(size) // ROUND) * ROUND


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer of Llama's kind, as far as its memory goes."""

    width: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    mlp: int
    head_norm: bool
    ranks: tuple[int, int, int, int]
    """Ranks of all adapters of query, key and value together; of output; of gate and up; of down."""
    element_bytes: int = 2
    bordered: bool = True
    """Whether weights lie in memory with a border for the adapters (`projection`), padded to whole tiles."""
    carried: bool = True
    """Whether operands have room for the inner columns: with a border, in memory or for the length of a product."""
    in_4_bits: bool = False
    """Whether weights are made dense in pieces, each for its product (`precision.nf4`)."""
    in_8_bits: bool = False
    """Whether products run in 8 bits (`precision.fp8`)."""
    both_ways: bool = False
    """Whether weights in 8 bits that carry adapters are kept transposed as well."""

    def room(self, projection: int) -> int:
        """Columns by which the operands of the nth projection are wider than it."""
        if self.in_8_bits:
            return MEASURE_ROOM if self.border(projection) else 0
        if not self.carried:
            return 0
        return (
            -(-self.ranks[projection] // TILE_OF_RANKS) * TILE_OF_RANKS if self.bordered else self.ranks[projection]
        )

    def sides(self, projection: int) -> tuple[int, int]:
        """(d_in, d_out) of the nth projection."""
        return (
            (self.width, self.query, self.width, self.mlp)[projection],
            (self.heads, self.width, 2 * self.mlp, self.width)[projection],
        )

    def border(self, projection: int) -> int:
        """Bytes behind a row in 8 bits for the adapters that ride in the nth product; 0 if they do not."""
        border = -(-3 * self.ranks[projection] // _LINE) * _LINE
        pays = self.in_8_bits and border * _WIDEST_BORDER <= min(self.sides(projection))
        return border if pays else 0

    @property
    def bytes_both_ways(self) -> int:
        """What it takes to keep the weights that carry adapters transposed as well."""
        return sum(self.turned_bytes(nth) for nth in range(4) if self.border(nth))

    def turned_bytes(self, projection: int) -> int:
        """The nth weight transposed, with its border."""
        d_in, d_out = self.sides(projection)
        return rounded(d_in * (d_out + self.border(projection)))

    def inner(self, projection: int) -> int:
        """Columns of the nth projection's inner activation."""
        return self.ranks[projection]

    def gradient_bytes(self, projection: int) -> int:
        """Of the adapters of the nth projection, in float32; its members are taken to share the ranks evenly."""
        members, d_in, d_out = (
            (3, self.width, self.heads),
            (1, self.query, self.width),
            (2, self.width, 2 * self.mlp),
            (1, self.mlp, self.width),
        )[projection]
        return 4 * self.ranks[projection] * (d_in + -(-d_out // members))

    @property
    def adapter_bytes(self) -> int:
        """The working copies of all adapters of the layer: in the borders, stacked beside the weights, or both."""
        e, total = self.element_bytes, 0
        for nth in range(4):
            (d_in, d_out), room, rank = self.sides(nth), self.room(nth), self.ranks[nth]
            whole = rounded((d_out + room) * (d_in + room) * e) - d_out * d_in * e if self.bordered else 0
            total += whole if self.bordered else rounded(rank * d_in * e) + rounded(rank * d_out * e)
            if border := self.border(nth):
                total += rounded(d_out * border) + ROUND + rounded(4 * d_in) + rounded(2 * d_out)  # and scales
        return total

    @property
    def query(self) -> int:
        """Columns of all queries."""
        return self.query_heads * self.head_dim

    @property
    def heads(self) -> int:
        """Columns of queries, keys and values."""
        return (self.query_heads + 2 * self.key_value_heads) * self.head_dim


@dataclass(frozen=True)
class Footprint:
    """Bytes of one layer."""

    kept: int
    """From its forward to its backward, the input counted in, the output not."""
    forward: int
    """Most at a time while it runs forward, beside its input and all that layers below keep."""
    away: int
    """Of the tensors that wait on the host in between."""
    backward: int
    """Most at a time while it runs backward, with what it keeps, the gradient it is given and that it makes."""


@dataclass
class Ledger:
    """What is alive, by name."""

    sizes: dict[str, int] = field(default_factory=dict)
    peak: int = 0

    def take(self, **sizes: float) -> None:
        """Tensors of so many bytes are made."""
        self.sizes.update({name: rounded(size) for name, size in sizes.items()})
        self.peak = max(self.peak, sum(self.sizes.values()))

    def free(self, *names: str) -> None:
        """These are let go of; a name that is not alive is passed over."""
        for name in names:
            self.sizes.pop(name, None)

    def brief(self, **sizes: float) -> None:
        """Tensors that are made and let go of."""
        self.take(**sizes)
        self.free(*sizes)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a layer's tensors on `tokens` tokens."""

    shape: LayerShape
    tokens: int
    documents: int

    def columns(self, count: int, tokens: int | None = None) -> int:
        """(tokens, count) in the compute dtype."""
        return (self.tokens if tokens is None else tokens) * count * self.shape.element_bytes

    @property
    def stream(self) -> int:
        """(T, d)."""
        return self.columns(self.shape.width)

    def operand(self, projection: int) -> int:
        """(T, d) and the room beside it that the nth projection wants."""
        return self.columns(self.shape.width + self.shape.room(projection))

    def inner(self, projection: int, tokens: int | None = None) -> int:
        """The inner activation of the nth projection."""
        return self.columns(self.shape.inner(projection), tokens)

    @property
    def heads(self) -> int:
        """Stacked query, key and value."""
        return self.columns(self.shape.heads)

    @property
    def query(self) -> int:
        """Attention's output, or the queries."""
        return self.columns(self.shape.query)

    @property
    def logsumexp(self) -> int:
        """(T, query heads) float32."""
        return self.tokens * self.shape.query_heads * 4


def footprint(shape: LayerShape, tokens: int, level: Level, tile: int, documents: int = 0) -> Footprint:
    """What one layer takes on a row of `tokens` tokens.

    Args:
        tile: as in `fused.policy.ActivationPlan`.
        documents: how many of different lengths a row may hold; 0 if all are of one length.
    """
    sizes, ledger = _Sizes(shape, tokens, documents), Ledger()
    _forward(ledger, sizes, level, tile)
    forward = ledger.peak
    ledger.free("out")
    ledger.take(x=sizes.stream)
    if level.on_host and shape.head_norm:
        ledger.free("heads")  # turned again from what is kept
    waiting = ("x", "attended", "stream", "heads", "unturned") if level.on_host else ()
    away = {name: ledger.sizes[name] for name in waiting if name in ledger.sizes}
    ledger.free(*away)
    kept = sum(ledger.sizes.values())
    ledger.peak = 0
    ledger.take(**away)
    if "unturned" in away:
        ledger.take(heads=sizes.heads)
    _backward(ledger, sizes, level, tile)
    return Footprint(kept, forward, sum(away.values()), ledger.peak)


def _product(
    ledger: Ledger, sizes: _Sizes, projection: int, tokens: int | None = None, *, backward: bool = False
) -> None:
    """What lives for the nth product alone: a piece of W dense, or what goes into a product in 8 bits."""
    shape, tokens = sizes.shape, sizes.tokens if tokens is None else tokens
    if shape.in_4_bits:
        d_in, d_out = shape.sides(projection)
        length, other = (d_in, d_out) if backward else (d_out, d_in)
        ledger.brief(dense=piece_elements(length, other, shape.room(projection), tokens) * shape.element_bytes)
    if shape.in_8_bits:
        border = shape.border(projection)
        terms = shape.sides(projection)[backward] + border
        turned = shape.turned_bytes(projection) if backward and not (shape.both_ways and border) else 0
        measure = 0 if backward or projection != _OUTPUT else tokens * MEASURE
        ledger.brief(rows=tokens * terms, scale=4 * tokens, turned=turned, measure=measure)


def _heads(ledger: Ledger, sizes: _Sizes) -> None:
    """`block._turned`."""
    shape = sizes.shape
    ledger.take(normed=sizes.operand(_QKV), unturned=sizes.heads, inner_qkv=sizes.inner(_QKV))
    _product(ledger, sizes, _QKV)
    ledger.free("normed")
    if shape.head_norm:
        ledger.take(heads=sizes.heads)
    else:  # turned in place
        ledger.sizes["heads"] = ledger.sizes.pop("unturned")


def _attend(ledger: Ledger, sizes: _Sizes) -> None:
    ledger.take(attended=sizes.query, logsumexp=sizes.logsumexp)


def _output(ledger: Ledger, sizes: _Sizes) -> None:
    """The output projection; attention's output has no room, so it is copied to where there is some."""
    room = 0 if sizes.shape.in_8_bits else sizes.shape.room(_OUTPUT)
    ledger.take(inner_output=sizes.inner(_OUTPUT), roomy=sizes.columns(sizes.shape.query + room) if room else 0)
    ledger.take(y=sizes.stream)
    _product(ledger, sizes, _OUTPUT)
    ledger.free("roomy")


def _forward(ledger: Ledger, sizes: _Sizes, level: Level, tile: int) -> None:
    shape, tokens = sizes.shape, sizes.tokens
    _heads(ledger, sizes)
    _attend(ledger, sizes)
    if not level.keeps_heads:
        ledger.free("heads", "unturned", "inner_qkv")
    _output(ledger, sizes)
    ledger.take(stream=sizes.stream, normed=sizes.operand(_GATE_UP))
    ledger.free("y")
    if not level.keeps_attended:
        ledger.free("heads", "unturned", "inner_qkv", "attended", "logsumexp", "inner_output")
    parts = tiles(tokens, tokens if level.keeps_gate_up else tile)
    for part in parts:
        count = part.stop - part.start
        ledger.take(gate_up=sizes.columns(2 * shape.mlp, count), inner_gate_up=sizes.inner(_GATE_UP, count))
        _product(ledger, sizes, _GATE_UP, count)
        if part is parts[-1]:
            ledger.free("normed")
        ledger.take(active=sizes.columns(shape.mlp + shape.room(_DOWN), count))
        ledger.take(**{f"out{part.start}": sizes.columns(shape.width, count)})
        ledger.take(**{f"inner_down{part.start}": sizes.inner(_DOWN, count)})
        _product(ledger, sizes, _DOWN, count)
        ledger.free("active")
        if not level.keeps_gate_up:
            ledger.free("gate_up", "inner_gate_up")
    if len(parts) == 1:  # the sum, and its norm for the layer above
        ledger.take(out=sizes.stream, ahead=sizes.operand(_QKV))
    else:
        ledger.take(out=sizes.stream)
    ledger.free(*(f"out{part.start}" for part in parts), "ahead", *([] if level.keeps_attended else ["stream"]))


def _backward(ledger: Ledger, sizes: _Sizes, level: Level, tile: int) -> None:
    shape, tokens = sizes.shape, sizes.tokens
    ledger.take(dy=sizes.operand(_DOWN), x=sizes.stream)
    if not level.keeps_attended:
        _heads(ledger, sizes)
        _attend(ledger, sizes)
        _output(ledger, sizes)
        ledger.take(stream=sizes.stream, normed=sizes.operand(_GATE_UP))
        ledger.free("y")
    _mlp_backward(ledger, sizes, tiles(tokens, tokens if level.keeps_gate_up else tile))
    ledger.free("stream", "normed")
    ledger.take(of_output=shape.gradient_bytes(_OUTPUT))
    if "active" in ledger.sizes:  # then those of the MLP are made with them
        ledger.take(of_mlp=shape.gradient_bytes(_DOWN) + shape.gradient_bytes(_GATE_UP))
        ledger.free("active", "normed_again", "d_gate_up", "inner_gate_up")
    ledger.take(d_attended=sizes.query)
    _product(ledger, sizes, _OUTPUT, backward=True)
    if "heads" not in ledger.sizes:
        _heads(ledger, sizes)
    _attention_backward(ledger, sizes)
    ledger.free("attended", "logsumexp", "d_attended", "heads")
    ledger.take(d_qkv=sizes.columns(shape.heads + shape.room(_QKV)))
    ledger.free("d_heads", "unturned")
    ledger.take(d_normed=sizes.stream)
    _product(ledger, sizes, _QKV, backward=True)
    ledger.take(below=sizes.operand(_DOWN), normed=sizes.stream)
    ledger.take(of_heads=shape.gradient_bytes(_QKV))


def _mlp_backward(ledger: Ledger, sizes: _Sizes, parts: object) -> None:
    shape = sizes.shape
    assert isinstance(parts, list)
    for part in parts:
        count = part.stop - part.start
        if "gate_up" not in ledger.sizes:
            if "normed" not in ledger.sizes:
                ledger.take(normed_part=sizes.columns(shape.width + shape.room(_GATE_UP), count))
            ledger.take(gate_up=sizes.columns(2 * shape.mlp, count))
            ledger.take(inner_gate_up=sizes.inner(_GATE_UP, count))
            _product(ledger, sizes, _GATE_UP, count)
            ledger.free("normed_part", *(["normed"] if part is parts[-1] else []))
        ledger.take(d_active=sizes.columns(shape.mlp, count))
        _product(ledger, sizes, _DOWN, count, backward=True)
        ledger.take(d_gate_up=sizes.columns(2 * shape.mlp + shape.room(_GATE_UP), count))
        ledger.take(active=sizes.columns(shape.mlp, count))
        ledger.free("gate_up", "d_active")
        ledger.take(d_normed=sizes.columns(shape.width, count))
        _product(ledger, sizes, _GATE_UP, count, backward=True)
        ledger.take(d_part=sizes.columns(shape.width + shape.room(_OUTPUT), count))
        ledger.take(normed_again=sizes.columns(shape.width, count))
        ledger.free("d_normed")
        if len(parts) > 1:
            of_part = shape.gradient_bytes(_DOWN) + shape.gradient_bytes(_GATE_UP)
            ledger.take(of_part=of_part)
            ledger.free("active", "normed_again", "d_gate_up", "inner_gate_up")
            ledger.take(d_stream=sizes.operand(_OUTPUT))
            ledger.free("d_part", "of_part")
            ledger.take(of_mlp=of_part)
    if len(parts) == 1:
        ledger.sizes["d_stream"] = ledger.sizes.pop("d_part")


def _attention_backward(ledger: Ledger, sizes: _Sizes) -> None:
    shape = sizes.shape
    # The gradient of query gathers in float32, and kernels for documents of different lengths pad each of them for
    # that. Where heads share keys and values, their gradients are made for each query head and then summed, or gather
    # likewise (`ops.attention.flash`): whichever takes more.
    padded = 4 * (sizes.tokens + _PADDING * sizes.documents)
    shared = shape.key_value_heads != shape.query_heads
    of_keys = max(2 * sizes.query, 2 * padded * shape.key_value_heads * shape.head_dim) if shared else 0
    row_sums = 2 * padded * shape.query_heads
    ledger.take(d_heads=sizes.heads, of_keys=of_keys, gathering=padded * shape.query, row_sums=row_sums)
    ledger.free("of_keys", "gathering", "row_sums")
