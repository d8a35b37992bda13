"""Activation memory of layers that are not fused, counted while the model itself runs a row without data.

A model's configuration does not show which activations its modules save. But the model can run on PyTorch's meta
device under a `StorageMeter`, forward and backward, in milliseconds per layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from loratune.base import model_config, one_pass, recompute
from loratune.base.causal import backbone_of
from loratune.fused.policy import ActivationPlan
from loratune.ops.attention import documents as attention
from loratune.ops.host import HostOffload
from loratune.ops.logprobs import token_logprobs
from loratune.ops.meter import StorageMeter
from loratune.ops.state import ForwardState
from loratune.precision import experts


@dataclass(frozen=True)
class SimulatedBytes:
    """Bytes of the activations of one row, with the gradients of the adapters."""

    saved: int
    """Bytes saved between forward and backward."""
    peak: int
    """Peak during forward and backward."""


def without_data(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model of this configuration on the meta device."""
    return model_config.without_data(config, dtype)


def simulate(model: PreTrainedModel, tokens: int, plan: ActivationPlan, *, on_gpu: bool) -> SimulatedBytes:
    """Runs one row forward and backward through a model on the meta device with an adapter in use.

    Args:
        tokens: length of the row.
        on_gpu: norms and activations run in one pass each, as they do on a GPU (`base.one_pass`).

    Raises: NotImplementedError, RuntimeError: an operation of the model needs data.
    """
    attention.register()
    before = model.config._attn_implementation
    model.set_attn_implementation(attention.IMPLEMENTATION)
    meter = StorageMeter()
    try:
        with (
            _passes(model, on_gpu),
            _experts(model, on_gpu),
            recompute.installed(model, plan, HostOffload(), ForwardState()),
            meter,
        ):
            loss = _loss(model, tokens)
            saved = meter.live
            loss.backward()
    finally:
        model.set_attn_implementation(before)
        for parameter in model.parameters():
            parameter.grad = None
    return SimulatedBytes(saved, meter.peak)


def _experts(model: PreTrainedModel, on_gpu: bool) -> AbstractContextManager[object]:
    return experts.installed(model) if on_gpu else nullcontext()


def _passes(model: PreTrainedModel, on_gpu: bool) -> AbstractContextManager[object]:
    """One-pass norms and activations, under the same conditions as in `base.forward`."""
    convolution = any(isinstance(module, nn.Conv1d) for module in model.modules())
    return one_pass.installed(model) if on_gpu and model.dtype.itemsize == 2 and not convolution else nullcontext()


def _loss(model: PreTrainedModel, tokens: int) -> Tensor:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    hidden = backbone_of(model)(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return token_logprobs(hidden, head, ids[0]).sum()
