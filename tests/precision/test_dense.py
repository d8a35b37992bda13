"""Augmented weights: Parameters keep their values, and one product computes the frozen and the low-rank part."""

from __future__ import annotations

import copy

import torch
from torch import nn

from loratune.base.forward import fuse, prepare
from loratune.lora.inject import merge
from loratune.ops.low_rank import gradients
from loratune.ops.projection import StackedAdapters
from loratune.precision.dense import DenseFormat, FrozenParameter, separate, stack_parameters
from tests.training.helpers import model_with_adapter


def weights():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(rows, 40), requires_grad=False) for rows in (48, 16, 16)]


def test_parameters_become_views_with_the_values_that_they_had():
    members = weights()
    values = [weight.detach().clone() for weight in members]
    matrix = stack_parameters([FrozenParameter(member) for member in members], 70).matrix
    assert matrix.shape == (80 + 128, 40 + 128)
    for weight, value in zip(members, values, strict=True):
        assert torch.equal(weight, value)
        assert weight.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
    assert torch.equal(matrix[:80, :40], torch.cat(values))
    assert not matrix[80:].any()
    assert not matrix[:, 40:].any()
    separate(members)
    matrix.zero_()
    assert all(weight.is_contiguous() for weight in members)
    assert all(torch.equal(weight, value) for weight, value in zip(members, values, strict=True))


def test_a_projection_computes_the_same_with_padding_columns_and_without():
    members = [nn.Parameter(weight.double(), requires_grad=False) for weight in weights()]
    weight, bias = stack_parameters([FrozenParameter(member) for member in members], 5), torch.randn(80).double()
    made = DenseFormat().project(weight, bias, StackedAdapters([slice(0, 80)], [slice(0, 5)], [2.0]))
    lora_A, lora_B = made.lora_A, made.lora_B
    lora_A.copy_(torch.randn(5, 40))
    lora_B.copy_(torch.randn(80, 5))
    x, dy = torch.randn(7, 40).double(), torch.randn(7, 80).double()
    padded_x, padded_dy = (nn.functional.pad(t, (0, 64), value=float("nan")) for t in (x, dy))
    results = []
    for given, gradient in ((x, dy), (padded_x, padded_dy)):
        y, low_rank = made.projection.forward(given)
        backward = made.projection.backward(gradient)
        results.append([y, backward.d_input(), *gradients(*backward.d_adapters(given, low_rank))])
    for plain, augmented in zip(*results, strict=True):
        torch.testing.assert_close(plain, augmented, rtol=1e-12, atol=1e-12)
    exact = x @ torch.cat(members).T + bias + (x @ lora_A.T) @ lora_B.T
    torch.testing.assert_close(results[1][0], exact, rtol=1e-12, atol=1e-12)


def test_a_model_that_ran_fused_is_the_model_that_it_was():
    model, same = model_with_adapter("llama"), model_with_adapter("llama")
    forward = prepare(model)
    assert fuse(forward)
    with forward.installed():
        assert not model.model.layers[0].mlp.down_proj.weight.is_contiguous()
        assert all(torch.equal(v, same.state_dict()[k]) for k, v in copy.deepcopy(model).state_dict().items())
    for parameter in model.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, same(tokens).logits)
        merge(model)
        merge(same)
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_small_update_arrives():
    """In bfloat16, where an update that is added to y is rounded away unless it exceeds half a unit of y.

    B after one step of 1e-4 moves y by 1/3000 of itself; a bfloat16 is exact to 1/256. What arrives is the projection
    of the change of y on the exact update; rounding adds noise of 0.0017 |y| / (sqrt(512 * 256) |update|) = 0.013.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1024, generator=generator).bfloat16()
    weight = nn.Parameter(0.02 * torch.randn(256, 1024, generator=generator).bfloat16(), requires_grad=False)
    layout = StackedAdapters([slice(0, 256)], [slice(0, 16)], [1.0])
    made = DenseFormat().project(stack_parameters([FrozenParameter(weight)], 16), None, layout)
    lora_A, lora_B = made.lora_A, made.lora_B
    lora_A.copy_((2 * torch.rand(16, 1024, generator=generator) - 1) / 32)
    lora_B.copy_(1e-4 * torch.randn(256, 16, generator=generator).sign())
    exact = x.double() @ lora_A.double().T @ lora_B.double().T
    change = made.projection.forward(x)[0].double() - x.double() @ weight.double().T
    assert abs(float((change * exact).sum() / exact.square().sum()) - 1) < 0.06
