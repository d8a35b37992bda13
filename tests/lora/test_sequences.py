"""A sample of the campaign of random sequences of operations on adapters."""

from __future__ import annotations

from tests.campaigns.adapter_sequences import run


def test_sequences_of_operations_compute_with_the_dense_weights() -> None:
    run(40)
