"""Compares two ways to run a model on a short row, with random adapters where adapters matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.base.lengths import SHORT, restart_rotary
from loratune.lora.contract import LowRankSum, fusion_of
from loratune.precision.linear import formats_in, frozen_of

REFUSALS = (
    *(NotImplementedError, TypeError, ValueError, RuntimeError, IndexError),
    *(AssertionError, AttributeError),  # of models that read a mask which a path does not make
)
"""Errors of an architecture that cannot run on a path, as opposed to errors of this package."""
_UPDATE_SHARE = 0.25
"""Norm of a random update scaling · B A, relative to the norm of its weight."""
_MOST_GRADIENT_ERROR = 0.5


class ProbeRow(NamedTuple):
    """A row of documents, as arguments of `base.forward.PackedForward.hidden_states`."""

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor


class ProbeResult(NamedTuple):
    """Hidden states of a row, (T, d), and gradients of the adapters as one vector; empty if nothing trains.

    Gradients are on the CPU: a GPU may have no memory for two more copies of the adapters.
    """

    states: Tensor
    gradients: Tensor

    def disagreement(self, expected: ProbeResult, model: PreTrainedModel) -> str | None:
        """Reason why the results differ by more than rounding, in one line; None if they agree."""
        most = tolerance(expected.states.dtype, model)
        error = relative_error(self.states, expected.states)
        if error > most:
            return f"hidden states differ by {error:.2g} (limit {most:g})"
        if not len(expected.gradients):
            return None
        most = gradient_tolerance(expected.states.dtype, model)
        error = relative_error(self.gradients, expected.gradients)
        return f"gradients differ by {error:.2g} (limit {most:g})" if error > most else None


def probe_row(model: PreTrainedModel, lengths: Sequence[int] = SHORT) -> ProbeRow:
    """Arbitrary tokens, the same in every call, in documents of the given lengths."""
    table = cast(Tensor, model.get_input_embeddings().weight)
    vocabulary, device = table.shape[0], table.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (sum(lengths),), generator=generator, device="cpu").to(device)
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    if isinstance(padding, int):  # some models give padding no position
        tokens = torch.where(tokens == padding, (tokens + 1) % vocabulary, tokens)
    position_ids = torch.cat([torch.arange(n, device="cpu") for n in lengths]).to(device)
    cu_seqlens = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
    return ProbeRow(tokens, position_ids, cu_seqlens)


def documents_alone(backbone: nn.Module, row: ProbeRow) -> Tensor:
    """Hidden states of the row's documents, each run by itself, (T, d)."""
    parts = []
    for a, b in itertools.pairwise(row.cu_seqlens.tolist()):
        restart_rotary(backbone)
        parts.append(backbone(input_ids=row.tokens[None, a:b], use_cache=False).last_hidden_state[0])
    return torch.cat(parts)


def reads_ahead(model: PreTrainedModel, backbone: nn.Module, row: ProbeRow) -> bool:
    """True if hidden states of a document's first half depend on its second half.

    The gradient at the embeddings shows it: a causal model leaves it at zero in every precision. Comparing values
    would not suffice, because experts round differently when other tokens share a product.
    """
    begin, end = row.cu_seqlens[1:3].tolist()
    document, kept = row.tokens[None, begin:end].clone(), (end - begin) // 2

    def first_half() -> Tensor:
        states: Tensor = backbone(input_ids=document, use_cache=False).last_hidden_state[0, :kept]
        return states

    by_gradient = _depends(model, first_half, document.shape, slice(kept), slice(kept, None))
    if by_gradient is not None:
        return by_gradient
    vocabulary = int(model.config.get_text_config().vocab_size)
    before, document[0, -1] = first_half().detach(), (int(document[0, -1]) + 1) % vocabulary
    return relative_error(first_half().detach(), before) > tolerance(before.dtype, model)


def reads_across(model: PreTrainedModel, run: Callable[[], Tensor], row: ProbeRow) -> bool:
    """True if hidden states of the row's last document depend on the documents before it, by the same gradient.

    In half precision a weak dependence stays below the tolerance of values.

    Args:
        run: gives the hidden states of the row, (T, d), in one call of the model.
    """
    begin = int(row.cu_seqlens[-2])
    shape = torch.Size([1, len(row.tokens)])
    return _depends(model, lambda: run()[begin:], shape, slice(begin, None), slice(begin)) is True


