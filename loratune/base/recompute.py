"""Recomputes decoder layers of any architecture in the backward, with `torch.utils.checkpoint`.

Without it autograd saves every activation that a module asks for. A `RecomputedLayer` around each decoder layer saves
less, by level (`fused.policy`):

    selective    the layer's input and the outputs of attention kernels; the layer runs again in the backward
    full         the input alone
    offload      the input, on the host

FlashAttention 4 is not an operator of PyTorch, so with it `selective` also runs attention again. Dropout is the same
in both runs, because it depends on the step's key (`ops.dropout`). Without a key, the state of the random generators
is saved with the input.

Replacements share the children of the originals, so parameter paths stay as they are. Source: Chen et al. 2016,
arXiv:1604.06174. Layers that run fused have levels of their own (`fused.block`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from transformers import PreTrainedModel

from loratune.fused.policy import ActivationPlan, Level
from loratune.fused.recipes import decoder_layers
from loratune.ops.attention import capped
from loratune.ops.host import HostOffload
from loratune.ops.state import ForwardState

_ATTENTION = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_flash_attention_forward",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
} | {capped.OPERATOR}


class RecomputedLayer(nn.Module):
    """Replaces a decoder layer, with the same children; runs it again in the backward."""

    _base: tuple[nn.Module]  # in a tuple, so that nn.Module does not register it as a child
    _level: Level
    _index: int
    _host: HostOffload | None
    _state: ForwardState

    @classmethod
    def from_base(
        cls, base: nn.Module, level: Level, index: int, host: HostOffload | None, state: ForwardState
    ) -> RecomputedLayer:
        """The replacement of `base`, layer number `index`; `level` is at least `SELECTIVE`."""
        layer = cls.__new__(cls)
        layer.__dict__.update(base.__dict__)
        layer._base, layer._level, layer._index = (base,), level, index
        layer._host, layer._state = host, state
        return layer

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        """Result of the base layer."""
        base = self._base[0]
        if not torch.is_grad_enabled():
            return base(hidden_states, *args, **kwargs)
        host, state, row = self._host, self._state, self._state.dropout_row

        def run(x: Tensor) -> object:
            with state.dropout(row):  # the key of the forward, whenever the backward runs
                return base(x, *args, **kwargs)

        checkpointed = functools.partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=self._random(),
            context_fn=_selective if self._level is Level.SELECTIVE else noop_context_fn,
        )
        if self._level is not Level.OFFLOAD or host is None:
            return checkpointed(run, hidden_states)
        first, needs_gradient = [hidden_states], hidden_states.requires_grad

        def run_fetched() -> object:
            return run(first.pop() if first else host.fetch(self._index)[0].requires_grad_(needs_gradient))

        out = checkpointed(run_fetched)
        host.offload(self._index, hidden_states.detach())
        return out

    def _random(self) -> bool:
        """True if an adapter draws its dropout from the random generators. The frozen base has no dropout."""
        if self._state.dropout_row is not None:
            return False
        return any(getattr(module, "lora_dropout", 0.0) > 0.0 for module in self.modules())


@contextmanager
def installed(
    model: PreTrainedModel, plan: ActivationPlan, host: HostOffload | None, state: ForwardState
) -> Iterator[None]:
    """Replaces decoder layers whose level saves less than everything, and puts them back on exit.

    Args:
        host: buffers for `Level.OFFLOAD`; without them it is `Level.FULL`.
        state: state of the forward that runs the layers.
    """
    layers = decoder_layers(model)
    before = list(layers)
    for index, (base, level) in enumerate(zip(before, plan.levels, strict=True)):
        if level > Level.WIDE:
            layers[index] = RecomputedLayer.from_base(base, level, index, host, state)
    try:
        yield
    finally:
        for index, base in enumerate(before):
            layers[index] = base


def _save_attention(_: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


_selective = functools.partial(create_selective_checkpoint_contexts, _save_attention)
