"""Conv1D and embeddings with an adapter equal their merged selves; layers that cannot be exact are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from loratune.errors import AdapterError
from loratune.lora.layer import LoraLayer
from loratune.lora.layers import LoraConv1D, LoraEmbedding, kind_of
from loratune.lora.linear import LoraLinear

_IDS = torch.tensor([[1, 4, 4], [0, 2, 9]])


def _adapted(base: nn.Module, seed: int = 0) -> LoraLayer:
    kind = kind_of("layer", base, nn.Module())
    d_in, d_out = kind.features(base)
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator) for shape in ((3, d_in), (d_out, 3)))
    layer = kind.from_base(base)
    layer.hold(nn.Parameter(A), nn.Parameter(B), 0.5, 0.0)
    return layer


_CASES: list[tuple[nn.Module, type[LoraLayer], Tensor]] = [
    (nn.Linear(6, 4), LoraLinear, torch.randn(2, 3, 6)),
    (Conv1D(4, 6), LoraConv1D, torch.randn(2, 3, 6)),
    (nn.Embedding(10, 6), LoraEmbedding, _IDS),
    (nn.Embedding(10, 6, padding_idx=0), LoraEmbedding, _IDS),
    (Gemma3TextScaledWordEmbedding(10, 6, 0, embed_scale=3.0), LoraEmbedding, _IDS),
    (FalconLinear(6, 4), LoraLinear, torch.randn(2, 3, 6)),
    (FalconLinear(6, 4, bias=False), LoraLinear, torch.randn(2, 3, 6)),
]


@pytest.mark.parametrize(("base", "kind", "x"), _CASES)
def test_adapter_equals_its_merged_weight(base: nn.Module, kind: type[LoraLayer], x: Tensor) -> None:
    plain, before = base(x), base.weight.clone()
    layer = _adapted(base)
    assert type(layer) is kind
    adapted = layer(x)
    assert not torch.allclose(adapted, plain)
    layer.merge()
    torch.testing.assert_close(layer(x), adapted)
    torch.testing.assert_close(layer.to_base()(x), adapted)
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize(("base", "kind", "x"), _CASES)
def test_a_caller_may_change_the_output_in_place(base: nn.Module, kind: type[LoraLayer], x: Tensor) -> None:
    """As with the base layer; Gemma 3n and RoCBert do so."""
    layer = _adapted(base.requires_grad_(False))
    A, B = layer.lora_A, layer.lora_B
    ours = layer(x)
    ours *= 2
    ours += 1
    gradients = torch.autograd.grad(ours.square().sum(), (A, B))
    expected = torch.autograd.grad((2 * layer(x) + 1).square().sum(), (A, B))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(("base", "kind", "x"), _CASES)
def test_gradients_of_a_and_b_are_those_of_the_sum(base: nn.Module, kind: type[LoraLayer], x: Tensor) -> None:
    layer = _adapted(base.requires_grad_(False))
    A, B = layer.lora_A, layer.lora_B
    ours = torch.autograd.grad(layer(x).square().sum(), (A, B))
    shifted = base.weight.detach() + (B @ A if kind is LoraLinear else (B @ A).T) * 0.5
    expected = torch.func.functional_call(base, {"weight": shifted}, (x,))
    theirs = torch.autograd.grad(expected.square().sum(), (A, B))
    if getattr(base, "padding_idx", None) is None:  # the padding token never trains, in neither
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        assert not ours[0][:, base.padding_idx].any()


def test_scaled_embedding_follows_its_model_to_another_dtype() -> None:
    layer = _adapted(Gemma3TextScaledWordEmbedding(10, 6, 0, embed_scale=3.0))
    expected = layer(_IDS)
    model = nn.Sequential(layer).to(torch.float64)
    torch.testing.assert_close(model(_IDS).float(), expected)
    assert model(_IDS).dtype == torch.float64


class _OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


class _OwnBias(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.bias


class _SameForward(nn.Linear):
    pass


class _NormedEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


def _parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def _quantised() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def _hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # as accelerate does
    return layer


@pytest.mark.parametrize(
    ("base", "parent", "why"),
    [
        (_OwnForward(4, 4), nn.Module(), "forward of its own"),
        (_OwnBias(4, 4), nn.Module(), "forward of its own"),
        (_NormedEmbedding(4, 4), nn.Module(), "forward of its own"),
        (nn.Embedding(4, 4, max_norm=1.0), nn.Module(), "max_norm"),
        (_parametrised(), nn.Module(), "parametri[sz]ed"),
        (_quantised(), nn.Module(), "quantised"),
        (_hooked(), nn.Module(), "replaced on the instance"),
        (nn.LayerNorm(4), nn.Module(), "it is a LayerNorm"),
        (nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1), "reads its weight"),
    ],
)
def test_layers_that_would_be_silently_wrong_are_refused(base: nn.Module, parent: nn.Module, why: str) -> None:
    leaf = "linear1" if isinstance(parent, nn.TransformerEncoderLayer) else "proj"
    with pytest.raises(AdapterError, match=why) as caught:
        kind_of(f"block.{leaf}", base, parent)
    assert f'"block.{leaf}"' in str(caught.value)


def test_out_proj_of_multihead_attention_is_refused() -> None:
    attention = nn.MultiheadAttention(4, 1)
    with pytest.raises(AdapterError, match="reads its weight"):
        kind_of("attention.out_proj", attention.out_proj, attention)


def test_subclass_without_a_forward_of_its_own_is_fine() -> None:
    assert kind_of("x", _SameForward(4, 4), nn.Module()) is LoraLinear
