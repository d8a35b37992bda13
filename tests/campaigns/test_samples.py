"""Samples of the campaigns; each campaign's own command runs all of it."""

from __future__ import annotations

import os

import pytest

from tests.campaigns import fuzzed_data, mutated_folders, workers


def test_fuzzed_data_files() -> None:
    campaign = workers.run(fuzzed_data.check, range(90))
    assert not campaign.faults, str(campaign)
    assert campaign.outcomes["accepted"] > 20
    assert campaign.outcomes["refused"] > 20


def test_mutated_folders() -> None:
    with mutated_folders.prepared():
        campaign = workers.run(mutated_folders.check, range(30))
    assert not campaign.faults, str(campaign)
    assert campaign.outcomes["accepted"] > 5
    assert campaign.outcomes["refused"] > 12


def _fails(seed: int) -> str:
    if seed == 1:
        raise workers.Wrong("2 is not 3")
    if seed == 2:
        raise KeyError("x")
    if seed == 3:
        os._exit(7)
    return "accepted"


def test_faults_of_each_kind_are_found_and_cost_one_seed() -> None:
    campaign = workers.run(_fails, range(6))
    assert [(found.seed, found.kind) for found in campaign.faults] == [(1, "wrong"), (2, "traceback"), (3, "crash")]
    assert campaign.outcomes["accepted"] == 3


@pytest.mark.parametrize("seed", [0, 9, 18])
def test_a_seed_always_makes_the_same_file(seed: int) -> None:
    assert fuzzed_data.make(seed) == fuzzed_data.make(seed)
