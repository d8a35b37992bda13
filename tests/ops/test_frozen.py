"""Every form of a frozen weight adds its products onto a tensor; in floating point small numbers are not lost."""

from __future__ import annotations

import pytest
import torch

from loratune.ops.frozen import DenseWeight, FrozenWeight
from loratune.precision import nf4
from loratune.precision.fp8 import Fp8Weight

FORMS = {
    "dense": DenseWeight,
    "transposed": lambda weight: DenseWeight(weight.T.contiguous().T),  # as Conv1D hands it over
    "nf4": nf4.quantise,
    "fp8": Fp8Weight.quantised,
}


def a_weight(form: str, dtype: torch.dtype = torch.float32) -> FrozenWeight:
    """(48, 64)"""
    generator = torch.Generator().manual_seed(0)
    return FORMS[form]((0.1 * torch.randn(48, 64, generator=generator)).to(dtype))


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_onto_a_tensor_are_the_products_and_the_tensor(form: str, with_bias: bool) -> None:
    weight = a_weight(form)
    x, dy, low = torch.randn(7, 64), torch.randn(7, 48), torch.randn(7, 48)
    bias = torch.randn(48) if with_bias else None
    expected = weight.forward(x, bias) + low
    torch.testing.assert_close(weight.forward(x, bias, low.clone()), expected, rtol=1e-5, atol=1e-5)
    low = torch.randn(7, 64)
    torch.testing.assert_close(weight.d_input(dy, low.clone()), weight.d_input(dy) + low, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["dense", "transposed", "nf4"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_small_number_arrives_in_a_product_of_half_precision(form: str, with_bias: bool) -> None:
    """Numbers of 1/3000 of the product, a tenth of half a unit of it, and less of one of a large bias.

    What arrives is the projection of the change on the numbers. Rounding y to bfloat16, 0.0017 of it, adds noise of
    0.0017 |y| / (sqrt(N) |low|), which is 0.0017 * 3000 / sqrt(2048 * 48) = 0.016, and 0.03 with a bias as large as
    three times y. Added after the product, some 0.1 of them would arrive, beside a bias still less.
    """
    weight = a_weight(form, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for wide, product, exact in (
        (torch.randn(2048, 64, generator=generator).bfloat16(), weight.forward, weight.dense().double().T),
        (torch.randn(2048, 48, generator=generator).bfloat16(), weight.d_input, weight.dense().double()),
    ):
        before = wide.double() @ exact
        low = (before.std() / 3000 * torch.randn(before.shape, generator=generator).sign()).bfloat16()
        if product == weight.forward and with_bias:
            bias = (3 * before.std() * torch.randn(48, generator=generator)).bfloat16()
            change = weight.forward(wide, bias, low.clone()).double() - before - bias.double()
        else:
            change = product(wide, onto=low.clone()).double() - before
        share = float((change * low.double()).sum() / low.double().square().sum())
        assert abs(share - 1) < 0.12, share
