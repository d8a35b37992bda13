"""Only a layer that declares itself a low-rank sum is computed by fused layers; all others run as modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratune.base.forward import fuse, prepare
from loratune.config import LoraConfig
from loratune.lora.contract import NO_ADAPTER, BankSum, LowRankSum, adapter_tensors_of, fusion_of, rank_of
from loratune.lora.inject import activate, attach
from loratune.lora.layers import LoraEmbedding
from loratune.lora.linear import LoraLinear
from loratune.many.bank import Bank
from tests.conftest import build


class _OwnForward(LoraLinear):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


class _DeclaredAgain(_OwnForward):
    def forward(self, input: Tensor) -> Tensor:
        return LoraLinear.forward(self, input)

    fusion = LoraLinear.fusion


class _Mixin:
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


class _Mixed(_Mixin, LoraLinear):
    pass


class _Renamed(LoraLinear):
    pass


def _held(kind: type[LoraLinear]) -> LoraLinear:
    layer = kind.from_base(nn.Linear(6, 4))
    layer.hold(nn.Parameter(torch.ones(2, 6)), nn.Parameter(torch.ones(4, 2)), 0.5, 0.1)
    return layer


@pytest.mark.parametrize("kind", [LoraLinear, _DeclaredAgain, _Renamed])
def test_a_declared_sum_is_offered(kind: type[LoraLinear]) -> None:
    layer = _held(kind)
    assert fusion_of(layer) == LowRankSum(layer.lora_A, layer.lora_B, 0.5, 0.1, 0)
    assert rank_of(layer) == 2
    assert adapter_tensors_of(layer) == {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    layer.release()
    assert fusion_of(layer) is NO_ADAPTER
    assert rank_of(layer) == 0
    assert not adapter_tensors_of(layer)


@pytest.mark.parametrize("kind", [_OwnForward, _Mixed])
def test_another_forward_withdraws_the_declaration(kind: type[LoraLinear]) -> None:
    assert "overrides forward" in str(fusion_of(_held(kind)))


def test_a_forward_replaced_on_the_instance_withdraws_it_too() -> None:
    layer = _held(LoraLinear)
    layer.forward = lambda x: x
    assert "replaced on the instance" in str(fusion_of(layer))


@pytest.mark.parametrize("base", [nn.Linear(6, 4), Conv1D(4, 6)])
def test_a_plain_layer_has_no_adapter(base: nn.Module) -> None:
    assert fusion_of(base) is NO_ADAPTER
    assert rank_of(base) == 0


@pytest.mark.parametrize("other", [nn.LayerNorm(4), LoraEmbedding.from_base(nn.Embedding(4, 4)), None])
def test_other_modules_give_a_reason(other: object) -> None:
    assert isinstance(fusion_of(other), str)


def test_layers_of_a_bank_offer_the_sum_of_the_slots() -> None:
    model = build("llama")
    bank = Bank.attach(model, [LoraConfig(r=2, target_modules=["q_proj"])], slots=1)
    offer = fusion_of(model.model.layers[0].self_attn.q_proj)
    assert isinstance(offer, BankSum)
    assert offer.pool is bank.pool


def test_a_model_with_an_undeclared_layer_is_not_fused() -> None:
    model = build("llama")
    attach(model, LoraConfig(r=2, target_modules=["up_proj"]))
    assert fuse(prepare(model))
    layer = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = other = _OwnForward.from_base(layer.to_base())
    other.hold(layer.lora_A, layer.lora_B, layer.scaling, 0.0)
    assert not fuse(prepare(model))
    activate(model, None)
