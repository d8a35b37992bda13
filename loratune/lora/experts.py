"""Adapters of experts whose weights are Parameters of three dimensions: one low-rank pair for each expert.

    W'_e = W_e + scaling · B_e A_e        A_e: (r, d_in)    B_e: (d_out, r)    for each expert e

One `LoraExperts` replaces an experts module and computes all its projections with `ops.experts`. An adapter may have
pairs for one projection or both. Its tensors have the layout of PEFT's files: A is (E r, d_in) with the expert
slowest, B is (d_out, r E) with the expert fastest. PEFT nests one wrapper per Parameter in the order of the module,
and keys do not name the Parameter: with two, the first has the keys `base_layer.lora_*` and the second `lora_*`.

Format: `ParamWrapper` of PEFT 0.21, chosen by its field `target_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.lora.expressions import fits_end
from loratune.lora.layer import LoraLayer, LoraVariant, TensorSpec
from loratune.ops.experts import ExpertPair
from loratune.ops.frozen import DenseWeight
from loratune.precision import experts
from loratune.precision.experts import ExpertForm, HeldExperts, QuantisedExperts

_TRIAL_TOKENS = 3


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """One adapted Parameter of an experts module."""

    name: str
    experts: int
    d_in: int
    d_out: int
    r: int
    """Rank of each expert's pair."""
    scaling: float

    @property
    def parameters(self) -> int:
        """Number of values that train."""
        return self.experts * self.r * (self.d_in + self.d_out)


class ExpertPairs(LoraVariant):
    """Plain LoRA on the Parameters of one experts module, which are given in the order of the module."""

    def __init__(self, parameters: Sequence[ExpertParameter]) -> None:
        self.parameters = tuple(parameters)

    def tensors(self, kind: type[LoraLayer], d_in: int, d_out: int, r: int) -> dict[str, TensorSpec]:
        """Attribute name -> tensor. The last Parameter's are `lora_A` and `lora_B`, which come first."""
        found = {}
        for depth, parameter in enumerate(reversed(self.parameters)):
            key_A, key_B = (f"{'base_layer.' * depth}{key}" for key in kind.keys)
            name_A, name_B = self._names(parameter)
            found[name_A] = TensorSpec(key_A, (parameter.experts * parameter.r, parameter.d_in))
            found[name_B] = TensorSpec(key_B, (parameter.d_out, parameter.r * parameter.experts))
        return found

    def initialise(
        self,
        tensors: Mapping[str, Tensor],
        base: nn.Module,
        kind: type[LoraLayer],
        config: LoraConfig,
        scaling: float,
        generator: torch.Generator,
    ) -> None:
        """Fills each expert's pair as that of a linear layer of the same sides and rank."""
        for parameter in self.parameters:
            A, B = (tensors[name] for name in self._names(parameter))
            each_A, each_B = A.view(parameter.experts, parameter.r, -1), B.view(len(B), parameter.r, -1)
            for expert in range(parameter.experts):
                kind.initialise(each_A[expert], each_B[..., expert], config.init_lora_weights, generator)

    def rank_of(self, lora_A: Tensor) -> int:
        """Rank of the last Parameter's pairs."""
        return self.parameters[-1].r

    def pattern_paths(self, path: str) -> tuple[str, ...]:
        """Paths of the Parameters, which keys of rank_pattern and alpha_pattern match."""
        return tuple(f"{path}.{parameter.name}" for parameter in self.parameters)

    def pairs(self, layer: LoraLayer) -> dict[str, ExpertPair]:
        """Name of each adapted Parameter -> its pairs, from the tensors that `layer` holds."""
        found = {}
        for parameter in self.parameters:
            A, B = (layer._parameters[name] for name in self._names(parameter))
            assert A is not None
            assert B is not None
            found[parameter.name] = ExpertPair(A, B, parameter.scaling)
        return found

    def _names(self, parameter: ExpertParameter) -> tuple[str, str]:
        prefix = "" if parameter is self.parameters[-1] else f"{parameter.name}_"
        return f"{prefix}lora_A", f"{prefix}lora_B"


