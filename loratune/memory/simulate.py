"""Memory of layers that are not fused: one row run on tensors without data, counted as it goes.

How much a module of some architecture keeps cannot be read off its configuration. But PyTorch can run it on its
"meta" device, where every operator makes outputs of the right shape and computes nothing, and a dispatch mode sees
each of them: bytes are added when a storage appears and taken off when it dies, which is what an allocator does.
Attention is the exception: on that device it would be written out with its square of scores, so it is stood in for by
what its kernels make.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loratune.base import one_pass, recompute
from loratune.fused.policy import ActivationPlan
from loratune.ops.attention import documents as attention
from loratune.ops.host import HostOffload
from loratune.ops.logprobs import token_logprobs
from loratune.ops.state import ForwardState

_ATTENTION = "loratune_simulated"


@dataclass(frozen=True)
class SimulatedBytes:
    """Bytes of activations, gradients of the adapters among them."""

    kept: int
    """Between forward and backward."""
    peak: int


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of storages that appear while it is active, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operator and notes what it made."""
        out = function(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                if storage not in self._known and id(storage) not in given:
                    self._known.add(storage)
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def without_data(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model of this configuration on the meta device."""
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    made.requires_grad_(False)
    made.eval()
    return made


def simulate(model: PreTrainedModel, tokens: int, plan: ActivationPlan, *, on_gpu: bool) -> SimulatedBytes:
    """One row of `tokens` tokens forward and backward through a model on the meta device with an adapter in use.

    Args:
        on_gpu: that norms and activations are imagined as they run there (`base.one_pass`).

    Raises: NotImplementedError, RuntimeError: the model does something that cannot be done without data.
    """
    AttentionInterface.register(_ATTENTION, _attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    meter = StorageMeter()
    try:
        with _passes(model, on_gpu), recompute.installed(model, plan, HostOffload(), ForwardState()), meter:
            loss = _loss(model, tokens)
            kept = meter.live
            loss.backward()
    finally:
        model.set_attn_implementation(before)
        for parameter in model.parameters():
            parameter.grad = None
    return SimulatedBytes(kept, meter.peak)


def _passes(model: PreTrainedModel, on_gpu: bool) -> AbstractContextManager[object]:
    """As `base.forward.take_one_pass` will have it; a convolution along the row means one document at a time."""
    along = any(isinstance(module, nn.Conv1d) for module in model.modules())
    return one_pass.installed(model) if on_gpu and model.dtype.itemsize == 2 and not along else nullcontext()


def _loss(model: PreTrainedModel, tokens: int) -> Tensor:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    backbone: Callable[..., Any] = model.get_decoder() if model.get_decoder() is not model else model.base_model
    hidden = backbone(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return token_logprobs(hidden, head, ids[0]).sum()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: object,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **__: object,
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if (softcap is not None or s_aux is not None) and query.dtype.itemsize > 2:  # then the scores are written out
        return attention.explicit(query, key, value, 1.0, 0.0, None, softcap, s_aux).transpose(1, 2), None
    out: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out, None


class _Attention(torch.autograd.Function):
    """(1, heads, T, head_dim) -> (1, T, heads, head_dim)"""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
