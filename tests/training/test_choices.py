"""Choices of row size, rows per step, passes and rate: right values for known data, and one answer everywhere."""

from __future__ import annotations

import pytest

from loratune.config import DataConfig, TrainConfig
from loratune.data.pack import best_fit, fullness
from loratune.errors import ConfigError
from loratune.training.choices import MOST_PASSES, choose, rate_of, remarks
from loratune.training.course import Course, Rows


def steps_of(lengths: list[int]) -> int:
    chosen = choose(DataConfig(), TrainConfig(), lengths, [], 256)
    rows = [None] * len(best_fit(lengths, chosen.data.row_tokens, seed=0))
    return Course(Rows(lambda epoch: rows, []), chosen.training).total_steps  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("documents", "length", "row", "rows_per_step", "passes"),
    [
        (190, 40, 320, 1, 10),  # 8 documents a step, 24 steps a pass: the most passes
        (475, 40, 320, 1, 5),  # 60 steps a pass
        (2_280, 25, 448, 1, 3),  # 17 documents in a row
        (19_000, 40, 1280, 1, 1),  # 32 documents a step, 594 steps in one pass
        (475, 5, 256, 1, 10),  # the shortest row takes 51 documents
        (475, 1_000, 2048, 4, 6),  # several rows make 8 documents
        (475, 3_000, 3008, 8, 6),  # a row holds the longest document
        (3, 900, 2816, 1, 10),  # a row that all documents fill
    ],
)
def test_choices_for_documents_of_one_length(
    documents: int, length: int, row: int, rows_per_step: int, passes: int
) -> None:
    chosen = choose(DataConfig(), TrainConfig(), [length] * documents, [length], 256)
    found = (chosen.data.tokens_per_row, chosen.training.gradient_accumulation_steps, chosen.training.epochs)
    assert found == (row, rows_per_step, passes)
    assert [c.setting for c in chosen.choices] == [
        "tokens_per_row",
        "gradient_accumulation_steps",
        "epochs",
        "learning_rate",
    ]
    assert all(len(str(choice)) < 120 and "\n" not in str(choice) for choice in chosen.choices)


@pytest.mark.parametrize("documents", [150, 500, 999, 1_001, 3_000, 7_999, 20_000])
def test_a_run_has_hundreds_of_steps_or_the_most_passes(documents: int) -> None:
    lengths = [20 + 7 * (n % 11) for n in range(documents)]
    passes = choose(DataConfig(), TrainConfig(), lengths, [], 256).training.epochs
    assert steps_of(lengths) >= 280 or passes == MOST_PASSES


def test_rows_are_well_filled_where_the_data_allow_it() -> None:
    uneven = [100] * 300 + [1_100] * 60
    row = choose(DataConfig(), TrainConfig(), uneven, [], 256).data.row_tokens
    assert fullness(uneven, len(best_fit(uneven, row, seed=0)), row) >= 0.9
    longest_held_out = choose(DataConfig(), TrainConfig(), [30] * 500, [1_400], 256).data.row_tokens
    assert longest_held_out >= 1_400


def test_set_values_stay_and_the_others_follow() -> None:
    data, training = DataConfig(tokens_per_row=64), TrainConfig(learning_rate=1e-5, max_steps=7)
    chosen = choose(data, training, [30] * 500, [], 256)
    assert chosen.data == data
    assert (chosen.training.learning_rate, chosen.training.max_steps, chosen.training.epochs) == (1e-5, 7, 1)
    assert chosen.training.gradient_accumulation_steps == 4  # rows of two documents, eight in a step
    whole = TrainConfig(learning_rate="auto", epochs=2, gradient_accumulation_steps=3)
    again = choose(data, whole, [30] * 500, [], 256)
    assert (again.data, again.training, again.choices) == (data, whole, ())
    twice = choose(chosen.data, chosen.training, [30] * 500, [], 256)
    assert (twice.data, twice.training, twice.choices) == (chosen.data, chosen.training, ())


def test_the_rate_depends_on_the_width_alone() -> None:
    assert rate_of(256)[0] == 1.8e-3  # the best of docs/experiments/lora-without-regret.md
    assert 2e-4 <= rate_of(4096)[0] <= 5e-4
    assert rate_of(2000)[0] == 5e-4
    assert rate_of(32)[0] == 1.8e-3
    assert rate_of(None)[0] == 2e-4
    rates = {choose(DataConfig(), TrainConfig(), [n] * 40 * n, [], 1024).training.rate for n in (5, 50, 500)}
    assert rates == {rate_of(1024)[0]}


def test_a_row_far_longer_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"10,000,000, but all training documents together have 33,000 tokens"):
        choose(DataConfig(tokens_per_row=10_000_000), TrainConfig(), [33] * 1000, [], 256)
    assert choose(DataConfig(tokens_per_row=2048), TrainConfig(), [33], [], 256).data.tokens_per_row == 2048


def test_short_runs_and_empty_rows_are_named() -> None:
    assert remarks(0.95, 300, 448, 40) == []
    assert "only 7 optimizer steps" in remarks(0.95, 7, 448, 40)[0]
    assert "rows are only 12% full" in remarks(0.12, 300, 2048, 40)[0]
