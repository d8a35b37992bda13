"""An adapted layer and the variant of LoRA that it computes: the two halves of an adapter's work at one layer.

    W' = W + scaling · B A        A: (r, d_in)    B: (d_out, r)    W frozen

`LoraLayer` knows the layer: how the base computes, how its weight is stored, how an update is merged. There is one
subclass for each kind of layer (`lora.linear`, `lora.layers`). `LoraVariant` knows the adapter: which tensors it has,
their initial values and their formula. Plain LoRA is the base class; `loratune.tables.VARIANTS` lists the others.
Kinds and variants combine freely, so a new variant does not touch the kinds.

A layer holds only the adapter in use. Switching re-points its tensors. With no adapter in use, the layer computes the
same bits as its base. Adapter names never reach a layer.

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.lora.contract import NO_ADAPTER, AdaptedLayer, Fusion, LowRankSum, defines_last
from loratune.ops.dropout import drop
from loratune.ops.state import ForwardState


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an adapter at one layer."""

    key: str
    """Its name in PEFT's files, after the layer's path and a dot."""
    shape: tuple[int, ...]


class LoraVariant:
    """Plain LoRA, and the base class of its variants. Stateless: layers hold the tensors.

    A variant overrides the methods in which it differs. If it overrides `tensors`, `forward` or `delta`, it is no
    longer a low-rank sum unless its class sets `low_rank_sum` again. Such a variant runs as modules, cannot join a
    bank, and cannot be added to other adapters.
    """

    settings: ClassVar[type[LoraConfig]] = LoraConfig
    """Configuration class with the field that chooses the variant."""
    low_rank_sum: ClassVar[bool] = True
    """True if the layer computes y = x Wᵀ + b + scaling · drop(x) Aᵀ Bᵀ."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.low_rank_sum = cls.low_rank_sum and all(
            defines_last(cls, "low_rank_sum", method) for method in ("tensors", "forward", "delta")
        )

    def refusal(self, kind: type[LoraLayer], base: nn.Module) -> str | None:
        """The reason why `base`, a layer of `kind`, cannot have this variant, or None."""
        if self.low_rank_sum or kind.is_linear:
            return None
        return f"{type(self).__name__} is for linear layers"

    def tensors(self, kind: type[LoraLayer], d_in: int, d_out: int, r: int) -> dict[str, TensorSpec]:
        """Attribute name -> tensor. `lora_A` and `lora_B` come first; every variant has them."""
        key_A, key_B = kind.keys
        return {"lora_A": TensorSpec(key_A, (r, d_in)), "lora_B": TensorSpec(key_B, (d_out, r))}

    def initialise(
        self,
        tensors: Mapping[str, Tensor],
        base: nn.Module,
        kind: type[LoraLayer],
        config: LoraConfig,
        scaling: float,
        generator: torch.Generator,
    ) -> None:
        """Fills new tensors, which are on the CPU, in place. All randomness comes from `generator`.

        `scaling` is the layer's factor of B A.
        """
        kind.initialise(tensors["lora_A"], tensors["lora_B"], config.init_lora_weights, generator)

    def forward(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """Output of `layer` with its adapter; x as in the base layer's forward."""
        return layer.lora_forward(x)

    def rank_of(self, lora_A: Tensor) -> int:
        """Rank of the adapter whose tensor `lora_A` is given."""
        return lora_A.shape[0]

    def pattern_paths(self, path: str) -> tuple[str, ...]:
        """Paths that keys of rank_pattern and alpha_pattern match for the layer at `path`."""
        return (path,)

    def delta(self, layer: LoraLayer) -> Tensor:
        """The update of W, (d_out, d_in), that is equivalent to `forward` without dropout; in the adapter's dtype."""
        return layer.low_rank_delta()


PLAIN = LoraVariant()
"""Plain LoRA."""


