"""What FlexAttention is asked for, in PyTorch's reference of it, against one explicit masked product."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as library

from loratune.ops.flex import Sights, attended, flex
from tests.ops.test_attention import DIM, HEADS, KV_HEADS, masked_product

SHORT, LONG = [0, 1, 7, 20, 26], [0, 3, 130, 256, 256, 700, 1000, 1000, 1000]

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def with_backward(monkeypatch):
    """PyTorch refuses gradients on a CPU, where it has no kernel for them; its reference computes them."""
    monkeypatch.setattr(library, "_validate_device", lambda *_: None)


def row(bounds, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, bounds[-1], DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("bounds", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("window", [None, 1, 4, 200])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(1.5, False), (None, True), (1.5, True)])
def test_equals_one_masked_product(bounds, window, softcap, with_sinks, with_backward):
    """In float64, so to its rounding; and so do the gradients, which with sinks run through the logsumexp."""
    inputs = [tensor.requires_grad_() for tensor in row(bounds)]
    sinks = torch.randn(HEADS, dtype=torch.float64) if with_sinks else None
    sights = Sights(torch.tensor(bounds, dtype=torch.int32))
    got = flex(*inputs, 0.3, window, softcap, sinks, sights, attended)
    expected = masked_product(*inputs, 0.3, window, softcap, sinks, bounds)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    d_out = torch.randn_like(got)
    results = [torch.autograd.grad(out, inputs, d_out) for out in (got, expected)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [None, 1, 128, 129, 300])
@pytest.mark.parametrize("bounds", [LONG, [0, 1024], [0, 127, 128, 129, 640, 1024]], ids=str)
def test_the_blocks_are_those_that_the_whole_mask_gives(bounds, window):
    """Which are left out, and which need no mask: PyTorch finds them from a mask of every pair of positions."""
    tokens = 1024
    mask = Sights(torch.tensor(bounds, dtype=torch.int32)).within(tokens, window)
    expected = library.create_block_mask(mask.mask_mod, None, None, tokens, tokens, "cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, whole = getattr(mask, name + "_num_blocks"), getattr(expected, name + "_num_blocks")
        assert torch.equal(counts, whole), name
        columns, same = getattr(mask, name + "_indices"), getattr(expected, name + "_indices")
        for count, a, b in zip(counts.flatten().tolist(), columns[0, 0], same[0, 0], strict=True):
            assert torch.equal(a[:count], b[:count]), name
    assert int(mask.full_kv_num_blocks.sum()) > 0 or window is not None


def test_one_kernel_serves_every_row_and_every_window():
    """What differs between rows and between layers are numbers in tensors; only another T is compiled anew."""
    counter = CompileCounter()
    compiled = torch.compile(attended, dynamic=False, backend=counter)
    sinks = torch.zeros(HEADS, dtype=torch.float64)
    with torch.no_grad():
        for bounds in ([0, 256], [0, 20, 256], [0, 20, 30, 40, 256]):
            sights = Sights(torch.tensor(bounds, dtype=torch.int32))
            for window in (None, 50, None):
                flex(*row(bounds), 0.3, window, 1.5, sinks, sights, compiled)
        assert counter.frame_count == 1
        flex(*row(SHORT), 0.3, None, 1.5, sinks, Sights(torch.tensor(SHORT, dtype=torch.int32)), compiled)
    assert counter.frame_count == 2


def test_layers_share_what_they_see():
    sights = Sights(torch.tensor(LONG, dtype=torch.int32))
    assert sights.within(1024, None) is sights.within(1024, None)
    assert sights.within(1024, None) is not sights.within(1024, 7)
