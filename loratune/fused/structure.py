"""Definition of one decoder layer: two halves, their projections and norms, and the residual stream around them.

    h   = x + scale · post(output(attention(heads(projection(norm(x))))))
    out = h + scale · post(down(activation(up(norm(h)))))

Any norm may be the identity. With `parallel` both halves read x, and out is the sum of x and both. `fused.recipes`
makes these objects from a model's modules; `fused.block` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from loratune.fused.link import UNPADDED, LayerLink, OperandFormat, ResidualBranch, StreamReader
from loratune.fused.policy import TILE, Level
from loratune.ops import layer
from loratune.ops.host import HostOffload
from loratune.ops.layer import ActivationKind, HeadSpec, NormSpec
from loratune.ops.measure import Measure
from loratune.ops.projection import LinkedActivation, Projection


@dataclass(frozen=True)
class MlpActivation:
    """Activation of an MLP: act(gate) · up of a gated MLP, act(x) of a plain one."""

    kind: ActivationKind
    gated: bool

    def forward(self, x: Tensor, pad_columns: int, measure: Measure | None) -> Tensor:
        """(N, 2 m) if gated, gate first, else (N, m) -> (N, m + pad_columns)."""
        run = layer.gated if self.gated else layer.activation
        return run(x, self.kind, pad_columns, measure)

    def backward(self, x: Tensor, d_out: Tensor, pad_columns: int, measure: Measure | None) -> tuple[Tensor, Tensor]:
        """Gradient of x, with padding, and the activation again, (N, m)."""
        run = layer.gated_backward if self.gated else layer.activation_backward
        return run(x, d_out, self.kind, pad_columns, measure)


class Rotation(NamedTuple):
    """Rotary positions of one row: cosines and sines, (T, rotary_dim)."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class AttentionHalf:
    """Attention with its projections and norms."""

    projection: Projection
    """Query, key and value stacked."""
    output: Projection
    heads: HeadSpec
    norm: NormSpec
    branch: ResidualBranch

    @property
    def reader(self) -> StreamReader:
        """Reader of the layer's input."""
        return StreamReader(self.norm, input_format(self.projection))

    @property
    def gradient_format(self) -> OperandFormat:
        """Format in which the backward of this half takes the gradient of its output stream."""
        return output_gradient_format(self.output) if self.branch.is_sum else UNPADDED

    def with_dropout(self, row: Tensor) -> AttentionHalf:
        """The same with dropout in the adapters, drawn from `row` (`ops.dropout.row_key`)."""
        return replace(self, projection=self.projection.with_dropout(row), output=self.output.with_dropout(row))


@dataclass(frozen=True)
class MlpHalf:
    """The MLP with its projections and norms."""

    up: Projection
    """Gate and up stacked, or up alone."""
    down: Projection
    activation: LinkedActivation
    norm: NormSpec
    branch: ResidualBranch

    @property
    def reader(self) -> StreamReader:
        """Reader of the MLP's input."""
        return StreamReader(self.norm, input_format(self.up))

    @property
    def gradient_format(self) -> OperandFormat:
        """Format in which the backward of this half takes the gradient of its output stream."""
        return output_gradient_format(self.down) if self.branch.is_sum else UNPADDED

    def with_dropout(self, row: Tensor) -> MlpHalf:
        """The same with dropout in the adapters, drawn from `row` (`ops.dropout.row_key`)."""
        return replace(self, up=self.up.with_dropout(row), down=self.down.with_dropout(row))

    def at(self, tile: slice) -> MlpHalf:
        """The same on a tile of the row's tokens."""
        if tile.start == 0:
            return self
        return replace(self, up=self.up.from_token(tile.start), down=self.down.from_token(tile.start))


@dataclass(frozen=True)
class LayerStructure:
    """One decoder layer."""

    attention: AttentionHalf
    mlp: MlpHalf
    parallel: bool = False
    """Both halves read the layer's input (GPT-NeoX)."""
    below: LayerLink = field(default_factory=LayerLink)
    above: LayerLink = field(default_factory=LayerLink)

    def rotated_by(self, rotation: Rotation | None) -> LayerStructure:
        """The same layer, rotating as many elements of each head as `rotation` has columns; none if it is None."""
        rotary_dim = 0 if rotation is None else rotation.cos.shape[-1]
        if rotary_dim == self.attention.heads.rotary_dim:
            return self
        heads = replace(self.attention.heads, rotary_dim=rotary_dim)
        return replace(self, attention=replace(self.attention, heads=heads))

    def with_dropout(self, row: Tensor) -> LayerStructure:
        """The same with dropout in the adapters, drawn from `row` (`ops.dropout.row_key`)."""
        return replace(self, attention=self.attention.with_dropout(row), mlp=self.mlp.with_dropout(row))


@dataclass(frozen=True)
class SavePolicy:
    """Selects the activations that one layer saves for its backward, on the device or on the host."""

    level: Level = Level.NONE
    tile: int = TILE
    """Tokens that pass through the MLP at once, where the output of `up` is not saved."""
    index: int = 0
    """Number of the layer, under which `host` holds its activations."""
    host: HostOffload | None = None
    """Holds saved activations at levels that offload them."""


def input_format(projection: Projection) -> OperandFormat:
    """Format in which a pass writes a projection's input."""
    return OperandFormat(projection.pad_columns, projection.measure_x)


def output_gradient_format(projection: Projection) -> OperandFormat:
    """Format in which a pass writes the gradient of a projection's output."""
    return OperandFormat(projection.pad_columns, projection.measure_dy)
