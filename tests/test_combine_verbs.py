"""`loratune combine`, `resize` and `extract` at the command line; every other verb accepts their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_lab import CHAT, SHORT, loratune, small_model, write_jsonl

RESULTS = ["sum", "ties", "small", "drawn"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two trained adapters, a merged checkpoint, and the results of the three verbs."""
    folder = tmp_path_factory.mktemp("combine")
    small_model(folder / "base")
    write_jsonl(folder / "chat.jsonl", CHAT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "120")
        for name, seed in (("a", "1"), ("b", "2")):
            ran = loratune(
                *("train", "base", "chat.jsonl", "--out", name, "--max-steps", "2", "--seed", seed, *SHORT),
                *("--learning-rate", "0.01"),
            )
            assert ran.status == 0, ran.err
        for words in (
            ("merge", "a", "--out", "merged"),
            ("combine", "a", "b", "--out", "sum", "--weights", "0.5", "-1.5"),
            ("combine", "a", "b", "--out", "ties", "--method", "ties_svd", "--density", "0.3", "--rank", "3"),
            ("resize", "sum", "--rank", "2", "--out", "small"),
            ("extract", "merged", "--base", "base", "--rank", "2", "--out", "drawn"),
        ):
            done = loratune(*words)
            assert done.status == 0, done.err
            (folder / f"{words[words.index('--out') + 1]}.txt").write_text(done.out)
        yield folder


@pytest.mark.parametrize("name", RESULTS)
def test_every_verb_takes_the_result(here: Path, name: str) -> None:
    inspected = loratune("inspect", name)
    assert inspected.status == 0, inspected.err
    assert "made by" in inspected.out
    measured = loratune("eval", name, "chat.jsonl", "--no-generate", "--json", "--tokens-per-row", "64")
    assert measured.status == 0, measured.err
    assert json.loads(measured.out)
    merged = loratune("merge", name, "--out", f"{name}-merged", "--data", "chat.jsonl")
    assert merged.status == 0, merged.err


def test_the_words_say_what_was_lost(here: Path) -> None:
    assert (here / "sum.txt").read_text().startswith("sum: 0.5 x a + -1.5 x b, cat: rank 4, 14 layers")
    assert "leaves out" in (here / "small.txt").read_text()
    table = (here / "drawn.txt").read_text()
    assert "<- written" in table
    assert "changed too" not in table  # the adapter changed only these layers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["combine", "a", "c", "--out", "x"], "c: there is no such folder"),
        (["combine", "a", "b", "--out", "sum"], "exists already; choose another name or pass --overwrite"),
        (["combine", "a", "b", "--out", "x", "--weights", "1"], "1 weights for 2 adapters"),
        (["combine", "a", "base", "--out", "x"], "base: has no adapter_config.json"),
        (["resize", "a", "--rank", "0", "--out", "x"], "a rank is at least 1"),
        (["extract", "base", "--base", "a", "--out", "x"], "this is an adapter, not a base model"),
        (["extract", "base", "--base", "base", "--out", "x"], "do not differ"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(here: Path, words: list[str], message: str) -> None:
    done = loratune(*words)
    assert done.status == 2
    assert message in done.err
    assert not (here / "x").exists()
