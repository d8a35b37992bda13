"""One layer: it computes the same as its base until it holds an adapter, and again afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from loratune.lora.linear import LoraLinear


def _layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(12, 8, bias=bias).to(dtype).requires_grad_(False)


def _adapted(base: nn.Linear, r: int = 3, std: float = 1.0) -> LoraLinear:
    generator = torch.Generator().manual_seed(1)
    A, B = (torch.randn(shape, generator=generator) * std for shape in ((r, 12), (8, r)))
    layer = LoraLinear.from_base(base)
    layer.hold(nn.Parameter(A), nn.Parameter(B), 0.5, 0.0)
    return layer


def _x() -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(2))


def test_holds_the_same_parameters_and_is_a_linear() -> None:
    base = _layer()
    layer = LoraLinear.from_base(base)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer.to_base() is base


@pytest.mark.parametrize("bias", [True, False])
def test_without_an_adapter_it_computes_the_same_bits(bias: bool) -> None:
    base = _layer(bias=bias)
    layer = LoraLinear.from_base(base)
    assert torch.equal(layer(_x()), base(_x()))


def test_with_an_adapter_it_computes_with_w_plus_delta() -> None:
    base = _layer()
    layer = _adapted(base)
    expected = _x() @ (base.weight + 0.5 * layer.lora_B @ layer.lora_A).T + base.bias
    torch.testing.assert_close(layer(_x()), expected)
    torch.testing.assert_close(layer.delta(), (0.5 * layer.lora_B @ layer.lora_A).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_adds_the_delta_rounded_once_and_unmerge_gives_back_the_bits(dtype: torch.dtype) -> None:
    base = _layer(dtype)
    before = base.weight.clone()
    layer = _adapted(base)
    delta = layer.delta()
    layer.merge()
    # Half a unit in the last place of the weight's dtype, plus float32's own rounding on the way.
    exact = before.double() + delta.double()
    error = (layer.weight.double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()
    assert layer.lora_A is None
    assert layer.weight is base.weight
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training() -> None:
    base = _layer()
    layer = _adapted(base)
    layer.lora_dropout = 0.5
    still = layer.eval()(_x())
    layer.train()
    runs = torch.stack([layer(_x()) for _ in range(2000)])
    assert not torch.equal(runs[0], runs[1])
    # Unbiased: the mean over n runs is within 5 standard errors of the value without dropout.
    assert ((runs.mean(0) - still).abs() <= 5 * runs.std(0) / 2000**0.5 + 1e-5).all()
    layer.release()
    assert torch.equal(layer(_x()), base(_x()))


def test_hooks_of_the_original_keep_working() -> None:
    base = _layer()
    seen: list[torch.Size] = []
    handle = base.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer = LoraLinear.from_base(base)
    layer(_x())
    handle.remove()
    layer(_x())
    assert seen == [torch.Size([5, 8])]


def test_original_gets_parameters_that_were_replaced_meanwhile() -> None:
    base = _layer()
    layer = LoraLinear.from_base(base)
    layer.weight = nn.Parameter(torch.zeros(8, 12))
    assert layer.to_base().weight is layer.weight


def test_a_copy_is_independent() -> None:
    layer = _adapted(_layer())
    other = copy.deepcopy(layer)
    expected = layer(_x())
    other.merge()
    assert torch.equal(layer(_x()), expected)
    assert other.to_base() is not layer.to_base()


def test_repr_says_the_rank() -> None:
    assert "rank=3" in repr(_adapted(_layer()))
