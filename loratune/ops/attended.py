"""Attention of one layer run by itself: its output now, its backward when asked for, and a choice of what is held.

A fused decoder layer (`ops.block`) is one autograd node that decides what it keeps. Attention has several kernels,
each with residuals of its own (an output, a logsumexp, the state of a random generator), and calling their backward
by hand would tie this code to the signatures of one version of PyTorch. So attention is recorded by autograd as
usual, in a small graph of its own, and what that graph holds passes through `saved_tensors_hooks`: a view of the
stacked heads is remembered by its geometry alone, so that query, key and value can be let go of and handed back,
computed anew, when the backward needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value, (T, heads of each, head_dim), to attention's output (T, query heads * head_dim)."""


class Attended:
    """Attention over stacked heads (T, query + 2 * key_value heads, head_dim)."""

    def __init__(self, attend: Attend, heads: Tensor, split: Sequence[int]) -> None:
        """Runs it.

        Args:
            attend: the attention, differentiable.
            heads: (T, heads, head_dim): queries, keys, values.
            split: how many heads each of the three has.
        """
        self._held = _Heads(heads)
        self._gradients: list[Tensor] = []
        entry = torch.empty(0, device=heads.device, requires_grad=True)
        with torch.enable_grad(), saved_tensors_hooks(self._held.pack, self._held.unpack):
            inputs: Any = _Enter.apply(entry, self._gradients, *heads.split(list(split), 1))  # type: ignore[no-untyped-call]
            self._out = attend(*inputs)

    @property
    def out(self) -> Tensor:
        """Attention's output, (T, query heads * head_dim), outside of any graph."""
        return self._out.detach()

    def forget_heads(self) -> None:
        """Lets go of query, key and value; `backward` must then be given them again."""
        self._held.heads = None

    def backward(self, d_out: Tensor, heads: Tensor | None = None) -> Sequence[Tensor]:
        """Gradients of query, key and value, (T, heads of each, head_dim) each. May be called once.

        Args:
            d_out: (T, query heads * head_dim).
            heads: as at the start and with the same values, if they were let go of.
        """
        if heads is not None:
            self._held.heads = heads
        torch.autograd.backward(self._out, d_out)
        self._held.heads = None
        d_query, d_key, d_value = self._gradients
        self._gradients.clear()
        return d_query, d_key, d_value


class _View(NamedTuple):
    """Where a tensor lay in the stacked heads."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Heads:
    """The hooks, apart from `Attended`: they live in its graph, and a graph that held its owner would never die."""

    def __init__(self, heads: Tensor) -> None:
        self.heads: Tensor | None = heads

    def pack(self, tensor: Tensor) -> Tensor | _View:
        assert self.heads is not None
        if tensor.untyped_storage().data_ptr() != self.heads.untyped_storage().data_ptr():
            return tensor.detach()  # an output that its own node held would never be let go of
        offset = int(tensor.storage_offset()) - int(self.heads.storage_offset())
        return _View(tensor.shape, tensor.stride(), offset)

    def unpack(self, held: Tensor | _View) -> Tensor:
        if isinstance(held, Tensor):
            return held
        assert self.heads is not None
        return self.heads.as_strided(held.shape, held.stride, self.heads.storage_offset() + held.offset)


class _Enter(torch.autograd.Function):
    """The edge of the small graph: passes the heads in, and puts the gradients that come back into a list.

    Leaves would do the same but hold on to their values for as long as the graph lives.
    """

    @staticmethod
    def forward(ctx: Any, entry: Tensor, gradients: list[Tensor], *heads: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        return tuple(head.view_as(head) for head in heads)

    @staticmethod
    def backward(ctx: Any, *d_heads: Tensor) -> tuple[None, ...]:
        ctx.gradients.extend(d_heads)
        return (None,) * (2 + len(d_heads))
