"""State shared by one forward of a model and its backward.

Nothing in this package keeps state per process, so two models can train at once in two threads and on two streams.
State that has to outlive one function call is held here. `base.forward.PackedForward` owns one instance and gives it
to adapter layers and fused layers while it is installed. A backward may run in a thread of autograd's own, so the
state is an ordinary object that layers refer to, and never a thread-local variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class ForwardState:
    """State of one model's forward and backward. One forward at a time, on one stream."""

    def __init__(self) -> None:
        self.dropout_row: Tensor | None = None
        """`ops.dropout.row_key` of the current row; None draws dropout from torch's generator."""

    @contextmanager
    def dropout(self, row: Tensor | None) -> Iterator[None]:
        """Inside, adapters draw their dropout from `row`, a `row_key` on the row's device."""
        before, self.dropout_row = self.dropout_row, row
        try:
            yield
        finally:
            self.dropout_row = before