class LoraLayer(AdaptedLayer):
    """A layer that replaces `base` and computes base and adapter. Subclasses: one for each kind of base layer."""

    keys: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    """Names of A and B in PEFT's files, after the layer's path and a dot."""
    weight_name: ClassVar[str] = "weight"
    """Name of the Parameter that the update is for."""
    parts: ClassVar[Mapping[str, type[LoraLayer]]] = {}
    """Name of a child -> kind, for children that belong to every adapter of this layer."""
    is_part: ClassVar[bool] = False
    """True if target_modules cannot select the layer: it is adapted together with its parent, or is experts."""
    is_linear: ClassVar[bool] = True
    """True for y = x Wᵀ + b; False for a table that is looked up, a convolution, a weight that others read."""
    scaling_factor: ClassVar[float] = 1.0
    """Factor of lora_alpha / r that PEFT applies to such layers, and so do we."""
    has_dropout: ClassVar[bool] = True
    """False if the input of the low-rank pair cannot be dropped."""
    weight_is_parameter: ClassVar[bool] = True
    """False if the frozen weight is not a Parameter, and so is never tied to another."""
    is_lookup: ClassVar[bool] = False
    """True if the input is an index and not a vector of activations."""
    transposed: ClassVar[bool] = False
    """True if `weight` is (d_in, d_out), so that B A is added to it transposed."""
    fan_in_fan_out: ClassVar[bool] = False
    """Value of PEFT's field of that name for such layers."""

    weight: Tensor
    lora_A: nn.Parameter | None
    """(r, d_in), or None when no adapter is in use here."""
    lora_B: nn.Parameter | None
    """(d_out, r), or None when no adapter is in use here."""
    variant: LoraVariant = PLAIN
    """Variant of the adapter in use."""
    scaling: float
    """Factor of B A: lora_alpha / r, or lora_alpha / √r with rsLoRA."""
    lora_dropout: float
    """Probability of zeroing an element of the adapter's input while training."""
    salt: int = 0
    """Number of the layer in the dropout hash, so that layers have different masks; see `ops.dropout`."""
    state: ForwardState
    """State of the packed forward that runs this layer; outside of one, the layer's own state."""
    _unmerged: Tensor | None
    """The weight before `merge`, on the CPU."""

    @classmethod
    def from_base(cls, base: nn.Module) -> Self:
        """A replacement for `base` with the same Parameters, buffers, hooks and attributes, holding no adapter."""
        layer = super().from_base(base)
        layer._parameters |= {"lora_A": None, "lora_B": None}
        # Written to the dict: `nn.Module.__setattr__` takes ten times as long, and there are hundreds of layers.
        layer.__dict__.update(_unmerged=None, state=ForwardState(), variant=PLAIN, scaling=0.0, lora_dropout=0.0)
        return layer

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of a base layer of this kind."""
        raise NotImplementedError

    @staticmethod
    def refusal(base: nn.Module, r: int) -> str | None:
        """The reason why an adapter of rank `r` does not fit `base`, or None."""
        return None

    @classmethod
    def init_refusal(cls, init: bool | str, r: int) -> str | None:
        """The reason why initial values of this name do not fit rank `r` of such layers, or None."""
        if init != "orthogonal":
            return None
        if not cls.is_linear:
            return 'init_lora_weights "orthogonal" is for linear layers'
        return f'init_lora_weights "orthogonal" needs an even rank, and its rank is {r}' if r % 2 else None

    @staticmethod
    def merge_refusal(base: nn.Module) -> str | None:
        """The reason why adapters of `base` are no update of its weight, or None."""
        return None

    @staticmethod
    def shapes(base: nn.Module, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
        """Attribute name -> shape in memory of a variant's tensors at `base`."""
        return {name: spec.shape for name, spec in specs.items()}

    @staticmethod
    def shapes_in_files(base: nn.Module, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
        """Attribute name -> shape in PEFT's files, for tensors whose shape differs from that in memory."""
        return {}

    @classmethod
    def path_in_files(cls, path: str) -> str:
        """Path of the layer in the keys of PEFT's files."""
        return path

    @staticmethod
    def initialise(lora_A: Tensor, lora_B: Tensor, init: bool | str, generator: torch.Generator) -> None:
        """Fills A and B in place.

        A is Kaiming-uniform with a = √5, which is U(-1/√d_in, 1/√d_in), or normal with standard deviation 1/r for
        "gaussian". B is zero, or U(-1/√r, 1/√r) for False. For "orthogonal" see `_orthogonal`.
        Source: the reference implementation of arXiv:2106.09685.
        """
        r, d_in = lora_A.shape
        if init == "orthogonal":
            _orthogonal(lora_A, lora_B, generator)
            return
        if init == "gaussian":
            lora_A.normal_(0.0, 1.0 / r, generator=generator)
        else:
            lora_A.uniform_(-1.0 / math.sqrt(d_in), 1.0 / math.sqrt(d_in), generator=generator)
        if init is False:
            lora_B.uniform_(-1.0 / math.sqrt(r), 1.0 / math.sqrt(r), generator=generator)
        else:
            lora_B.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out); an embedding takes ids, (...)."""
        if self.lora_A is None:
            return self.base_forward(input)
        return self.variant.forward(self, input)

    def fusion(self) -> Fusion:
        """The low-rank sum of the adapter in use."""
        if not self.is_linear:
            return f"a {type(self).__name__} is not a linear map of activations"
        if self.lora_A is None or self.lora_B is None:
            return NO_ADAPTER
        if not self.variant.low_rank_sum:
            return f"{type(self.variant).__name__} is not a low-rank sum"
        return LowRankSum(self.lora_A, self.lora_B, self.scaling, self.lora_dropout, self.salt)

    def base_forward(self, x: Tensor) -> Tensor:
        """Output of the base layer, without an adapter."""
        raise NotImplementedError

    def lora_forward(self, x: Tensor) -> Tensor:
        """Output of plain LoRA: `base_forward` plus `low_rank`, in one operation where that is possible."""
        raise NotImplementedError

    def low_rank(self, x: Tensor) -> Tensor:
        """scaling · drop(x) Aᵀ Bᵀ of a linear layer; (..., d_in) -> (..., d_out). Variants build on it."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        rows = x.reshape(-1, x.shape[-1])
        if self.training and self.lora_dropout > 0.0:
            row = self.state.dropout_row
            rows, _ = drop(rows, self.lora_dropout, self.salt, row)
        out = (rows @ self.lora_A.to(x.dtype).T) @ self.lora_B.to(x.dtype).T * self.scaling
        return out.view(*x.shape[:-1], -1)

    @property
    def own_weight(self) -> Tensor:
        """The frozen weight, without an update."""
        weight = self._parameters[self.weight_name]
        assert weight is not None
        return weight

    def low_rank_delta(self) -> Tensor:
        """scaling · B A, (d_out, d_in), in the adapter's dtype."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        return (self.lora_B @ self.lora_A).mul_(self.scaling)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update of the adapter in use, in the shape of `weight` and the dtype of the adapter."""
        delta = self.variant.delta(self)
        return delta.T if self.transposed else delta

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight that `merge` would leave: weight plus `delta`, rounded once to the weight's dtype."""
        return self.sum_with(self.own_weight).to(self.own_weight.dtype)

    @torch.no_grad()
    def merge(self, *, reversible: bool = True) -> Tensor:
        """Adds `delta` to the weight in place, rounded once to its dtype, and releases the adapter.

        Returns: the merged weight.

        Memory: `unmerge` must restore the exact bits, which no arithmetic on the rounded sum can. So the weight
        before the merge is saved in CPU memory; reversible=False saves nothing.
        """
        weight, tensor = self.own_weight, self.lora_A
        if reversible:
            self._unmerged = weight.detach().to("cpu", copy=True)
        if weight.dim() == 2 and tensor is not None and tensor.dtype == weight.dtype and self.variant.low_rank_sum:
            weight.addmm_(*self._factors(), alpha=self.scaling)
        else:
            weight.copy_(self.merged_weight())
        self.release()
        return weight

    @torch.no_grad()
    def sum_is_bounded(self) -> bool:
        """True if the merged weight is finite for certain, found without computing it; False says nothing.

        |B A| <= r max|B| max|A|, so one reading of each tensor is enough.
        """
        if self.lora_A is None or self.lora_B is None or not (self.weight_is_parameter and self.variant.low_rank_sum):
            return False
        weight = self.own_weight
        if weight.numel() == 0:
            return False
        base, factor_A, factor_B = (
            torch.stack(tensor.aminmax()).abs().max().double() for tensor in (weight, self.lora_A, self.lora_B)
        )
        bound = base + abs(self.scaling) * self.lora_A.shape[0] * factor_A * factor_B
        return bool(bound < torch.finfo(weight.dtype).max / 2)  # False for NaN

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the weight from before `merge`, to the bit."""
        assert self._unmerged is not None
        self.own_weight.copy_(self._unmerged)
        self._unmerged = None

    def sum_with(self, weight: Tensor) -> Tensor:
        """`weight` plus `delta`, in the adapter's dtype. `weight` has the shape of the layer's own weight."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        weight = weight.to(self.lora_A.dtype)
        if not self.variant.low_rank_sum:
            return weight + self.delta()
        return torch.addmm(weight.flatten(1), *self._factors(), alpha=self.scaling).view(weight.shape)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Two matrices whose product, times `scaling`, is `delta` of a low-rank sum."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        return (self.lora_A.T, self.lora_B.T) if self.transposed else (self.lora_B, self.lora_A)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `cuda`, `half` and so on: the adapter in use follows the base and keeps its masters' dtype."""
        before = {name: tensor.data for name, tensor in self.adapter_tensors().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, after in self.adapter_tensors().items():
            if after.dtype != before[name].dtype:  # made from the values before the cast, which are not rounded
                master = torch.float64 if after.dtype == torch.float64 else torch.float32
                after.data = before[name].to(after.device, master)
        return self

    def expect(self, names: Iterable[str]) -> None:
        """Registers the names of tensors that an adapter may hold here, as None."""
        for name in names:
            self._parameters.setdefault(name, None)

    def tensor_names(self) -> list[str]:
        """Names of all tensors that adapters may hold here, in use or not."""
        own = self._base[0]._parameters
        return [name for name in self._parameters if name not in own]

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Attribute name -> tensor of the adapter in use; empty without one."""
        held = {name: self._parameters[name] for name in self.tensor_names()}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def rank(self) -> int:
        """Rank of the adapter in use, 0 without one."""
        return 0 if self.lora_A is None else self.variant.rank_of(self.lora_A)

    def hold(self, lora_A: nn.Parameter, lora_B: nn.Parameter, scaling: float, dropout: float) -> None:
        """Makes a plain adapter the one in use, from its tensors A, (r, d_in), and B, (d_out, r)."""
        self.release()
        self.lora_A, self.lora_B = lora_A, lora_B
        self.scaling, self.lora_dropout = scaling, dropout

    def release(self) -> None:
        """Removes the adapter from the layer, which then computes the same bits as its base."""
        for name in self.tensor_names():
            self._parameters[name] = None
        self.variant, self.scaling, self.lora_dropout = PLAIN, 0.0, 0.0

    def extra_repr(self) -> str:
        """Text of the base layer, and the rank of the adapter in use."""
        rank = "no adapter" if self.lora_A is None else f"rank={self.rank}"
        return f"{self._base[0].extra_repr()}, {rank}"

    def _plain_arguments(self) -> tuple[Tensor, Tensor, float, float, int, ForwardState | None]:
        """The adapter's arguments of `ops.lora.lora_linear`."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        dropout = self.lora_dropout if self.training else 0.0
        return self.lora_A, self.lora_B, self.scaling, dropout, self.salt, self.state


def _orthogonal(lora_A: Tensor, lora_B: Tensor, generator: torch.Generator) -> None:
    """Fills A and B with values of standard deviation about 0.07, such that B A is zero to rounding.

    The rows of an orthogonal matrix (r, r) are dealt to two halves. The rows of B are random sums of the one half,
    the columns of A of the other. Rank r is even. Source: PEFT's `init_lora_weights="orthogonal"`.
    """
    (r, d_in), d_out = lora_A.shape, lora_B.shape[0]
    square = torch.randn(r, r, generator=generator, dtype=torch.float64, device="cpu")
    rows = torch.linalg.qr(square).Q.to(lora_A.dtype)
    for tensor, half, count in ((lora_A.T, rows[0::2], d_in), (lora_B, rows[1::2], d_out)):
        drawn = torch.randn(count, r // 2, generator=generator, dtype=lora_A.dtype, device="cpu")
        tensor.copy_(drawn @ half / 10.0)


@contextmanager
def running_with(model: nn.Module, state: ForwardState) -> Iterator[None]:
    """Gives `state` to the adapter layers of `model`, and their previous state back on exit."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer.state for layer in layers]
    for layer in layers:
        layer.state = state
    try:
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer.state = earlier
