"""Residual stream of fused layers: its sums, its readers, and a side channel between adjacent layers.

Autograd passes one tensor from layer to layer. Two more tensors are passed beside it, because a pass over memory has
their values in registers anyway:

    up      the result of the upper layer's first norm, computed in one pass with the lower layer's last sum
    down    the gradient with padding columns behind each row, which the lower layer's projection fills

Each is used only if autograd delivers the tensor that was sent, unmodified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from loratune.ops import layer
from loratune.ops.layer import IDENTITY, NormSpec
from loratune.ops.measure import Measure


class OperandFormat(NamedTuple):
    """Format in which a pass writes the operand of a projection. Projections accept unpadded rows too."""

    pad: int = 0
    """Padding columns behind each row (`precision.projection`)."""
    measure: Measure | None = None
    """Row statistics to store in the padding (`ops.measure`)."""


UNPADDED = OperandFormat()


class StreamReader(NamedTuple):
    """First reader of a residual stream: a norm, which may be the identity, and the projection behind it."""

    norm: NormSpec
    operand: OperandFormat = UNPADDED

    def read(self, stream: Tensor) -> Tensor:
        """The projection's operand, (T, d) -> (T, d + pad)."""
        return layer.norm(stream, self.norm, *self.operand)

    def backward(
        self, d_operand: Tensor, d_residual: Tensor, stream: Tensor, target: OperandFormat
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the stream, through this reader and along the residual connection.

        Args:
            d_operand: (T, d), gradient of `read(stream)`.
            d_residual: (T, at least d), gradient along the residual connection.
            target: format of the result.
        Returns: (T, d + pad), and `read(stream)` without padding, (T, d).
        """
        return layer.norm_backward(d_operand, d_residual[:, : stream.shape[1]], stream, self.norm, *target)


@dataclass(frozen=True)
class ResidualBranch:
    """End of one half of a layer: stream + scale · norm(y), where y is the output of the half's last projection."""

    norm: NormSpec = IDENTITY
    """Norm of y, as in Gemma 2 and OLMo 2."""
    scale: float = 1.0
    """Residual multiplier, as in Granite."""

    @property
    def reads_output(self) -> bool:
        """True if the gradient of y depends on y."""
        return self.norm.kind != "none"

    @property
    def is_sum(self) -> bool:
        """True for stream + y, where y's gradient is the stream's."""
        return not self.reads_output and self.scale == 1.0

    def join(self, stream: Tensor, y: Tensor) -> Tensor:
        """The new stream, (T, d). It overwrites y unless the gradient depends on y."""
        if self.reads_output:
            return layer.post_norm_add(stream, y, self.norm, self.scale)
        return (y if self.scale == 1.0 else y.mul_(self.scale)).add_(stream)

    def join_and_read(self, stream: Tensor, y: Tensor, reader: StreamReader) -> tuple[Tensor, Tensor]:
        """The new stream, (T, d), and the operand that `reader` reads from it, (T, d + pad), in one pass."""
        if self.reads_output:
            return layer.post_norm_add_norm(stream, y, self.norm, reader.norm, *reader.operand, scale=self.scale)
        return layer.add_norm(stream, y, reader.norm, *reader.operand, scale=self.scale)

    def backward(self, d_stream: Tensor, y: Tensor | None, width: int, target: OperandFormat) -> Tensor:
        """Gradient of y, (T, width) or (T, width + pad).

        Args:
            d_stream: (T, at least width), in the format `target` if the branch is a sum.
            y: (T, width), not needed unless `reads_output`.
        """
        if self.is_sum:
            return d_stream
        d_stream = d_stream[:, :width]
        return layer.post_norm_backward(d_stream, d_stream if y is None else y, self.norm, self.scale, *target)


@dataclass
class LayerLink:
    """Side channel between a layer and the layer above it."""

    gradient_format: OperandFormat = UNPADDED
    """Format in which the lower layer takes the gradient of its output."""
    reader: StreamReader | None = None
    """First reader of the stream in the upper layer."""
    _buffer: Tensor | None = None
    _ahead: tuple[Tensor, int, Tensor] | None = None
    """The stream that was sent, its version counter, and the upper layer's first operand."""

    def send_gradient(self, gradient: Tensor, width: int) -> Tensor:
        """Stores a gradient, (T, width + pad); returns its first `width` columns for autograd."""
        self._buffer = gradient
        return gradient[:, :width]

    def receive_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient from autograd, (T, d). If it is the tensor that was sent, its padding is included."""
        buffer, self._buffer = self._buffer, None
        if buffer is None or buffer.data_ptr() != gradient.data_ptr() or buffer.stride() != gradient.stride():
            return gradient
        return buffer

    def join(self, stream: Tensor, y: Tensor, branch: ResidualBranch) -> Tensor:
        """The stream that leaves the lower layer, (T, d); y may be overwritten."""
        if self.reader is None:
            return branch.join(stream, y)
        total, operand = branch.join_and_read(stream, y, self.reader)
        self._ahead = total, total._version, operand
        return total

    def take_operand(self, stream: Tensor) -> Tensor | None:
        """The first operand of the upper layer if the lower layer sent it for this stream, else None.

        The link gives up its reference, so a second call returns None.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        sent, version, operand = ahead
        same = sent.data_ptr() == stream.data_ptr() and sent.shape == stream.shape and version == stream._version
        return operand if same else None
