"""Bytes of one fused decoder layer, counted while the layer itself runs without data.

The largest tensors of a layer exist only during one product, so an estimate needs every temporary of forward and
backward. A list written by hand would be a second definition of the layer. Instead the layer that trains is built
once more on PyTorch's meta device and runs there under a `StorageMeter`. A new recipe, level or precision needs no
new code. Kernels allocate on that device as on a GPU (`ops.dispatch`), and so does attention
(`ops.attention.simulated`).

A run takes milliseconds for each shape of a row. Results are cached for the lifetime of the `LayerLedger`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from loratune.fused.block import decoder_layer
from loratune.fused.fit import RecipeFit
from loratune.fused.link import LayerLink
from loratune.fused.policy import Level
from loratune.fused.stacking import Copies
from loratune.fused.structure import LayerStructure, Rotation, SavePolicy
from loratune.ops.attention import simulated
from loratune.ops.host import HostOffload
from loratune.ops.meter import StorageMeter, rounded

LayerSource = Callable[[], tuple[nn.Module, RecipeFit]]
"""Makes a decoder layer on the meta device, with its adapters, and the recipe that fits it."""


@dataclass(frozen=True)
class LayerRun:
    """One forward and backward of a layer."""

    tokens: int
    documents: int
    """Documents of different lengths; 0 if all have the same length."""
    level: Level
    tile: int
    """Tokens that pass through the MLP at once."""
    hold_transposed: bool = False
    """True if weights with adapters are also held transposed (`fused.policy.ActivationPlan.hold_transposed`)."""


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one run of a layer."""

    saved: int
    """Bytes on the device between the layer's forward and backward, with the input and without the output."""
    forward: int
    """Peak during the forward, without the input and without the saved activations of layers below."""
    away: int
    """Bytes in host memory between forward and backward."""
    backward: int
    """Peak during the backward, with the saved tensors and the gradients of output and input."""


@dataclass(frozen=True)
class LayerWidths:
    """Numbers of columns of a layer's activations, for estimates of speed."""

    stream: int
    """d, the width of the residual stream."""
    heads: int
    """Query, key and value together."""
    query: int
    """Query alone, and attention's output."""
    up: int
    """Output of the MLP's first projection: 2 m if gated, else m."""
    mlp: int
    """m, the input of the MLP's second projection."""

    @property
    def mlp_elements(self) -> int:
        """Elements of the MLP's frozen weights."""
        return (self.up + self.mlp) * self.stream


class LayerLedger:
    """A fused decoder layer without data, and the bytes that it takes on rows of any shape."""

    def __init__(self, source: LayerSource) -> None:
        self._source = source
        self._built: dict[bool, _BuiltLayer] = {}
        self._known: dict[LayerRun, LayerBytes] = {}
        self._meter = StorageMeter()

    def __call__(self, run: LayerRun) -> LayerBytes:
        """Bytes of a run."""
        if run not in self._known:
            self._known[run] = self._run(run)
        return self._known[run]

    def copies_bytes(self, *, hold_transposed: bool = False) -> int:
        """Working copies of the adapters, and everything that is derived from them and from the weights."""
        return self._layer(hold_transposed).copies_bytes

    @property
    def widths(self) -> LayerWidths:
        """Columns of the layer's activations."""
        attention, mlp = self._layer(False).structure.attention, self._layer(False).structure.mlp
        (heads, stream), query = attention.projection.frozen.shape, attention.output.frozen.shape[1]
        return LayerWidths(stream, heads, query, mlp.up.frozen.shape[0], mlp.down.frozen.shape[1])

    def _layer(self, hold_transposed: bool) -> _BuiltLayer:
        if hold_transposed not in self._built:
            self._built[hold_transposed] = _built(self._source, hold_transposed)
        return self._built[hold_transposed]

    def _run(self, run: LayerRun) -> LayerBytes:
        layer, host, meter, tokens = self._layer(run.hold_transposed), _CountedHost(), self._meter, run.tokens
        structure, link, frozen = layer.structure, layer.structure.above, layer.structure.attention.projection.frozen
        policy, width = SavePolicy(run.level, run.tile, 0, host), frozen.shape[1]

        def attend(*heads: Tensor) -> Tensor:
            query, key, value = (tensor.transpose(0, 1)[None] for tensor in heads)
            return simulated.attend(query, key, value, run.documents).reshape(tokens, -1)

        def empty(columns: int) -> Tensor:
            return torch.empty(tokens, columns, dtype=frozen.dtype, device="meta")

        rotation = Rotation(*(empty(structure.attention.heads.dim) for _ in range(2)))
        with meter:
            start = meter.live
            x = empty(width).requires_grad_()
            stream = meter.live - start
            meter.peak = meter.live
            out = decoder_layer(x, rotation, structure, attend, policy, layer.masters)
            forward = meter.peak - start - stream
            link.take_operand(out)  # as the next layer does
            saved = meter.live - start - stream - host.bytes
            gradient = link.send_gradient(empty(width + link.gradient_format.pad), width)
            edge = get_gradient_edge(out)
            del out
            meter.peak = meter.live
            torch.autograd.backward(edge, gradient)
            backward = meter.peak - start
        structure.below.receive_gradient(gradient)
        for parameter in (*layer.masters[0], *layer.masters[1]):
            parameter.grad = None
        return LayerBytes(saved, forward, host.bytes, backward)


@dataclass(frozen=True)
class _BuiltLayer:
    structure: LayerStructure
    """The layer, linked to layers of its own kind below and above."""
    masters: tuple[list[Tensor], list[Tensor]]
    copies_bytes: int


def _built(source: LayerSource, hold_transposed: bool) -> _BuiltLayer:
    meter, copies = StorageMeter(), Copies(hold_transposed=hold_transposed)
    with meter:
        module, fit = source()
        before = meter.live
        structure, masters = fit.structure(module, copies, LayerLink()), fit.masters(module)
        copies_bytes = meter.live - before
    target = structure.mlp.gradient_format
    structure = replace(structure, below=LayerLink(target), above=LayerLink(target, structure.attention.reader))
    return _BuiltLayer(structure, masters, copies_bytes)


class _CountedHost(HostOffload):
    """Counts the bytes that are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def offload(self, layer: int, *tensors: Tensor) -> None:
        """Counts the bytes, then offloads as `HostOffload`."""
        self.bytes += sum(rounded(tensor.numel() * tensor.element_size()) for tensor in tensors)
        super().offload(layer, *tensors)