def _depends(
    model: PreTrainedModel, run: Callable[[], Tensor], shape: torch.Size, own: slice, foreign: slice
) -> bool | None:
    """True if the states that `run` gives depend on the tokens `foreign`; the tokens have `shape`, (1, n).

    None if no call of the embeddings gave one line per token.
    """
    found = _embedding_gradients(model, run)
    turned = [g.transpose(0, 1) if g.shape[:2] == shape[::-1] else g for g in found]  # XLNet's rows are columns
    tokens = [gradient.double() for gradient in turned if gradient.shape[:2] == shape]
    if not tokens:
        return None
    here, there = (math.fsum(float(g[:, part].norm()) for g in tokens) for part in (own, foreign))
    return bool(there > 1e-5 * here)


def embedding_gradients(model: PreTrainedModel, run: Callable[[], Tensor]) -> Tensor:
    """(T, d) gradient of a fixed weighted sum of a row's hidden states, (T, d), at its embeddings.

    `run` may take several forwards, of documents in order.
    """
    return torch.cat([gradient.flatten(0, -2) for gradient in _embedding_gradients(model, run)])


def same_gradients(got: Tensor, expected: Tensor, model: PreTrainedModel) -> bool:
    """True if gradients of `model` are equal up to rounding."""
    return relative_error(got, expected) <= gradient_tolerance(got.dtype, model)


def gradient_tolerance(dtype: torch.dtype, model: PreTrainedModel) -> float:
    """Relative error of gradients up to which two computations count as equal."""
    # Each gradient sums over tokens and layers that were rounded on their own.
    return min(3 * tolerance(dtype, model), _MOST_GRADIENT_ERROR)


def _embedding_gradients(model: PreTrainedModel, run: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    """The gradient of a fixed weighted sum of the states that `run` gives, at the embeddings of each forward."""
    leaves: list[Tensor] = []

    def watch(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        watched: Tensor = leaves[-1].clone()  # a leaf could not be changed in place
        return watched

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            states = run()
    finally:
        handle.remove()
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(states)
    return torch.autograd.grad(states, leaves, weights, allow_unused=True, materialize_grads=True)


def token_errors(got: Tensor, expected: Tensor) -> Tensor:
    """(T,) relative error of each token's hidden states, in float64 on the CPU."""
    got, expected = got.double(), expected.double()
    errors: Tensor = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return errors.cpu()


def probe_result(run: Callable[[], Tensor], trained: Sequence[nn.Parameter]) -> ProbeResult:
    """Hidden states, and gradients of a fixed weighted sum of them. Does not change `.grad` of the Parameters."""
    with torch.set_grad_enabled(bool(trained)):
        states = run()
    if not trained or not states.requires_grad:
        return ProbeResult(states.detach(), torch.empty(0))
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(states)
    found = torch.autograd.grad(states, trained, weights, allow_unused=True, materialize_grads=True)
    return ProbeResult(states.detach(), torch.cat([gradient.flatten().cpu() for gradient in found]))


@contextmanager
def random_adapters(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Context in which every B of an adapter in use is random, so that the adapter changes the hidden states.

    Yields the trained A and B. On exit B has its earlier values, to the bit. Uses no global random generator.
    """
    fusions = {module: fusion_of(module) for module in model.modules()}
    adapters = {module: fusion for module, fusion in fusions.items() if isinstance(fusion, LowRankSum)}
    values = {id(adapter.lora_B): adapter.lora_B.detach().to("cpu", copy=True) for adapter in adapters.values()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for module, adapter in adapters.items():
                random = torch.randn(adapter.lora_B.shape, generator=generator).to(adapter.lora_B)
                size = adapter.scaling * _product_norm(random, adapter.lora_A)
                wanted = _UPDATE_SHARE * _norm(frozen_of(module).dense())
                adapter.lora_B.copy_(random * (wanted / size if size > 0.0 else 1.0))
        tensors = [tensor for adapter in adapters.values() for tensor in (adapter.lora_A, adapter.lora_B)]
        yield [tensor for tensor in tensors if tensor.requires_grad]
    finally:
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.lora_B.copy_(values[id(adapter.lora_B)])


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, in float64."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def tolerance(dtype: torch.dtype, model: PreTrainedModel) -> float:
    """Relative error of hidden states up to which two computations count as equal.

    Far above the rounding of a deep model, far below the effect of one foreign document (about 1).
    """
    rounding = 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
    return max([rounding, *(form.forward_tolerance or 0.0 for form in formats_in(model))])


def _product_norm(B: Tensor, A: Tensor) -> float:
    """|B A|, by the Gram matrices of both factors, which are (r, r)."""
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0.0).sqrt())


def _norm(weight: Tensor) -> float:
    """Frobenius norm, summed in float32 at least, without a copy of the weight."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return float(torch.linalg.vector_norm(weight, dtype=dtype))
