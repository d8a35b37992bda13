"""Files to rows: the split is stable, the cache changes nothing, and (seed, epoch, index) determine a row."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loratune.config import DataConfig
from loratune.data.feed import Dataset, prepare, rows_of_epoch
from loratune.errors import ConfigError, DataError, ModelError, OutputError
from tests.data.toy_tokenizers import CHATML, LLAMA3, stop_ids, toy_tokenizer

TOKENIZER = toy_tokenizer(CHATML)
STOPS = stop_ids(TOKENIZER)


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", [f"the dog {'over ' * (number % 7)}{number}" for number in range(40)])


def write(path: str, texts: list[str]) -> None:
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def prepared(
    paths: tuple[str, ...] = ("a.jsonl",), seed: int = 0, cache: str | None = None, **settings: object
) -> Dataset:
    config = DataConfig(**({"tokens_per_row": 128} | settings))  # type: ignore[arg-type]
    return prepare(paths, TOKENIZER, config, stop_ids=STOPS, seed=seed, cache_dir=cache)


def content(dataset: Dataset) -> object:
    parts = [
        [(e.token_ids.tolist(), e.weights.tolist(), e.source) for e in part] for part in (dataset.train, dataset.eval)
    ]
    return parts, dataset.notes, dataset.file_hashes


def test_a_share_is_held_out_by_the_seed() -> None:
    dataset = prepared(eval_fraction=0.25)
    held = {example.source for example in dataset.eval}
    assert (len(dataset.train), len(held)) == (30, 10)
    assert not held & {example.source for example in dataset.train}
    assert held == {example.source for example in prepared(eval_fraction=0.25).eval}
    assert held != {example.source for example in prepared(eval_fraction=0.25, seed=1).eval}
    assert len(prepared(eval_fraction=0.001).eval) == 1
    assert prepared(eval_fraction=0).eval == []
    write("one.jsonl", ["a"])
    with pytest.raises(DataError, match=r"one\.jsonl:1: with a single record nothing can be held out"):
        prepared(("one.jsonl",))


def test_held_out_files_replace_the_split_and_copies_are_said() -> None:
    write("b.jsonl", ["new", "the dog 0"])
    dataset = prepared(eval_data=["b.jsonl"])
    assert len(dataset.train) == 40
    assert [example.source for example in dataset.eval] == ["b.jsonl:1", "b.jsonl:2"]
    (note,) = dataset.notes
    assert note.startswith("1 of 2 held-out records are also in the training data (the first is b.jsonl:2)")


def test_the_hash_for_the_model_card_is_that_of_the_file() -> None:
    expected = hashlib.sha256(Path("a.jsonl").read_bytes()).hexdigest()
    assert prepared().file_hashes == {"a.jsonl": expected}


def test_the_cache_gives_back_the_same() -> None:
    fresh = prepared(cache="cache")
    (file,) = Path("cache").iterdir()
    written = file.stat().st_mtime_ns
    assert content(prepared(cache="cache")) == content(fresh) == content(prepared())
    assert [other.stat().st_mtime_ns for other in Path("cache").iterdir()] == [written]


def test_whatever_changes_the_tokens_misses_the_cache() -> None:
    prepared(cache="cache")
    write("b.jsonl", ["new", "data"])
    for change in (
        {"train_on": "all"},
        {"tokens_per_row": 127},
        {"truncate": True},
        {"eval_fraction": 0.5},
        {"seed": 1},
        {"eval_data": ["b.jsonl"]},
        {"paths": ("a.jsonl", "b.jsonl")},
        {"paths": ("b.jsonl", "a.jsonl")},
    ):
        before = len(os.listdir("cache"))
        prepared(cache="cache", **change)  # type: ignore[arg-type]
        assert len(os.listdir("cache")) == before + 1, change
    for tokenizer, stops in (
        (toy_tokenizer(LLAMA3), STOPS),
        (toy_tokenizer(adds_bos=False), STOPS),
        (TOKENIZER, {1}),
    ):
        before = len(os.listdir("cache"))
        config = DataConfig(tokens_per_row=128)
        prepare(["a.jsonl"], tokenizer, config, stop_ids=frozenset(stops), cache_dir="cache")
        assert len(os.listdir("cache")) == before + 1
    before = len(os.listdir("cache"))
    write("a.jsonl", ["other", "texts"])
    prepared(cache="cache")
    assert len(os.listdir("cache")) == before + 1


def test_what_does_not_change_the_tokens_hits_the_cache() -> None:
    prepared(cache="cache")
    prepared(cache="cache", num_proc=1)
    assert len(os.listdir("cache")) == 1


@pytest.mark.parametrize("position", [0, 8, 200, -1])
def test_a_damaged_cache_is_rebuilt(position: int) -> None:
    fresh = prepared(cache="cache")
    (file,) = Path("cache").iterdir()
    whole = bytearray(file.read_bytes())
    whole[position] ^= 1
    file.write_bytes(whole)
    assert content(prepared(cache="cache")) == content(fresh)
    file.write_bytes(bytes(whole)[:100])
    assert content(prepared(cache="cache")) == content(fresh)
    assert content(prepared(cache="cache")) == content(fresh)


def test_a_cache_that_cannot_be_written_is_an_error_with_the_fix() -> None:
    Path("cache").write_text("a file, not a folder")
    with pytest.raises(OutputError, match=r"cache: the data cache cannot be written.*--cache-dir"):
        prepared(cache="cache", cache_dir="cache")  # the user has named it
    found, plain = prepared(cache="cache"), prepared()
    assert any("data cache cannot be written" in note for note in found.notes[len(plain.notes) :])
    assert [e.token_ids.tolist() for e in found.train] == [e.token_ids.tolist() for e in plain.train]


def test_epochs_differ_and_repeat() -> None:
    examples = prepared().train
    epochs = [rows_of_epoch(examples, 128, 0, seed=0, epoch=epoch) for epoch in (0, 1, 0)]
    assert epochs[0].packing == epochs[2].packing != epochs[1].packing
    for rows in epochs:
        assert sorted(index for row in rows.packing for index in row) == list(range(len(examples)))


def test_a_row_is_the_same_whenever_it_is_built() -> None:
    """A run that resumes in the middle of an epoch relies on this."""
    examples = prepared().train
    rows = rows_of_epoch(examples, 128, 0, seed=3, epoch=2)
    for index, row in enumerate(rows):
        again = rows_of_epoch(examples, 128, 0, seed=3, epoch=2)[index]
        assert row.tokens.tolist() == again.tokens.tolist()
        assert row.weights.tolist() == again.weights.tolist()
    assert len(rows[1:]) == len(rows) - 1
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="eval_fraction is 1"):
        prepared(eval_fraction=1)
    with pytest.raises(ConfigError, match="tokens_per_row is 1"):
        prepared(tokens_per_row=1)


def test_every_token_must_be_in_the_models_vocabulary() -> None:
    largest = max(int(example.token_ids.max()) for example in prepared(eval_fraction=0).train)
    for cache in (None, "cache", "cache"):  # also if the examples come from the cache
        config = DataConfig(tokens_per_row=128)
        prepare(["a.jsonl"], TOKENIZER, config, stop_ids=STOPS, vocabulary=largest + 1, cache_dir=cache)
        with pytest.raises(ModelError, match=rf'a\.jsonl:\d+: the token ".*" has id {largest}, .* {largest} tokens'):
            prepare(["a.jsonl"], TOKENIZER, config, stop_ids=STOPS, vocabulary=largest, cache_dir=cache)


def test_the_date_that_a_template_prints_is_one_of_the_inputs() -> None:
    clock = toy_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content }}{{ strftime_now('%Y-%m-%d') }}"))
    Path("chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )

    def text(tokenizer: PreTrainedTokenizerFast, day: str | None) -> str:
        config = DataConfig(tokens_per_row=128, eval_fraction=0, template_date=day)
        (example,) = prepare(["chat.jsonl"], tokenizer, config, stop_ids=STOPS, cache_dir="cache").train
        return str(tokenizer.decode(example.token_ids))

    assert "b2020-01-02<|im_end|>" in text(clock, "2020-01-02")
    assert "b2020-01-03<|im_end|>" in text(clock, "2020-01-03")
    assert f"b{datetime.now().date().isoformat()}<|im_end|>" in text(clock, None)
    assert len(os.listdir("cache")) == 3
    config = DataConfig(tokens_per_row=128, eval_fraction=0, template_date="2020-01-02")
    assert prepare(["chat.jsonl"], TOKENIZER, config, stop_ids=STOPS).notes == [
        "The chat template prints no date, so template_date has no effect."
    ]
    with pytest.raises(ConfigError, match='template_date is "today"; write YYYY-MM-DD'):
        DataConfig(template_date="today")


def test_the_models_context_limits_like_a_row() -> None:
    with pytest.raises(DataError, match="at most 10 fit"):
        prepare(["a.jsonl"], TOKENIZER, DataConfig(tokens_per_row=128), stop_ids=STOPS, max_tokens=10)
