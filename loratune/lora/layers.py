"""Conv1D, embeddings and quantised layers with an adapter, and which layers of a model can be adapted.

A layer is adapted only if its replacement computes the same. A Linear subclass with its own forward, a sharded or
parametrised layer, and a layer whose parent reads its weight instead of calling it would be silently wrong. Each is
refused with the reason.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers.pytorch_utils import Conv1D

from loratune.errors import AdapterError
from loratune.lora.attention import LoraMultiheadAttention, LoraOutProjection, attention_kind
from loratune.lora.convolution import CONVOLUTIONS, convolution_kind
from loratune.lora.experts import LoraExperts
from loratune.lora.layer import LoraLayer
from loratune.lora.linear import LoraLinear
from loratune.ops.frozen import DenseWeight, FrozenWeight
from loratune.ops.lora import lora_linear
from loratune.precision.experts import ExpertForm, form_of
from loratune.precision.linear import QuantisedLinear


class Unadaptable(AdapterError):
    """No adapted layer computes the same as this base layer."""


class LoraConv1D(LoraLayer, Conv1D):  # type: ignore[misc]
    """transformers' Conv1D (GPT-2), a linear layer whose weight is (d_in, d_out), plus low-rank update."""

    transposed = True
    fan_in_fan_out = True

    def base_forward(self, x: Tensor) -> Tensor:
        """x W + b; (..., d_in) -> (..., d_out)."""
        out: Tensor = Conv1D.forward(self, x)
        return out

    def lora_forward(self, x: Tensor) -> Tensor:
        """`base_forward` plus the low-rank update."""
        return lora_linear(x, self.weight.T, self.bias, *self._plain_arguments())

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of a Conv1D."""
        assert isinstance(base, Conv1D)
        return base.nx, base.nf


class LoraEmbedding(LoraLayer, nn.Embedding):
    """An embedding table plus low-rank update: (W + scaling · (B A)ᵀ)[ids], times `embed_scale` where there is one.

    Here d_in is the vocabulary: A is (r, V), B is (d, r). Token ids cannot be dropped, so `lora_dropout` has no
    effect, as in PEFT.
    """

    keys = ("lora_embedding_A", "lora_embedding_B")
    is_lookup = True
    is_linear = False
    transposed = True

    def base_forward(self, x: Tensor) -> Tensor:
        """W[ids]; (...) int ids -> (..., d). Runs the base layer's own forward, which may scale the rows."""
        base = self._base[0]
        base._parameters["weight"] = self._parameters["weight"]
        out: Tensor = base.forward(x)
        return out

    def lora_forward(self, x: Tensor) -> Tensor:
        """`base_forward` plus the low-rank update."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        out = self.base_forward(x)
        low_rank = embedding(
            x, self.lora_A.T, padding_idx=self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )
        embed_scale = getattr(self, "embed_scale", None)
        if embed_scale is not None:
            low_rank = low_rank * embed_scale
        low_rank = low_rank.to(out.dtype).reshape(-1, low_rank.shape[-1])
        with torch.autocast(out.device.type, enabled=False):  # embeddings stay in the table's dtype under autocast
            rows = torch.addmm(
                out.reshape(-1, out.shape[-1]), low_rank, self.lora_B.to(out.dtype).T, alpha=self.scaling
            )
        return rows.view_as(out)

    @staticmethod
    def initialise(lora_A: Tensor, lora_B: Tensor, init: bool | str, generator: torch.Generator) -> None:
        """Fills A and B in place as PEFT does: B is normal; A is zero, or normal if `init` is False."""
        lora_B.normal_(generator=generator)
        if init is False:
            lora_A.normal_(generator=generator)
        else:
            lora_A.zero_()

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(vocabulary, d) of an embedding."""
        assert isinstance(base, nn.Embedding)
        return base.num_embeddings, base.embedding_dim


