"""Stacked layers compute what the layers compute one by one, in any order and however their weights are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratune.config import LoraConfig
from loratune.fused.stacking import Copies, can_stack, masters_of, of_one_form, projection_of
from loratune.lora.inject import attach
from loratune.ops.low_rank import GradientOperands, gradients_of
from loratune.precision import nf4
from loratune.precision.fp8 import quantise as to_fp8
from loratune.precision.linear import quantise_linears


class Maps(nn.Module):
    """Linear maps of one input of width 64: plain, with a bias, two in one weight (packed), and transposed (conv)."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for index, kind in enumerate(kinds):
            made = {
                "plain": lambda: nn.Linear(64, 48, bias=False),
                "bias": lambda: nn.Linear(64, 32),
                "packed": lambda: nn.Linear(64, 2 * 48, bias=False),
                "conv": lambda: Conv1D(32, 64),
            }[kind]()
            if kind == "conv":
                nn.init.normal_(made.bias)
            self.add_module(f"{kind}{index}", made)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.children()], -1)


def adapted(kinds: tuple[str, ...], adapted_kinds: str) -> Maps:
    model = Maps(kinds).double()
    targets = [name for name, _ in model.named_children() if name.startswith(tuple(adapted_kinds.split()))]
    attach(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False), name="a", seed=0)
    return model


@pytest.mark.parametrize(
    "kinds",
    [("plain", "bias", "plain"), ("packed",), ("packed", "bias"), ("conv",), ("conv", "conv"), ("bias", "conv")],
)
@pytest.mark.parametrize("adapted_kinds", ["plain bias packed conv", "bias packed conv"])
def test_output_and_gradients_are_those_of_the_layers(kinds: tuple[str, ...], adapted_kinds: str) -> None:
    model = adapted(kinds, adapted_kinds)
    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, model(x).shape[1], dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    d_x, *d_parameters = torch.autograd.grad(y, [x, *parameters], dy)

    layers, copies = list(model.children()), Copies()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(map(can_stack, layers))
    assert of_one_form(layers)
    projection = projection_of(layers, copies)
    copies.refresh()
    with torch.no_grad():
        found, low_rank = projection.forward(x.detach())
        backward = projection.backward(dy)
        d_input = backward.d_input()
        operands = backward.d_adapters(x.detach(), low_rank)
        assert isinstance(operands, GradientOperands)
        (d_masters,) = gradients_of([operands])
    torch.testing.assert_close(found, y.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d_input, d_x, rtol=1e-10, atol=1e-10)
    expected = dict(zip(map(id, parameters), d_parameters, strict=True))
    for master, gradient in zip(masters_of(layers), d_masters, strict=True):
        torch.testing.assert_close(gradient, expected[id(master)], rtol=1e-10, atol=1e-10)
    copies.end()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.untyped_storage().nbytes() == p.nbytes
        assert p.is_contiguous()


def test_layers_of_different_forms_are_not_stacked() -> None:
    first, second = Maps(("plain", "plain")), Maps(("plain", "plain"))
    quantise_linears(first, nf4.quantise)
    quantise_linears(second, to_fp8)
    mixed = [next(first.children()), next(second.children()), next(Maps(("plain",)).children())]
    assert all(map(can_stack, mixed))
    assert of_one_form(list(first.children()))
    assert not of_one_form(mixed[:2])
    assert not of_one_form(mixed[1:])
