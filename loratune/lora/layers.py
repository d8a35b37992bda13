"""Siblings of `LoraLinear` for transformers' Conv1D and for embeddings, and which layers can be adapted at all.

A layer is adapted only if standing in for it is exact. A Linear subclass with a forward of its own, a quantised or
parametrised layer, or a layer whose parent reads its weight instead of calling it would be silently wrong, so each
is refused with the reason.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers.pytorch_utils import Conv1D

from loratune.errors import AdapterError
from loratune.lora.contract import Fusion
from loratune.lora.linear import LoraLayer, LoraLinear
from loratune.ops.frozen import DenseWeight, FrozenWeight
from loratune.ops.lora import lora_linear
from loratune.precision.linear import QuantisedLinear


class Unadaptable(AdapterError):
    """No layer of ours can stand in for this one and compute the same."""


class LoraConv1D(LoraLayer, Conv1D):  # type: ignore[misc]
    """transformers' Conv1D (GPT-2), a Linear whose weight is (d_in, d_out), plus low-rank update."""

    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        if self.lora_A is None or self.lora_B is None:
            base_out: Tensor = Conv1D.forward(self, x)
            return base_out
        dropout = self.lora_dropout if self.training else 0.0
        adapter = self.lora_A, self.lora_B, self.scaling, dropout, self.salt
        return lora_linear(x, self.weight.T, self.bias, *adapter, self.state)

    fusion = LoraLayer.fusion

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

    transposed = True

    def forward(self, input: Tensor) -> Tensor:
        """(...) int ids -> (..., d)."""
        base = self._base[0]
        base._parameters["weight"] = self._parameters["weight"]
        out: Tensor = base.forward(input)
        if self.lora_A is None or self.lora_B is None:
            return out
        inner = embedding(
            input,
            self.lora_A.T,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )
        embed_scale = getattr(self, "embed_scale", None)
        if embed_scale is not None:
            inner = inner * embed_scale
        inner = inner.to(out.dtype).reshape(-1, inner.shape[-1])
        with torch.autocast(out.device.type, enabled=False):  # embeddings stay in the table's dtype under autocast
            rows = torch.addmm(out.reshape(-1, out.shape[-1]), inner, self.lora_B.to(out.dtype).T, alpha=self.scaling)
        return rows.view_as(out)

    def fusion(self) -> Fusion:
        """No linear map of activations: an embedding looks rows up."""
        return f"{type(self).__name__} is an embedding"

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(vocabulary, d) of an embedding."""
        assert isinstance(base, nn.Embedding)
        return base.num_embeddings, base.embedding_dim


class LoraQuantised(LoraLayer, QuantisedLinear):
    """A `QuantisedLinear` plus low-rank update: what the layer multiplies with stays as it is.

    A merge makes the sum dense, since rounding it to the codes would lose most of the update.
    """

    _before_merge: FrozenWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        if self.lora_A is None or self.lora_B is None:
            return QuantisedLinear.forward(self, input)
        dropout = self.lora_dropout if self.training else 0.0
        adapter = self.lora_A, self.lora_B, self.scaling, dropout, self.salt
        return lora_linear(input, self.frozen, self.bias, *adapter, self.state)

    fusion = LoraLayer.fusion

    @torch.no_grad()
    def merge(self, *, reversible: bool = True) -> None:
        """Puts W + `delta`, dense, in the place of W, and lets go of the adapter."""
        left, right = self._factors()
        before = self.frozen
        total = torch.addmm(before.dense().to(left.dtype), left, right, alpha=self.scaling)
        self._before_merge = before if reversible else None
        self.frozen = DenseWeight(total.to(before.dtype))
        self.release()

    def unmerge(self) -> None:
        """Puts back the weight of before `merge`, to the bit."""
        assert self._before_merge is not None
        self.frozen, self._before_merge = self._before_merge, None

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of a `QuantisedLinear`."""
        assert isinstance(base, QuantisedLinear)
        return base.in_features, base.out_features


# Modules that read the weight of a layer below them instead of calling it, always or in a fused kernel: an adapter
# there would be ignored without a word. Class name -> names of those layers.
_READ_BY_PARENT: dict[str, frozenset[str]] = {
    "MultiheadAttention": frozenset({"out_proj"}),
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


def layer_class(path: str, base: nn.Module, parent: nn.Module) -> type[LoraLayer]:
    """The class that can stand in for `base`, which is found at `path` as a child of `parent`.

    Raises: Unadaptable: no class can do so exactly; the message says why.
    """
    if isinstance(base, LoraLayer):
        return type(base)
    found, why = _candidate(base)
    kind = type(base).__name__
    weight = base._parameters.get("weight")
    if found is None:
        pass
    elif "forward" in vars(base):
        why = f"the forward of this {kind} was replaced on the instance, for example by accelerate's device_map"
    elif found is not LoraQuantised and (type(weight) is not nn.Parameter or weight.dtype not in _FLOATS):
        why = f"the weight of this {kind} is quantised, sharded or parametrised"
    elif path.rpartition(".")[2] in _READ_BY_PARENT.get(type(parent).__name__, ()):
        why = f"{type(parent).__name__} reads its weight instead of calling it, so that an adapter would be ignored"
    if why or found is None:
        raise Unadaptable(f'"{path}" cannot be adapted: {why}')
    return found


def _candidate(base: nn.Module) -> tuple[type[LoraLayer] | None, str]:
    """(class, "") or (None, why not)."""
    kind = type(base).__name__
    if isinstance(base, nn.Linear):
        if type(base).forward is nn.Linear.forward:
            return LoraLinear, ""
        return None, f"{kind} is a Linear with a forward of its own"
    if isinstance(base, QuantisedLinear):
        return LoraQuantised, ""
    if isinstance(base, Conv1D):
        if type(base).forward is Conv1D.forward:
            return LoraConv1D, ""
        return None, f"{kind} is a Conv1D with a forward of its own"
    if isinstance(base, nn.Embedding):
        return _embedding_candidate(base)
    return None, (
        f"it is a {kind}; adapters fit Linear, Conv1D (of transformers) and Embedding layers: "
        "name the layers inside it, or train it in full with modules_to_save"
    )


def _embedding_candidate(base: nn.Embedding) -> tuple[type[LoraLayer] | None, str]:
    if base.max_norm is not None:
        return None, "an Embedding with max_norm changes its own weights in every forward"
    if type(base).forward is nn.Embedding.forward:
        return LoraEmbedding, ""
    scale = getattr(base, "embed_scale", None)
    if isinstance(scale, int | float) or (isinstance(scale, Tensor) and scale.numel() == 1):
        return LoraEmbedding, ""
    return None, f"{type(base).__name__} is an Embedding with a forward of its own"
