"""4-bit weights: bitsandbytes' numbers to the bit, and a frozen weight like any other.

The recorded digests are of bitsandbytes 0.50.2 on a CPU, for `sample()`: `functional.quantize_4bit` with
quant_type "nf4", with and without compress_statistics, then `dequantize_4bit`. Where bitsandbytes is installed,
random weights are compared as well.
"""

from __future__ import annotations

import hashlib
import importlib.util

import pytest
import torch
from torch import Tensor

from loratune.ops.frozen import DenseWeight, frozen_linear
from loratune.precision import nf4
from tests.ops.twins import compare, needs_triton

OF_BITSANDBYTES = {  # (dtype, nested): digests of codes, absmax and the dequantised matrix
    (torch.float32, True): ("9b79207f277e3d75", "97b66224b7d2fcb1", "da736ce1951ff71a"),
    (torch.float32, False): ("9b79207f277e3d75", "5c25258c848ae8eb", "3824b375eebbccff"),
    (torch.bfloat16, True): ("d3f310a19a87588b", "4c640c9f25afd9eb", "2e53e703276fc515"),
    (torch.bfloat16, False): ("d3f310a19a87588b", "32e8c8d0b8e7aa0e", "89d96c4c05fe08d4"),
    (torch.float16, True): ("422924aaa3651858", "95613566176ad5ad", "f6d6bba6b124c04b"),
    (torch.float16, False): ("422924aaa3651858", "c399b2edc7e8cef2", "4d809336e37118dc"),
}
NF4_DIGEST, DYNAMIC_DIGEST = "8501941daa1b8a90", "e732639a65f497b4"