class LoraExperts(LoraLayer):
    """An experts module plus low-rank updates of its weights."""

    is_part = True
    is_linear = False
    weight_is_parameter = False
    has_dropout = False
    is_transposed: bool
    _before_merge: dict[str, Tensor] | None = None

    def forward(  # type: ignore[override]  # experts take their routing as well
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """(T, d) tokens, (T, k) experts and (T, k) factors -> (T, d)."""
        base = self._current_base()
        if self.lora_A is None:
            out: Tensor = base(hidden_states, top_k_index, top_k_weights)
            return out
        form = experts.form_of(base)
        assert isinstance(form, ExpertForm)
        found = self._pairs()
        pairs = found.get(form.up), found.get(form.down)
        return experts.experts_forward(base, hidden_states, top_k_index, top_k_weights, pairs)

    def _pairs(self) -> dict[str, ExpertPair]:
        assert isinstance(self.variant, ExpertPairs)
        return self.variant.pairs(self)

    def _current_base(self) -> nn.Module:
        """The base module with the Parameters that this layer has now, for example after a move to a GPU."""
        base = self._base[0]
        for name in base._parameters:
            base._parameters[name] = self._parameters[name]
        return base

    @torch.no_grad()
    def merge(self, *, reversible: bool = True) -> Tensor:
        """Adds the updates to the weights in place, expert by expert, rounded once to their dtype.

        Returns: the largest magnitude of each expert's merged weights, which is finite if all values are.
        """
        pairs = self._pairs()
        if reversible:
            self._before_merge = {name: self._weight(name).to("cpu", copy=True) for name in pairs}
        found = []
        for name, pair in pairs.items():
            weight = self._weight(name)
            for expert, total in enumerate(self._sums(weight, pair)):
                weight[expert].copy_(total)
                found.append(weight[expert].abs().amax())
        self.release()
        return torch.stack(found)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """As the result of `merge`, without a change."""
        weights = ((self._weight(name), pair) for name, pair in self._pairs().items())
        return torch.stack([t.to(w.dtype).abs().amax() for w, pair in weights for t in self._sums(w, pair)])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the weights from before `merge`, to the bit."""
        assert self._before_merge is not None
        for name, weight in self._before_merge.items():
            self._weight(name).copy_(weight)
        self._before_merge = None

    def _weight(self, name: str) -> Tensor:
        weight = self._parameters[name]
        assert weight is not None
        return weight.detach()

    def _sums(self, weight: Tensor, pair: ExpertPair) -> Iterator[Tensor]:
        """Each expert's weight plus its update, in the adapter's dtype and the shape of the weight."""
        experts = weight.shape[0]
        A = pair.lora_A.view(experts, -1, pair.lora_A.shape[1])
        B = pair.lora_B.view(pair.lora_B.shape[0], -1, experts)
        for expert in range(experts):
            left, right = (A[expert].T, B[..., expert].T) if self.is_transposed else (B[..., expert], A[expert])
            yield torch.addmm(weight[expert].to(A.dtype), left, right, alpha=pair.scaling)

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of the last projection."""
        form = experts.form_of(base)
        assert isinstance(form, ExpertForm)
        return experts.features(base, form, form.down)


class LoraQuantisedExperts(LoraExperts, QuantisedExperts):
    """Quantised experts plus low-rank updates. A merge makes the sums dense, as for `LoraQuantised`."""

    _held_before_merge: dict[str, HeldExperts] | None = None

    @torch.no_grad()
    def merge(self, *, reversible: bool = True) -> Tensor:
        """Replaces the weights by the dense sums. Returns: as `LoraExperts.merge`."""
        found = []
        if reversible:
            self._held_before_merge = dict(self.held)
        for name, pair in self._pairs().items():
            held = self.held[name]
            total = torch.stack(list(self._sums(self._weight(name), pair))).to(held.frozen.dtype)
            frozen, transposed = DenseWeight(total.flatten(0, 1)), bool(self.is_transposed)
            self.held[name] = replace(held, frozen=frozen, transposed=transposed, as_in_module=True)
            found.append(total.abs().amax())
        self.release()
        return torch.stack(found)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the weights from before `merge`, to the bit."""
        assert self._held_before_merge is not None
        self.held.update(self._held_before_merge)
        self._held_before_merge = None

    def _weight(self, name: str) -> Tensor:
        return experts.dense_of(self.held[name])


def kind_of_experts(module: nn.Module) -> type[LoraExperts]:
    """The kind of layer that replaces an experts module."""
    return LoraQuantisedExperts if isinstance(module, QuantisedExperts) else LoraExperts


def why_not(module: nn.Module) -> str | None:
    """The reason why experts cannot have adapters, or None. Runs the module on a few tokens."""
    form = experts.form_of(module)
    if isinstance(form, str):
        return form
    if isinstance(module, LoraExperts | QuantisedExperts) or getattr(module, form.down).is_meta:
        return None
    with torch.device("cpu"):  # PyTorch's default, also where the caller has set another
        same = _computes_as_stated(module, form)
    return None if same else f"{type(module).__name__} computes another formula"


@torch.no_grad()
def _computes_as_stated(module: nn.Module, form: ExpertForm) -> bool:
    """True if a module's own forward equals `experts_forward`."""
    weight = getattr(module, form.down)
    width, _ = experts.features(module, form, form.up)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIAL_TOKENS, width, generator=generator).to(weight)
    index = torch.arange(2 * _TRIAL_TOKENS, device=weight.device).view(-1, 2) % form.experts
    factors = torch.rand(_TRIAL_TOKENS, 2, generator=generator).to(weight)
    try:
        expected = module(x, index, factors)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError):
        return False
    got = experts.experts_forward(module, x, index, factors)
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        return False
    error = (got.double() - expected.double()).norm()
    most = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.05
    return bool(error <= most * expected.double().norm())


def parameter_of(module: nn.Module, form: ExpertForm, name: str, path: str, config: LoraConfig) -> ExpertParameter:
    """The Parameter `name` of an experts module at `path`, with the rank and scaling that `config` gives it."""
    whole = f"{path}.{name}"
    ranks, alphas = config.rank_pattern.items(), config.alpha_pattern.items()
    r = next((value for key, value in ranks if fits_end("rank_pattern", key, whole)), config.r)
    alpha = next((value for key, value in alphas if fits_end("alpha_pattern", key, whole)), config.lora_alpha)
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    return ExpertParameter(name, form.experts, *experts.features(module, form, name), r, scaling)
