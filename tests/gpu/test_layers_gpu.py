"""Twins of decoder-layer passes on a GPU, in the shapes of every architecture with a recipe.

The error of each twin against float64 is at most twice the error of its reference in the same precision.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loratune.ops import layer
from loratune.ops.layer import IDENTITY, HeadSpec, NormSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOKENS, EPS, BF16 = 515, 1e-5, torch.bfloat16


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=BF16)


def doubled(value):
    """An argument of a pass in float64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, NormSpec):
        weights = {name: getattr(value, name) for name in ("weight", "bias")}
        return replace(value, **{name: None if w is None else w.double() for name, w in weights.items()})
    if isinstance(value, HeadSpec) and value.norm is not None:
        return replace(value, norm=doubled(value.norm))
    return value


def error(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


def assert_as_good(function, *arguments, pad=0):
    """`pad` columns of the first output are undefined."""
    reference = function.__wrapped__
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]  # a pass may overwrite them
    outs = reference(*map(doubled, arguments)), reference(*copies), function(*arguments)
    outs = (out if isinstance(out, tuple) else (out,) for out in outs)
    for index, (exact, plain, fast) in enumerate(zip(*outs, strict=True)):
        width = exact.shape[-1] - (pad if index == 0 else 0)
        exact, plain, fast = (out[..., :width] for out in (exact, plain, fast))
        assert error(fast, exact) <= 2 * error(plain, exact), (function.__name__, index)


def llama(*shape):
    return NormSpec(random(*shape), EPS)


def gemma(*shape):
    return NormSpec(random(*shape), EPS, offset=1.0, round_first=False)


def olmo(*shape):
    return NormSpec(random(*shape), EPS, round_first=False)


def layer_norm(d):
    return NormSpec(random(d), EPS, "layer", random(d))


# Architecture: width, norm before, norm after, width of the MLP, activation, whether it is gated
LAYERS = {
    "gemma2": (2304, gemma, gemma, 9216, "gelu_tanh", True),
    "gemma3": (1152, gemma, gemma, 6912, "gelu_tanh", True),
    "olmo2": (4096, lambda d: IDENTITY, olmo, 11008, "silu", True),
    "phi3": (3072, llama, lambda d: IDENTITY, 8192, "silu", True),
    "granite": (2048, llama, lambda d: IDENTITY, 8192, "silu", True),
    "glm4": (4096, llama, llama, 13696, "silu", True),
    "gpt_neox": (2560, layer_norm, lambda d: IDENTITY, 10240, "gelu", False),
    "gpt2": (1600, layer_norm, lambda d: IDENTITY, 6400, "gelu_tanh", False),
}
HEADS = {
    "gemma2": HeadSpec(8, 4, 256, 256),
    "gemma3": HeadSpec(4, 1, 256, 256),
    "olmo2": HeadSpec(32, 32, 128, 128, whole_width=True),
    "phi3": HeadSpec(32, 32, 96, 96),
    "phi4 mini": HeadSpec(24, 8, 128, 96),
    "granite": HeadSpec(32, 8, 64, 64),
    "glm4": HeadSpec(32, 2, 128, 64, interleaved=True),
    "gpt_neox": HeadSpec(32, 32, 80, 20, grouped=True),
    "gpt2": HeadSpec(25, 25, 64, 0),
}
HEAD_NORMS = {"gemma3": gemma, "olmo2": olmo}


@pytest.mark.parametrize("name", LAYERS)
def test_norms(name):
    torch.manual_seed(0)
    d, before, after, *_ = LAYERS[name]
    spec, post = before(d), after(d)
    x, y, wide = random(TOKENS, d), random(TOKENS, d), random(TOKENS, d + 64)
    strided = wide[:, :d]
    assert_as_good(layer.norm, x, spec, 64, pad=64)
    assert_as_good(layer.norm_backward, y, strided, x, spec, 64, pad=64)
    assert_as_good(layer.post_norm_backward, strided, y, post, 0.22, 64, pad=64)
    assert_as_good(layer.post_norm_add, x, y, post, 0.22)
    for scale in (1.0, 0.22):
        total, normed = layer.add_norm(x, y, spec, 64, None, scale)
        assert torch.equal(total, x + y * scale)
        assert error(normed[:, :d], layer.norm.__wrapped__(total, spec).double()) < 2**-8
        total, normed = layer.post_norm_add_norm(x, y, post, spec, 64, None, scale)
        assert torch.equal(total, layer.post_norm_add(x, y, post, scale))
        assert error(normed[:, :d], layer.norm.__wrapped__(total, spec).double()) < 2**-8


@pytest.mark.parametrize("name", LAYERS)
def test_activations(name):
    torch.manual_seed(1)
    _, _, _, width, kind, gated = LAYERS[name]
    x, d_out = 2 * random(TOKENS, 2 * width if gated else width), random(TOKENS, width)
    forward = layer.gated if gated else layer.activation
    backward = layer.gated_backward if gated else layer.activation_backward
    assert_as_good(forward, x, kind, 64, pad=64)
    assert_as_good(backward, x, d_out, kind, 64, pad=64)
    if gated:
        gate, up = x.chunk(2, -1)
        assert_as_good(layer.gated_product, gate, up, kind)
        assert_as_good(layer.gated_product_backward, d_out, gate, up, kind)


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    torch.manual_seed(2)
    heads = HEADS[name]
    if name in HEAD_NORMS:
        heads = replace(heads, norm=HEAD_NORMS[name](heads.rotated, heads.dim))
    angles = torch.rand(TOKENS, heads.rotary_dim // 2, device="cuda") * 6
    cos, sin = (f(torch.cat([angles, angles], -1)).to(BF16) for f in (torch.cos, torch.sin))
    x, gradient = random(TOKENS, heads.total, heads.dim), random(TOKENS, heads.total, heads.dim)
    assert_as_good(layer.rotate_heads, x.clone(), cos, sin, heads)
    assert_as_good(layer.rotate_heads_backward, *heads.split(gradient), cos, sin, x, heads, 64, pad=64)
