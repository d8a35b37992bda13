"""The reference passes of a decoder layer against transformers' modules and autograd.

Values equal the modules' to the bit in float32 and bfloat16. Gradients written by hand equal autograd in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4 import modeling_glm4
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3 import modeling_phi3

from loratune.ops import layer
from loratune.ops.layer import ACTIVATIONS, IDENTITY, HeadSpec, NormSpec
from loratune.ops.meter import StorageMeter

N, D, EPS = 7, 24, 1e-5
NORMS = {
    "llama": (modeling_llama.LlamaRMSNorm, {}),
    "granite": (GraniteRMSNorm, {}),
    "glm4": (modeling_glm4.Glm4RMSNorm, {}),
    "phi3": (modeling_phi3.Phi3RMSNorm, {}),
    "gemma2": (Gemma2RMSNorm, {"offset": 1.0, "round_first": False}),
    "gemma3": (Gemma3RMSNorm, {"offset": 1.0, "round_first": False}),
    "olmo2": (Olmo2RMSNorm, {"round_first": False}),
    "layer": (nn.LayerNorm, {"kind": "layer"}),
}
ACTS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
SPECS = {
    "rms": NormSpec(torch.rand(D, dtype=torch.float64), EPS),
    "gemma": NormSpec(torch.rand(D, dtype=torch.float64), EPS, offset=1.0, round_first=False),
    "layer": NormSpec(torch.rand(D).double(), EPS, "layer", torch.rand(D).double()),
    "no weight": NormSpec(None, EPS, "layer"),
    "identity": IDENTITY,
}


def module_and_spec(name, dtype, width=D):
    make, form = NORMS[name]
    module = make(width, eps=EPS).to(dtype)
    for parameter in module.parameters():
        parameter.data.normal_()
    bias = getattr(module, "bias", None)
    return module, NormSpec(module.weight.detach(), EPS, bias=None if bias is None else bias.detach(), **form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_norms_equal_the_modules_to_the_bit(name, dtype):
    (module, spec), (after, post) = module_and_spec(name, dtype), module_and_spec(name, dtype)
    x, y = torch.randn(N, D).to(dtype), 3 * torch.randn(N, D).to(dtype)
    assert torch.equal(layer.norm(x, spec), module(x))
    for scale in (1.0, 0.22):
        total, normed = layer.add_norm(x, y, spec, scale=scale)
        assert torch.equal(total, x + y * scale)
        assert torch.equal(normed, module(x + y * scale))
        expected = x + after(y) * scale
        assert torch.equal(layer.post_norm_add(x, y, post, scale), expected)
        total, normed = layer.post_norm_add_norm(x, y, post, spec, scale=scale)
        assert torch.equal(total, expected)
        assert torch.equal(normed, module(expected))


def test_a_pass_appends_padding_columns_and_an_identity_does_not_copy():
    x, y = torch.randn(N, D), torch.randn(N, D)
    spec = NormSpec(torch.rand(D), EPS)
    assert torch.equal(layer.norm(x, spec, 8)[:, :D], layer.norm(x, spec))
    assert layer.norm(x, spec, 8).shape == (N, D + 8)
    assert layer.norm(x, IDENTITY) is x
    assert torch.equal(layer.norm(x, IDENTITY, 8)[:, :D], x)
    total, normed = layer.post_norm_add_norm(x, y, spec, IDENTITY)
    assert total is normed


@pytest.mark.parametrize("name", SPECS)
def test_gradients_of_norms(name):
    spec = SPECS[name]
    x, y = (torch.randn(N, D, dtype=torch.float64, requires_grad=True) for _ in "xy")
    d_out, d_residual = (torch.randn(N, D, dtype=torch.float64) for _ in "ab")
    d_x, again = layer.norm_backward(d_out, d_residual, x.detach(), spec, 8)
    (expected,) = torch.autograd.grad((layer.norm(x, spec), x * 1), x, (d_out, d_residual))
    torch.testing.assert_close(d_x[:, :D], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(again, layer.norm(x, spec))
    for scale in (1.0, 0.22):
        (expected,) = torch.autograd.grad(layer.post_norm_add(x, y, spec, scale), y, d_out)
        got = layer.post_norm_backward(d_out, y.detach(), spec, scale, 8)
        torch.testing.assert_close(got[:, :D], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_equal_the_modules_to_the_bit(kind, dtype):
    act, x = ACT2FN[ACTS[kind]], 3 * torch.randn(N, 2 * D).to(dtype)
    assert torch.equal(layer.activation(x, kind), act(x))
    gate, up = (half.contiguous() for half in x.chunk(2, -1))  # PyTorch's erf of strided rows differs in the last bit
    assert torch.equal(layer.gated_product(gate, up, kind), act(gate) * up)
    torch.testing.assert_close(layer.gated(x, kind), act(gate) * up)


def test_the_tanh_form_of_gelu_is_that_of_gpt2():
    x = 3 * torch.randn(N, D)
    torch.testing.assert_close(layer.activation(x, "gelu_tanh"), ACT2FN["gelu_new"](x))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gradients_of_activations(kind):
    x = torch.randn(N, 2 * D, dtype=torch.float64, requires_grad=True)
    d_out = torch.randn(N, 2 * D, dtype=torch.float64)
    (expected,) = torch.autograd.grad(layer.activation(x, kind), x, d_out)
    got, again = layer.activation_backward(x.detach(), d_out, kind, 8)
    torch.testing.assert_close(got[:, : 2 * D], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(again, layer.activation(x, kind))
    (expected,) = torch.autograd.grad(layer.gated(x, kind), x, d_out[:, :D])
    got, again = layer.gated_backward(x.detach(), d_out[:, :D], kind, 8)
    torch.testing.assert_close(got[:, : 2 * D], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(again, layer.gated(x, kind))


def angles(tokens, dim, dtype=torch.float32):
    """cos and sin, (T, dim), as rotary modules make them: both halves are equal."""
    half = torch.rand(tokens, dim // 2, dtype=dtype) * 6
    both = torch.cat([half, half], -1)
    return both.cos(), both.sin()


def heads_first(x):
    """(T, heads, dim) -> (1, heads, T, dim), for transformers."""
    return x.transpose(0, 1)[None]


ROTATIONS = {
    "llama": (modeling_llama, HeadSpec(6, 2, 12, 12)),
    "phi3": (modeling_phi3, HeadSpec(6, 2, 12, 8)),
    "glm4": (modeling_glm4, HeadSpec(6, 2, 12, 6, interleaved=True)),
    "gpt_neox": (modeling_gpt_neox, HeadSpec(4, 4, 12, 4, grouped=True)),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_equal_transformers_to_the_bit(name):
    module, heads = ROTATIONS[name]
    x, (cos, sin) = torch.randn(N, heads.total, heads.dim), angles(N, heads.rotary_dim)
    query, key, value = (part.clone() for part in heads.split(x))
    expected = module.apply_rotary_pos_emb(heads_first(query), heads_first(key), cos[None], sin[None])
    out = layer.rotate_heads(x, cos, sin, heads)
    assert out is x, "without a norm the heads are rotated in place"
    got_query, got_key, got_value = heads.split(out)
    assert torch.equal(heads_first(got_query), expected[0])
    assert torch.equal(heads_first(got_key), expected[1])
    assert torch.equal(got_value, value)


def test_grouped_heads_are_those_of_gpt_neox():
    heads = HeadSpec(4, 4, 12, 4, grouped=True)
    row = torch.randn(N, heads.total * heads.dim)
    theirs = row.view(N, -1, 3 * heads.dim).chunk(3, -1)
    for ours, expected in zip(heads.split(row.view(N, -1, heads.dim)), theirs, strict=True):
        assert torch.equal(ours, expected)
    x = torch.randn(N, 10, 12)
    for spec in (HeadSpec(6, 2, 12, 12), HeadSpec(6, 2, 12, 12, grouped=True)):
        assert torch.equal(spec.join(*spec.split(x)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2"])
@pytest.mark.parametrize("whole_width", [False, True])
def test_head_norms_equal_the_modules_to_the_bit(name, dtype, whole_width):
    query, key_value, dim = 6, 2, 8
    widths = [query * dim, key_value * dim] if whole_width else [dim, dim]
    (q_norm, q_spec), (k_norm, k_spec) = (module_and_spec(name, dtype, width) for width in widths)
    weights = (s.weight.view(-1, dim).expand(heads, dim) for s, heads in ((q_spec, query), (k_spec, key_value)))
    spec = NormSpec(torch.cat([*weights]), EPS, offset=q_spec.offset, round_first=q_spec.round_first)
    heads = HeadSpec(query, key_value, dim, 0, norm=spec, whole_width=whole_width)
    x = torch.randn(N, heads.total, dim).to(dtype)
    got = heads.split(layer.rotate_heads(x, None, None, heads))
    for part, module, ours in zip(heads.split(x), (q_norm, k_norm), got, strict=False):
        expected = module(part.flatten(1)).view(part.shape) if whole_width else module(part)
        assert torch.equal(ours, expected)
    assert torch.equal(got[2], heads.split(x)[2])


HEADS = [
    HeadSpec(6, 2, 12, 12),
    HeadSpec(6, 2, 12, 8),
    HeadSpec(6, 2, 12, 6, interleaved=True),
    HeadSpec(4, 4, 12, 4, grouped=True),
    HeadSpec(6, 2, 12, 0),
    HeadSpec(6, 2, 12, 12, norm=NormSpec(torch.rand(8, 12).double(), EPS)),
    HeadSpec(6, 2, 12, 8, grouped=True, norm=NormSpec(torch.rand(8, 12).double(), EPS, offset=1.0)),
    HeadSpec(6, 2, 12, 12, whole_width=True, norm=NormSpec(torch.rand(8, 12).double(), EPS, round_first=False)),
]


@pytest.mark.parametrize("heads", HEADS)
def test_gradients_of_heads(heads):
    x = torch.randn(N, heads.total, heads.dim, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(N, heads.rotary_dim, torch.float64)
    out = layer.rotate_heads(x * 1, cos, sin, heads)
    d_out = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, x, d_out)
    got = layer.rotate_heads_backward(*heads.split(d_out), cos, sin, x.detach(), heads, 8)
    assert got.shape == (N, heads.total * heads.dim + 8)
    torch.testing.assert_close(got[:, :-8], expected.flatten(1), rtol=1e-12, atol=1e-12)


def test_on_the_meta_device_only_outputs_are_allocated():
    """The memory of a step is counted there, so temporaries of the reference must not appear."""

    def half(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    x, row, spec = half(512, D), 512 * 2, NormSpec(half(D), EPS)
    heads, stacked, angles = HeadSpec(6, 2, 12, 12), half(512, 10, 12), half(512, 12)
    for call, columns in (
        (lambda: layer.norm(x, spec, 8), D + 8),
        (lambda: layer.norm(x, IDENTITY), 0),
        (lambda: layer.add_norm(x, x, spec, 8), 2 * D + 8),
        (lambda: layer.add_norm(x, x, IDENTITY), D),
        (lambda: layer.norm_backward(x, x, x, spec, 8), 2 * D + 8),
        (lambda: layer.post_norm_add_norm(x, x, spec, spec, 8), 2 * D + 8),
        (lambda: layer.post_norm_backward(x, x, spec, 1.0, 8), D + 8),
        (lambda: layer.gated(x, "silu", 8), D // 2 + 8),
        (lambda: layer.gated_backward(x, x[:, : D // 2], "silu", 8), D + 8 + D // 2),
        (lambda: layer.activation_backward(x, x, "gelu", 8), 2 * D + 8),
        (lambda: layer.rotate_heads(stacked, angles, angles, heads), 0),
    ):
        with StorageMeter() as meter:
            made = call()
        vectors = meter.live - columns * row  # temporaries of the width of a weight, no rows
        assert 0 <= vectors <= 16 * D * 4
        assert meter.peak == meter.live
        del made
