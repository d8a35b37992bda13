"""Activation policies for decoder layers of any architecture: each layer under `torch.utils.checkpoint`.

Where layers are not fused (`fused.layer`), autograd keeps what every module asks for. A stand-in around each layer
keeps less (`fused.policy`): the layer's input, from which the backward runs the layer again; with `selective` also
the
outputs of the attention kernel, so that this is not run twice (FlashAttention 4 is no operator of PyTorch's and runs
twice all the same); with `offload` the input waits on the host. Dropout is
the same in both runs: it follows from the step's key (`ops.dropout`); where no key is open the state of the random
generators is kept beside the input.

While rows run, each layer is stood in for by a `Recomputed` that shares its children, so parameter paths stay what
they are. Source: Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from loratune.fused.policy import ActivationPlan, Level
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


class Recomputed(nn.Module):
    """Stands in for a decoder layer, with the same children; runs it again in the backward."""

    _base: tuple[nn.Module]  # in a tuple, so that nn.Module does not register it as a child
    _level: Level
    _index: int
    _host: HostOffload | None
    _state: ForwardState

    @classmethod
    def from_base(
        cls, base: nn.Module, level: Level, index: int, host: HostOffload | None, state: ForwardState
    ) -> Recomputed:
        """The stand-in for `base`, the layer of number `index`, under a level from `SELECTIVE` on."""
        layer = cls.__new__(cls)
        layer.__dict__.update(base.__dict__)
        layer._base, layer._level, layer._index = (base,), level, index
        layer._host, layer._state = host, state
        return layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns."""
        base = self._base[0]
        if not torch.is_grad_enabled():
            return base(hidden_states, *args, **kwargs)
        settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self._random()}
        if self._level is Level.SELECTIVE:
            settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
        host, state, row = self._host, self._state, self._state.dropout_row

        def run_base(*args: Any, **kwargs: Any) -> Any:
            with state.dropout(row):  # the key of the forward, whenever the backward runs
                return base(*args, **kwargs)

        if self._level is not Level.OFFLOAD or host is None:
            return checkpoint(run_base, hidden_states, *args, **settings, **kwargs)
        first, needs_gradient = [hidden_states], hidden_states.requires_grad

        def run(*args: Any, **kwargs: Any) -> Any:
            x = first.pop() if first else host.fetch(self._index)[0].requires_grad_(needs_gradient)
            return run_base(x, *args, **kwargs)

        out = checkpoint(run, *args, **settings, **kwargs)
        host.offload(self._index, hidden_states.detach())
        return out

    def _random(self) -> bool:
        """The frozen base has no dropout while it trains; an adapter may, by a key or by the generators."""
        if self._state.dropout_row is not None:
            return False
        return any(getattr(module, "lora_dropout", 0.0) > 0.0 for module in self.modules())


@contextmanager
def installed(
    model: PreTrainedModel, plan: ActivationPlan, host: HostOffload | None, state: ForwardState
) -> Iterator[None]:
    """Puts `Recomputed` in the place of the decoder layers that are to keep less, and the layers back on exit.

    Without a host, `Level.OFFLOAD` is `Level.FULL`.
    """
    layers = decoder_layers(model)
    before = list(layers)
    for index, (base, level) in enumerate(zip(before, plan.levels, strict=True)):
        if level > Level.WIDE:
            layers[index] = Recomputed.from_base(base, level, index, host, state)
    try:
        yield
    finally:
        for index, base in enumerate(before):
            layers[index] = base


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a model's decoder layers: the longest list of modules that its backbone has."""
    backbone = model.get_decoder() if model.get_decoder() is not model else model.base_model
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _keep_attention(_: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
