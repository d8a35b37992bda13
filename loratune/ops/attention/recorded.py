"""Attention of one layer in an autograd graph of its own, whose saved tensors can be freed and restored.

A fused decoder layer (`fused.block`) is one autograd node that decides which activations it saves. Attention has
several kernels, each with residuals of its own: an output, a logsumexp, the state of a random generator. Calling
their backward by hand would tie this code to the signatures of one PyTorch version. So autograd records attention as
usual, in a small graph, and its saved tensors pass through `saved_tensors_hooks`:

    views of the stacked heads   only their geometry is stored, so query, key and value can be freed and recomputed
    the output                   can be freed and restored, for example from host memory
    all other tensors            saved as usual
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

Split = Callable[[Tensor], Sequence[Tensor]]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value, (T, heads of each, head_dim), to attention's output (T, query heads * head_dim)."""


class RecordedAttention:
    """Attention over stacked heads (T, query + 2 * key_value heads, head_dim)."""

    def __init__(self, attend: Attend, heads: Tensor, split: Split) -> None:
        """Runs attention and records it.

        Args:
            attend: a differentiable attention function.
            heads: (T, heads, head_dim): queries, keys, values.
            split: divides the heads into query, key and value, as views.
        """
        self._saved = _SavedTensors(heads)
        self._gradients: list[Tensor] = []
        entry = torch.empty(0, device=heads.device, requires_grad=True)
        with torch.enable_grad(), saved_tensors_hooks(self._saved.pack, self._saved.unpack):
            inputs: Any = _GraphStart.apply(entry, self._gradients, *split(heads))  # type: ignore[no-untyped-call]
            out = attend(*inputs)
        self._end = get_gradient_edge(out)
        self._saved.out = out.detach()

    @property
    def out(self) -> Tensor:
        """Attention's output, (T, query heads * head_dim), outside of any graph."""
        assert self._saved.out is not None
        return self._saved.out

    def free_heads(self) -> None:
        """Frees query, key and value; `backward` must then receive them again."""
        self._saved.heads = None

    def free_out(self) -> None:
        """Frees the output; `restore_out` must be called before `out` is read and before `backward`."""
        self._saved.free_out()

    def restore_out(self, out: Tensor) -> None:
        """Restores the output, (T, query heads * head_dim), contiguous."""
        self._saved.out = out

    def backward(self, d_out: Tensor, heads: Tensor | None = None) -> list[Tensor]:
        """Gradients of query, key and value, (T, heads of each, head_dim) each. May be called once.

        Args:
            d_out: (T, query heads * head_dim).
            heads: the same values as at the start, if they were freed.
        """
        if heads is not None:
            self._saved.heads = heads
        torch.autograd.backward(self._end, d_out)
        self._saved.heads = self._saved.out = None
        d_query, d_key, d_value = self._gradients
        self._gradients.clear()
        return [d_query, d_key, d_value]


class _ViewGeometry(NamedTuple):
    """Geometry of a view of a tensor that may be freed."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, whole: Tensor) -> _ViewGeometry:
        """Geometry of `tensor`, a view of `whole`."""
        return cls(tensor.shape, tensor.stride(), int(tensor.storage_offset()) - int(whole.storage_offset()))

    def view_of(self, whole: Tensor | None) -> Tensor:
        """The same view of a tensor with the layout of the original."""
        assert whole is not None, "a freed tensor must be restored before it is used"
        return whole.as_strided(self.shape, self.stride, int(whole.storage_offset()) + self.offset)


@dataclass
class _SavedTensor:
    """A tensor saved by the kernel; after the output is freed, the geometry of a view of the output."""

    tensor: Tensor | None
    in_out: _ViewGeometry | None = None


class _SavedTensors:
    """The hooks of a `RecordedAttention`. Its graph refers to them, so they must not refer back: a cycle through a
    graph is never freed."""

    def __init__(self, heads: Tensor) -> None:
        self.heads: Tensor | None = heads
        self.out: Tensor | None = None
        self._others: list[_SavedTensor] = []

    def pack(self, tensor: Tensor) -> _SavedTensor | _ViewGeometry:
        assert self.heads is not None
        if _shares(tensor, self.heads):
            return _ViewGeometry.of(tensor, self.heads)
        self._others.append(_SavedTensor(tensor.detach()))  # attached, an output would hold its own node forever
        return self._others[-1]

    def unpack(self, packed: _SavedTensor | _ViewGeometry) -> Tensor:
        if isinstance(packed, _ViewGeometry):
            return packed.view_of(self.heads)
        if packed.in_out is not None:
            return packed.in_out.view_of(self.out)
        assert packed.tensor is not None
        return packed.tensor

    def free_out(self) -> None:
        assert self.out is not None
        if not self.out.is_contiguous():
            return
        for saved in self._others:
            if saved.tensor is not None and _shares(saved.tensor, self.out):
                saved.in_out, saved.tensor = _ViewGeometry.of(saved.tensor, self.out), None
        self.out = None


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage() is b.untyped_storage()


class _GraphStart(torch.autograd.Function):
    """Start of the small graph: passes the heads on, and collects their gradients in a list.

    Leaf tensors would do the same, but would keep the heads in memory as long as the graph exists.
    """

    @staticmethod
    def forward(ctx: Any, entry: Tensor, gradients: list[Tensor], *heads: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        return tuple(head.view_as(head) for head in heads)

    @staticmethod
    def backward(ctx: Any, *d_heads: Tensor) -> tuple[None, ...]:
        ctx.gradients.extend(d_heads)
        return (None,) * (2 + len(d_heads))
