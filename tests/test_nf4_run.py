"""All verbs on a 4-bit base from the command line: train, resume, evaluate, merge; on a CPU."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratune.base.load import load
from loratune.infer.opened import open_folders
from loratune.precision.linear import quantised_layers
from tests.cli_lab import CHAT, SHORT, loratune, small_model, write_jsonl

TRAIN = ["train", "base", "chat.jsonl", *SHORT, "--precision", "nf4", "--device", "cpu", "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working folder with a model, data and one finished run."""
    folder = tmp_path_factory.mktemp("nf4")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "160")
        small_model(folder / "base")
        write_jsonl(folder / "chat.jsonl", CHAT)
        done = loratune(*TRAIN, "--max-steps", "12", "--save-every-steps", "6", "--out", "run")
        assert done.status == 0, done.err
        assert "base in nf4 beside float32" in done.out
        yield folder


def test_the_run_says_how_its_base_was_held(here):
    assert tomllib.loads((here / "run" / "run.toml").read_text())["precision"] == "nf4"
    losses = [
        json.loads(line)["loss"]
        for line in (here / "run" / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert losses[-1] < losses[0]
    card = (here / "run" / "README.md").read_text()
    assert 'precision="nf4"' in card
    assert "4 bits (NF4)" in card


def test_resuming_goes_on_to_the_bit_and_only_on_the_same_base(here):
    more = ["--max-steps", "16", "--resume", "--out", "again"]
    assert loratune(*TRAIN, "--max-steps", "12", "--save-every-steps", "6", "--out", "again").status == 0
    refused = loratune(*[w if w != "nf4" else "float32" for w in TRAIN], *more)
    assert refused.status == 2
    assert "precision is 'nf4' in this run" in refused.err
    assert loratune(*TRAIN, *more).status == 0
    one, other = (load_file(here / name / "adapter_model.safetensors") for name in ("run", "again"))
    assert one.keys() == other.keys()


def test_what_comes_after_training_runs_on_the_same_codes(here):
    """No flag is needed: run.toml records the precision."""
    opened = open_folders(["run"])
    assert len(list(quantised_layers(opened.model))) == 14
    found = loratune("eval", "run", "chat.jsonl", "--json")
    assert found.status == 0, found.err
    dense = open_folders(["run"], precision="float32")
    assert not list(quantised_layers(dense.model))


def test_merging_gives_the_model_that_was_trained(here):
    done = loratune("merge", "run", "--out", "merged", "--data", "chat.jsonl")
    assert done.status == 0, done.err
    assert "14 quantised layers" in done.out
    assert "over weights in 4 bits (NF4)" in Path("merged/README.md").read_text()
    tokens = torch.arange(5, 40)[None]
    with torch.no_grad():
        expected = open_folders(["run"]).model(tokens).logits
        got = load("merged", device="cpu")(tokens).logits
    assert float((got - expected).abs().max()) < 1e-4


def test_a_quantised_folder_is_a_base_like_any_other(here):
    """The adapter equals, to the bit, the one trained after quantising while loading."""
    assert loratune("quantise", "base", "--out", "base-4bit", "--device", "cpu").status == 0
    words = ["base-4bit" if word == "base" else word for word in TRAIN if word not in ("--precision", "nf4")]
    done = loratune(*words, "--max-steps", "12", "--save-every-steps", "6", "--out", "run-4bit")
    assert done.status == 0, done.err
    one, other = (load_file(Path(name) / "adapter_model.safetensors") for name in ("run", "run-4bit"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    config = json.loads(Path("run-4bit/adapter_config.json").read_text())
    assert config["target_modules"] == json.loads(Path("run/adapter_config.json").read_text())["target_modules"]
