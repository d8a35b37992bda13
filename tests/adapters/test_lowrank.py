"""The best product of a given rank: the nearest by Eckart and Young, with its true error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratune.adapters import lowrank
from loratune.adapters.lowrank import decompose, decompose_product


def _matrix(rows: int, columns: int, decay: float) -> Tensor:
    """Singular values 1, decay, decay², ..."""
    generator = torch.Generator().manual_seed(3)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    k = min(rows, columns)
    return left[:, :k] * (decay ** torch.arange(k, dtype=torch.float64)) @ right[:k]


def _best(matrix: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (50, 50)])
@pytest.mark.parametrize("way", ["exact", "sketch"])
def test_every_rank_is_the_best_one_and_its_error_is_real(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], way: str
) -> None:
    monkeypatch.setattr(lowrank, "EXACT_SIDE", 1000 if way == "exact" else 10)
    matrix = _matrix(*shape, decay=0.8)
    found = decompose(matrix, 20)
    assert found.exact == (way == "exact")
    assert found.norm == pytest.approx(float(matrix.norm()), rel=1e-6)
    for rank in (1, 4, 20):
        A, B = (factor.double() for factor in found.factors(rank))
        real = float((matrix - B @ A).norm())
        assert found.error(rank) == pytest.approx(real, rel=1e-4)  # factors are float32
        # Power iterations: the sketch is off by (σ_{k+1} / σ_r)^(2q+1), nothing at a width of 30 and q = 4.
        assert real <= 1.001 * _best(matrix, rank)


def test_a_flat_spectrum_is_the_hard_case_and_its_error_is_still_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """All singular values are similar, so a random basis is not the best one; the reported error is the true one."""
    monkeypatch.setattr(lowrank, "EXACT_SIDE", 10)
    matrix = _matrix(80, 120, decay=0.999)
    found = decompose(matrix, 8)
    A, B = (factor.double() for factor in found.factors(8))
    assert found.error(8) == pytest.approx(float((matrix - B @ A).norm()), rel=1e-4)
    assert found.error(8) > _best(matrix, 8)
    assert found.error(8) <= 1.01 * _best(matrix, 8)


def test_a_product_is_decomposed_without_being_formed() -> None:
    """Also where the factors are wider than the matrix, as after concatenating many adapters."""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((40, 5, 30), (12, 20, 30), (30, 20, 12)):
        A = torch.randn(inner, columns, generator=generator)
        B = torch.randn(rows, inner, generator=generator)
        full = B.double() @ A.double()
        found = decompose_product(A, B)
        for rank in (1, 3, 5):
            got_A, got_B = (factor.double() for factor in found.factors(rank))
            assert float((got_B @ got_A - full).norm()) == pytest.approx(_best(full, rank), abs=1e-5)
            assert found.error(rank) == pytest.approx(_best(full, rank), abs=1e-9 * float(full.norm()))
        kept = found.factors(5)
        assert float(kept[0].norm()) == pytest.approx(float(kept[1].norm()), rel=1e-5)  # split evenly


def test_zero_is_of_rank_zero() -> None:
    found = decompose(torch.zeros(6, 9), 3)
    assert (found.norm, found.significant) == (0.0, 0)
    assert all(bool((factor == 0).all()) for factor in found.factors(3))
