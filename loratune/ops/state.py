"""State shared by one forward of a model and its backward.

Nothing in this package keeps state per process, so two models can train at once in two threads and on two streams.
State that has to outlive one function call is held here:

    dropout    the key of the current row
    positions  of the tokens of the current row in their documents
    products   the matrix-product kernels chosen by trial
    buffers    counters and tables of kernel launches
    flash      the kinds of heads for which FlashAttention 4 passed its trial

`base.forward.PackedForward` owns one instance and gives it to adapter layers and fused layers while it is installed.
A backward may run in a thread of autograd's own, so layers refer to an ordinary object; a thread-local variable would
be a different one there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from loratune.ops.attention.flash import FlashTrials
from loratune.ops.buffers import KernelBuffers
from loratune.ops.products import ProductKernels


class ForwardState:
    """State of one model's forward and backward. One forward at a time, on one stream."""

    def __init__(self) -> None:
        self.dropout_row: Tensor | None = None
        """`ops.dropout.row_key` of the current row; None draws dropout from torch's generator."""
        self.row_positions: Tensor | None = None
        """(T,) position of each token of the current row in its document, for layers that carry state along a row."""
        self.products = ProductKernels()
        self.buffers = KernelBuffers()
        self.flash = FlashTrials()

    @contextmanager
    def dropout(self, row: Tensor | None) -> Iterator[None]:
        """Context in which adapters draw their dropout from `row`, a `row_key` on the row's device."""
        before, self.dropout_row = self.dropout_row, row
        try:
            yield
        finally:
            self.dropout_row = before

    def __reduce__(self) -> tuple[type[ForwardState], tuple[()]]:
        """A copied or unpickled model starts with a state of its own."""
        return ForwardState, ()
