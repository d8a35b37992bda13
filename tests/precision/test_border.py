"""Weights with a border: the same values for whoever reads them, and a product that carries the low-rank part."""

from __future__ import annotations

import copy

import torch
from torch import nn

from loratune.base.forward import fuse, prepare
from loratune.lora.inject import merge
from loratune.ops.frozen import Dense
from loratune.ops.low_rank import gradients
from loratune.precision.border import bordered, separate
from loratune.precision.projection import Projection
from tests.training.helpers import model_with_adapter


def weights():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(rows, 40), requires_grad=False) for rows in (48, 16, 16)]


def test_parameters_become_views_with_the_values_that_they_had():
    members = weights()
    values = [weight.detach().clone() for weight in members]
    matrix = bordered(members, 70)
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


def test_a_projection_computes_the_same_with_room_and_without():
    members = [nn.Parameter(weight.double(), requires_grad=False) for weight in weights()]
    matrix = bordered(members, 5)
    matrix[80:85, :40] = torch.randn(5, 40)
    matrix[:80, 40:45] = torch.randn(80, 5)
    lora_A, lora_B, bias = matrix[80:85, :40], matrix[:80, 40:45], torch.randn(80).double()
    member = [slice(0, 80)], [slice(0, 5)], [2.0]
    projection = Projection(Dense(matrix[:80, :40]), bias, lora_A, lora_B, *member, matrix)
    x, dy = torch.randn(7, 40).double(), torch.randn(7, 80).double()
    roomy_x, roomy_dy = (nn.functional.pad(t, (0, 64), value=float("nan")) for t in (x, dy))
    results = []
    for given, gradient in ((x, dy), (roomy_x, roomy_dy)):
        y, inner = projection.forward(given)
        d_inner = projection.d_inner(gradient)
        dx = projection.d_input(gradient, d_inner)
        results.append([y, dx, *gradients(*projection.d_adapters(gradient, d_inner, given, inner))])
    for plain, carried in zip(*results, strict=True):
        torch.testing.assert_close(plain, carried, rtol=1e-12, atol=1e-12)
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
    matrix = bordered([weight], 16)
    matrix[256:272, :1024] = (2 * torch.rand(16, 1024, generator=generator) - 1) / 32
    matrix[:256, 1024:1040] = 1e-4 * torch.randn(256, 16, generator=generator).sign()
    lora_A, lora_B = matrix[256:272, :1024], matrix[:256, 1024:1040]
    projection = Projection(
        Dense(matrix[:256, :1024]), None, lora_A, lora_B, [slice(0, 256)], [slice(0, 16)], [1.0], matrix
    )
    exact = x.double() @ lora_A.double().T @ lora_B.double().T
    change = projection.forward(x)[0].double() - x.double() @ weight.double().T
    assert abs(float((change * exact).sum() / exact.square().sum()) - 1) < 0.06