class LoraQuantised(LoraLayer, QuantisedLinear):
    """A `QuantisedLinear` plus low-rank update. The frozen weight stays quantised.

    A merge makes the sum dense, since rounding it to the codes would lose most of the update.
    """

    weight_is_parameter = False
    _before_merge: FrozenWeight | None = None

    def base_forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b; (..., d_in) -> (..., d_out)."""
        return QuantisedLinear.forward(self, x)

    def lora_forward(self, x: Tensor) -> Tensor:
        """`base_forward` plus the low-rank update."""
        return lora_linear(x, self.frozen, self.bias, *self._plain_arguments())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight that `merge` would leave, dense."""
        return self.sum_with(self.frozen.dense()).to(self.frozen.dtype)

    @torch.no_grad()
    def merge(self, *, reversible: bool = True) -> Tensor:
        """Replaces W by the dense W + `delta`, and releases the adapter. Returns the merged weight."""
        before, total = self.frozen, self.merged_weight()
        self._before_merge = before if reversible else None
        self.frozen = DenseWeight(total)
        self.release()
        return total

    def unmerge(self) -> None:
        """Restores the weight from before `merge`, to the bit."""
        assert self._before_merge is not None
        self.frozen, self._before_merge = self._before_merge, None

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of a `QuantisedLinear`."""
        assert isinstance(base, QuantisedLinear)
        return base.in_features, base.out_features


KINDS: tuple[type[LoraLayer], ...] = (
    LoraLinear,
    LoraQuantised,
    LoraConv1D,
    LoraEmbedding,
    *CONVOLUTIONS.values(),
    LoraMultiheadAttention,
    LoraOutProjection,
    LoraExperts,
)
"""Every kind of adapted layer."""

KEY_PAIRS: tuple[tuple[str, str], ...] = tuple({kind.keys: None for kind in KINDS})
"""Names of A and B in PEFT's files, after the layer's path and a dot, for every kind of layer."""

# Modules that read the weight of a child layer instead of calling the layer, always or in a fused kernel: an adapter
# there would be ignored without an error. Class name -> names of those layers.
_READ_BY_PARENT: dict[str, frozenset[str]] = {
    "TransformerEncoderLayer": frozenset({"linear1", "linear2"}),
    "MambaMixer": frozenset({"x_proj", "dt_proj", "out_proj"}),
    "FalconMambaMixer": frozenset({"x_proj", "dt_proj", "out_proj"}),
    "JambaMambaMixer": frozenset({"dt_proj"}),
    "Mamba2Mixer": frozenset({"out_proj"}),
    "BambaMixer": frozenset({"out_proj"}),
    "FalconH1Mixer": frozenset({"out_proj"}),
    "GraniteMoeHybridMambaLayer": frozenset({"out_proj"}),
    "NemotronHMamba2Mixer": frozenset({"out_proj"}),
    "Zamba2MambaMixer": frozenset({"out_proj"}),
    "WavLMAttention": frozenset({"q_proj", "k_proj", "v_proj", "out_proj"}),
    "MobileBertLMPredictionHead": frozenset({"decoder", "dense"}),
    "LongcatFlashTopkRouter": frozenset({"classifier"}),
}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kind_of(path: str, base: nn.Module, parent: nn.Module) -> type[LoraLayer]:
    """The kind of adapted layer that can replace `base`, which is found at `path` as a child of `parent`.

    Raises: Unadaptable: none computes the same; the message gives the reason.
    """
    if isinstance(base, LoraLayer) and not base.is_part:
        return type(base)
    found, why = _candidate(base)
    name = type(base).__name__
    weight = None if found is None else base._parameters.get(found.weight_name)
    if found is None:
        pass
    elif "forward" in vars(base):
        why = f"the forward of this {name} was replaced on the instance, for example by accelerate's device_map"
    elif found.weight_is_parameter and (type(weight) is not nn.Parameter or weight.dtype not in _FLOATS):
        why = f"the weight of this {name} is quantised, sharded or parametrised"
    elif isinstance(parent, nn.MultiheadAttention):
        why = "MultiheadAttention reads its weight instead of calling it; target the MultiheadAttention, which has it"
    elif path.rpartition(".")[2] in _READ_BY_PARENT.get(type(parent).__name__, ()):
        why = f"{type(parent).__name__} reads its weight instead of calling it, so that an adapter would be ignored"
    if why or found is None:
        raise Unadaptable(f'"{path}" cannot be adapted: {why}')
    return found


def is_linear(module: nn.Module) -> bool:
    """True for the layers that "all-linear" selects: Linear, Conv1D and quantised."""
    return isinstance(module, nn.Linear | Conv1D | QuantisedLinear)


def is_adaptable(module: nn.Module) -> bool:
    """True if adapters exist for layers of this kind."""
    return is_linear(module) or isinstance(module, (nn.Embedding, nn.MultiheadAttention, *CONVOLUTIONS))


def _candidate(base: nn.Module) -> tuple[type[LoraLayer] | None, str]:
    """(kind, "") or (None, reason)."""
    name = type(base).__name__
    if isinstance(base, nn.Linear):
        if type(base).forward is nn.Linear.forward or _computes_as(base, (3, 5), 3):
            return LoraLinear, ""
        return None, f"{name} is a Linear with a forward of its own that computes something else"
    if isinstance(base, QuantisedLinear):
        return LoraQuantised, ""
    if isinstance(base, Conv1D):
        if type(base).forward is Conv1D.forward:
            return LoraConv1D, ""
        return None, f"{name} is a Conv1D with a forward of its own"
    if isinstance(base, nn.Embedding):
        return _embedding_candidate(base)
    if isinstance(base, nn.MultiheadAttention):
        return attention_kind(base)
    if isinstance(base, tuple(CONVOLUTIONS)):
        kind = convolution_kind(base)
        return kind, "" if kind else f"{name} is a convolution with a forward of its own"
    if isinstance(form := form_of(base), ExpertForm):
        names = ", ".join(f'"{entry}"' for entry in form.names)
        return None, f"it is a {name}, whose weights are Parameters; name them in target_parameters: {names}"
    return None, (
        f"it is a {name}; adapters fit Linear, Conv1D (of transformers), Embedding, Conv1d, Conv2d, Conv3d and "
        "MultiheadAttention layers: name the layers inside it, or train it in full with modules_to_save"
    )


def _computes_as(base: nn.Linear, shape: tuple[int, int], bias: int) -> bool:
    """True if the forward of a Linear subclass is x Wᵀ + b, tried on small random weights (Falcon's is)."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(s, generator=generator, device="cpu") for s in (shape, (2, 4, shape[1])))
    trial = copy.copy(base)
    trial._parameters = dict(base._parameters) | {"weight": nn.Parameter(weight, requires_grad=False)}
    if base.bias is not None:
        trial._parameters["bias"] = nn.Parameter(torch.randn(bias, generator=generator, device="cpu"), False)
    expected = linear(x, weight, trial._parameters.get("bias"))
    try:
        got = type(base).forward(trial, x)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError):
        return False
    return isinstance(got, Tensor) and got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5)


def _embedding_candidate(base: nn.Embedding) -> tuple[type[LoraLayer] | None, str]:
    if base.max_norm is not None:
        return None, "an Embedding with max_norm changes its own weights in every forward"
    if type(base).forward is nn.Embedding.forward:
        return LoraEmbedding, ""
    scale = getattr(base, "embed_scale", None)
    if isinstance(scale, int | float) or (isinstance(scale, Tensor) and scale.numel() == 1):
        return LoraEmbedding, ""
    return None, f"{type(base).__name__} is an Embedding with a forward of its own"