def digest(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def sample() -> Tensor:
    """(96, 320) float32, the same on every machine; blocks of seven different sizes."""
    i = torch.arange(96 * 320)
    return (((i * 7919) % 2003 - 1001).float() / 4096 * (1 + (i // 640) % 7)).view(96, 320)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def test_the_books_are_those_of_bitsandbytes():
    assert digest(nf4.nf4_book(torch.device("cpu"))) == NF4_DIGEST
    assert digest(nf4.dynamic_book(torch.device("cpu"))) == DYNAMIC_DIGEST


@pytest.mark.parametrize(("dtype", "nested"), OF_BITSANDBYTES)
def test_codes_and_values_are_those_of_bitsandbytes(dtype, nested):
    weight = nf4.quantise(sample().to(dtype), nested=nested)
    assert (digest(weight.codes), digest(weight.absmax), digest(weight.dense())) == OF_BITSANDBYTES[dtype, nested]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("shape", [(128, 256), (7, 64), (33, 62), (513, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_weight_dequantises_to_the_bit_like_bitsandbytes(shape, dtype):
    from bitsandbytes import functional

    dense = random(*shape, dtype=dtype)
    codes, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    scale = state.state2.absmax
    nested = nf4.NestedScales(scale, state.offset.expand_as(scale), state.state2.code)
    theirs = nf4.Nf4Weight(codes.view(-1), state.absmax, nested, state.code, shape, dtype)
    assert torch.equal(theirs.dense(), functional.dequantize_4bit(codes, state))
    assert torch.equal(nf4.quantise(dense).codes, codes.view(-1))


@pytest.mark.parametrize("shape", [(96, 320), (5, 37), (33, 62)])
def test_the_error_is_at_most_half_a_gap_of_the_book(shape):
    """Each value is the nearest of the book's, so off by at most half the widest gap times its block's absmax."""
    dense = random(*shape)
    weight = nf4.quantise(dense, nested=False)
    gap = float(nf4.nf4_book(dense.device).diff().max()) / 2
    bound = weight.absmax.repeat_interleave(nf4.BLOCK)[: dense.numel()].view(shape) * gap
    assert bool(((weight.dense() - dense).abs() <= bound * (1 + 1e-6)).all())


def test_it_takes_a_quarter_of_bfloat16():
    """4 bits a code, 8 for a block's absmax, 64 for a group's scale and offset."""
    weight = nf4.quantise(torch.zeros(512, 1024, dtype=torch.bfloat16))
    assert weight.nbytes == 512 * 1024 * (4 + 8 / 64 + 64 / (64 * 256)) / 8
    assert not weight.dense().any()


def test_products_and_gradients_are_those_of_the_dense_matrix():
    weight, x, bias = nf4.quantise(random(40, 128)), random(3, 5, 128, seed=1).requires_grad_(), random(40, seed=2)
    reference = DenseWeight(weight.dense())
    y = frozen_linear(x, weight, bias)
    assert torch.equal(y, frozen_linear(x, reference, bias))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(frozen_linear(x, reference, bias).square().sum(), x)
    assert torch.equal(gradient, expected)


def test_nothing_dense_is_kept_for_the_backward():
    """Between the passes a layer holds neither its input nor a matrix of its weight's size."""
    weight, x = nf4.quantise(random(64, 128)), random(5, 128, seed=1).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_linear(x, weight)
    assert kept == []


@pytest.mark.parametrize("rows", [(64, 128), (3, 5)], ids=["whole groups", "parts of a group"])
def test_a_stack_holds_the_same_values_and_its_rows_are_the_members(rows):
    members = [nf4.quantise(random(n * 4, 256, seed=n)) for n in rows]
    together = nf4.join(members)
    assert torch.equal(together.dense(), torch.cat([member.dense() for member in members]))
    start = 0
    for member in members:
        part = together.rows(slice(start, start + member.shape[0]))
        assert torch.equal(part.dense(), member.dense())
        assert part.codes.untyped_storage().data_ptr() == together.codes.untyped_storage().data_ptr()
        start += member.shape[0]


def test_moving_changes_no_value():
    weight = nf4.quantise(random(40, 128, dtype=torch.bfloat16))
    wide = weight.to(dtype=torch.float64)
    assert wide.dense().dtype == torch.float64
    assert torch.equal(wide.dense().bfloat16(), weight.dense())


COMPARE = """
import torch
from loratune.precision import nf4, nf4_kernels

for dtype in (torch.float32, torch.float16):  # the interpreter cuts off where bfloat16 would round
    for nested in (True, False):
        dense = (torch.randn(300, 256, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
        weight = nf4.quantise(dense, nested=nested)
        for rows, columns in ((slice(0, 300), slice(0, 256)), (slice(37, 101), slice(64, 192))):
            wider = torch.zeros(rows.stop - rows.start, columns.stop - columns.start + 16, dtype=dtype)
            out = wider[:, : columns.stop - columns.start]
            nf4_kernels.dequantise(weight, rows, columns, out)
            assert torch.equal(out, weight.dense()[rows, columns]), (dtype, nested, rows)
            assert not wider[:, out.shape[1] :].any()
"""


@needs_triton
def test_the_kernel_gives_the_bits_of_the_reference():
    compare(COMPARE)


def test_absmax_halfway_between_two_codes_take_the_even_one():
    """As bitsandbytes on a GPU. A random 7B has five such ties in 101 million, between 57 and 58: they give 58."""
    book = nf4.dynamic_book(torch.device("cpu"))
    halves = (book[:-1] + book[1:]) / 2
    codes, scale = nf4._quantise_absmax(torch.cat([torch.ones(1), halves]), book)
    assert float(scale[0]) == 1.0
    assert bool((codes[1:] % 2 == 0).all())
    assert bool(((codes[1:].int() - torch.arange(255)).abs() <= 1).all())
    assert codes[1 + 57] == 58


def test_the_augmented_weight_adds_the_low_rank_part_in_the_product():
    """Both ways the same as a product and a sum after it, in float64, where only the order of summation differs."""
    weight = nf4.quantise(random(96, 128)).to(dtype=torch.float64)
    lora_A, lora_B = random(4, 128, seed=1).double(), random(96, 4, seed=2).double()
    x, dy, bias = random(7, 128, seed=3).double(), random(7, 96, seed=4).double(), random(96, seed=5).double()
    assert weight.aligned_with(4)
    assert not nf4.quantise(random(96, 128).bfloat16()).aligned_with(4)  # rows of 132 bfloat16 are not aligned
    inner, d_inner = x @ lora_A.T, dy @ lora_B
    augmented = nf4.AugmentedNf4(weight, lora_A, lora_B)
    y = augmented.forward(torch.cat([x, inner], 1), bias)
    torch.testing.assert_close(y, weight.forward(x, bias) + inner @ lora_B.T, rtol=1e-12, atol=1e-14)
    dx = augmented.d_input(torch.cat([dy, d_inner], 1))
    torch.testing.assert_close(dx, weight.d_input(dy) + d_inner @ lora_A, rtol=1e-12, atol=1e-14)
