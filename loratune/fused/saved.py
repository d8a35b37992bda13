"""Activations that a fused layer saves from its forward for its backward, on the device or on the host."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from loratune.fused.structure import SavePolicy
from loratune.ops.attention.recorded import RecordedAttention


@dataclass
class HeadActivations:
    """Stacked query, key and value, (T, heads, head_dim)."""

    rotated: Tensor | None
    """Heads after the rotation, as attention reads them; None after they are freed, and while they are on the
    host."""
    unrotated: Tensor | None
    """Heads before norm and rotation; None unless the gradient of a norm needs them."""
    low_rank: Tensor | None
    """Low-rank activation of the projection, (T, R)."""

    @property
    def attention_input(self) -> Tensor:
        """`rotated`, which must be on the device."""
        assert self.rotated is not None
        return self.rotated


@dataclass
class SavedActivations:
    """Saved activations of one layer. None: recomputed, or in host memory."""

    x: Tensor | None = None
    """Input, (T, d)."""
    heads: HeadActivations | None = None
    attended: RecordedAttention | None = None
    low_rank_output: Tensor | None = None
    """Low-rank activation of attention's output projection, (T, R)."""
    attention_out: Tensor | None = None
    """Output of attention's output projection, (T, d); None unless a norm follows."""
    stream: Tensor | None = None
    """Residual stream between the halves, (T, d)."""
    up: tuple[Tensor, Tensor | None] | None = None
    """Output of the MLP's first projection, and its low-rank activation."""
    low_rank_down: Tensor | None = None
    """Low-rank activation of the down projection, (T, R)."""
    mlp_out: Tensor | None = None
    """Output of the down projection, (T, d); None unless a norm follows."""
    _away: list[str] = field(default_factory=list)
    """Names of the activations on the host, in order."""

    def offload(self, policy: SavePolicy) -> None:
        """Sends the input and every other saved activation of full width to the host."""
        assert policy.host is not None
        held = {
            "x": self.x,
            "attended": None if self.attended is None else self.attended.out,
            "stream": self.stream,
            "attention_out": self.attention_out,
            "mlp_out": self.mlp_out,
            "heads": self._heads_to_send(),
        }
        tensors = {name: tensor for name, tensor in held.items() if tensor is not None}
        self._away = list(tensors)
        if self.attended is not None:
            self.attended.free_out()
        if self.heads is not None:
            self.heads = HeadActivations(None, None, self.heads.low_rank)
        self.x = self.stream = self.attention_out = self.mlp_out = None
        del held
        policy.host.offload(policy.index, *tensors.values())

    def fetch(self, policy: SavePolicy) -> Tensor | None:
        """Copies the activations back. Returns query, key and value in the form that was sent, None if not saved."""
        assert policy.host is not None
        found = dict(zip(self._away, policy.host.fetch(policy.index), strict=True))
        self.x, self.stream = found["x"], found.get("stream")
        self.attention_out, self.mlp_out = found.get("attention_out"), found.get("mlp_out")
        if self.attended is not None:
            self.attended.restore_out(found["attended"])
        return found.get("heads")

    def _heads_to_send(self) -> Tensor | None:
        """Query, key and value before their norm if those exist, because they can be rotated again; else rotated."""
        heads = self.heads
        if heads is None:
            return None
        return heads.attention_input if heads.unrotated is None else heads.unrotated
