"""Attention of one layer run by itself: its output now, its backward when asked for, and a choice of what is held.

A fused decoder layer (`fused.block`) is one autograd node that decides what it keeps. Attention has several kernels,
each with residuals of its own (an output, a logsumexp, the state of a random generator), and calling their backward
by hand would tie this code to the signatures of one version of PyTorch. So attention is recorded by autograd as
usual, in a small graph of its own, and what that graph holds passes through `saved_tensors_hooks`: a view of the
stacked heads is remembered by its geometry alone, so that query, key and value can be let go of and handed back,
computed anew, when the backward needs them; and so is the output, which may wait elsewhere.
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
        """Runs it.

        Args:
            attend: the attention, differentiable.
            heads: (T, heads, head_dim): queries, keys, values.
            split: divides the heads into query, key and value, as views.
        """
        self._held = _Held(heads)
        self._gradients: list[Tensor] = []
        entry = torch.empty(0, device=heads.device, requires_grad=True)
        with torch.enable_grad(), saved_tensors_hooks(self._held.pack, self._held.unpack):
            inputs: Any = _Enter.apply(entry, self._gradients, *split(heads))  # type: ignore[no-untyped-call]
            out = attend(*inputs)
        self._end = get_gradient_edge(out)
        self._held.out = out.detach()

    @property
    def out(self) -> Tensor:
        """Attention's output, (T, query heads * head_dim), outside of any graph."""
        assert self._held.out is not None
        return self._held.out

    def free_heads(self) -> None:
        """Lets go of query, key and value; `backward` must then be given them again."""
        self._held.heads = None

    def free_out(self) -> None:
        """Lets go of the output; `restore_out` must bring it back before it is asked for and before `backward`."""
        self._held.free_out()

    def restore_out(self, out: Tensor) -> None:
        """Brings the output back, (T, query heads * head_dim), contiguous."""
        self._held.out = out

    def backward(self, d_out: Tensor, heads: Tensor | None = None) -> list[Tensor]:
        """Gradients of query, key and value, (T, heads of each, head_dim) each. May be called once.

        Args:
            d_out: (T, query heads * head_dim).
            heads: as at the start and with the same values, if they were let go of.
        """
        if heads is not None:
            self._held.heads = heads
        torch.autograd.backward(self._end, d_out)
        self._held.heads = self._held.out = None
        d_query, d_key, d_value = self._gradients
        self._gradients.clear()
        return [d_query, d_key, d_value]


class _View(NamedTuple):
    """Where a tensor lay in another that may be let go of."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, whole: Tensor) -> _View:
        """The place of `tensor` in `whole`, whose memory it shares."""
        return cls(tensor.shape, tensor.stride(), int(tensor.storage_offset()) - int(whole.storage_offset()))

    def taken_from(self, whole: Tensor | None) -> Tensor:
        """The same part of something that is laid out like the whole was."""
        assert whole is not None, "what was let go of must be brought back before it is needed"
        return whole.as_strided(self.shape, self.stride, int(whole.storage_offset()) + self.offset)


@dataclass
class _Saved:
    """A tensor that the kernel keeps, or where it lay in the output once that has been let go of."""

    tensor: Tensor | None
    in_out: _View | None = None


class _Held:
    """The hooks of a `RecordedAttention`. They live in its graph; a graph that refers to its owner is never freed."""

    def __init__(self, heads: Tensor) -> None:
        self.heads: Tensor | None = heads
        self.out: Tensor | None = None
        self._saved: list[_Saved] = []

    def pack(self, tensor: Tensor) -> _Saved | _View:
        assert self.heads is not None
        if _shares(tensor, self.heads):
            return _View.of(tensor, self.heads)
        self._saved.append(_Saved(tensor.detach()))  # an output that its own node held would never be let go of
        return self._saved[-1]

    def unpack(self, held: _Saved | _View) -> Tensor:
        if isinstance(held, _View):
            return held.taken_from(self.heads)
        if held.in_out is not None:
            return held.in_out.taken_from(self.out)
        assert held.tensor is not None
        return held.tensor

    def free_out(self) -> None:
        assert self.out is not None
        if not self.out.is_contiguous():
            return
        for saved in self._saved:
            if saved.tensor is not None and _shares(saved.tensor, self.out):
                saved.in_out, saved.tensor = _View.of(saved.tensor, self.out), None
        self.out = None


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage() is b.untyped_storage()


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
