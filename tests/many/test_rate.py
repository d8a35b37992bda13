"""`--learning-rate auto`: its trials, its choice, and a base that is unchanged afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import loratune as lt
from loratune.config import LoraConfig, RunConfig, from_dict, read_toml
from loratune.errors import ConfigError, TrainingError
from loratune.lora.inject import adapter_names
from loratune.many.rate import RATES, RateChoice, RateTrial, choose_rate, measured_rows, pick
from tests.cli_lab import CHAT, loratune, small_model, write_jsonl
from tests.conftest import build
from tests.training.helpers import config, examples, rows


def test_the_lowest_rate_with_nearly_the_best_gain_is_picked():
    assert pick(2.0, {1e-4: 1.9, 1e-3: 1.52, 1e-2: 1.5, 1e-1: 5.0}) == 1e-3
    assert pick(10.0, {1e-4: 8.0, 1e-3: 1.0, 1e-2: 0.5, 1e-1: 2.0}) == 1e-2  # half the loss is not "nearly"
    assert pick(2.0, {1e-4: 1.9, 1e-3: 1.6, 1e-2: 1.5, 1e-1: math.nan}) == 1e-2
    with pytest.raises(TrainingError, match=r"no rate from 0\.0001 to 0\.1 lowers the loss"):
        pick(2.0, {1e-4: 2.1, 1e-1: math.nan})


def choose(model, lora=None, training=None, source=None):
    source = source or rows(examples(60), examples(8, seed=9))
    *trials, choice = choose_rate(model, lora or LoraConfig(r=4, lora_alpha=8), training or config(), source, 64)
    assert isinstance(trials[0], RateTrial)
    assert isinstance(choice, RateChoice)
    return choice


def test_the_choice_beats_rates_far_from_it_and_leaves_the_base_unchanged():
    model = build("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    choice = choose(model, training=config(max_steps=400, warmup_ratio=0.1))
    assert choice.steps == 20
    assert choice.held_out
    assert set(choice.losses) == set(RATES)
    assert choice.losses[choice.rate] < min(choice.base_loss, choice.losses[RATES[0]])
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert adapter_names(model) == ()


def test_it_is_repeatable_and_the_number_of_rates_at_once_does_not_matter(monkeypatch):
    first = choose(build("llama"))
    monkeypatch.setattr("loratune.many.rate.slots_that_fit", lambda *_: 2)
    second = choose(build("llama"))
    assert second.rate == first.rate
    assert second.losses == pytest.approx(first.losses, rel=1e-4)


def test_without_held_out_rows_it_measures_training_rows_that_no_trial_uses():
    source = rows(examples(60), [])
    of_first_epoch = source.of_epoch(0)
    measured = measured_rows(source, 3)
    assert len(measured) == min(16, len(of_first_epoch) - 3)
    assert torch.equal(measured[0].tokens, of_first_epoch[3].tokens)
    assert not choose(build("llama"), source=source).held_out


def test_unsupported_adapters_and_models_are_errors():
    with pytest.raises(
        ConfigError, match=r'"auto" trains several adapters at once, but modules_to_save.*Name a rate'
    ):
        choose(build("llama"), LoraConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match=r'"auto" trains several adapters at once.*Name a rate'):
        choose(build("mamba"), LoraConfig(target_modules=["in_proj"]))
    with pytest.raises(ConfigError, match="name a number here"):
        model = build("llama")
        lt.attach(model, LoraConfig(r=2))
        lt.train(model, lt.load_tokenizer("loratune/pocket"), "nothing.jsonl", lt.TrainConfig(learning_rate="auto"))


def test_a_run_stores_the_rate_and_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_model(Path("base"))
    write_jsonl(Path("chat.jsonl"), CHAT)
    words = ["--tokens-per-row", "64", "--r", "2", "--cache-dir", "", "--max-steps", "6"]
    done = loratune("train", "base", "chat.jsonl", "--out", "run", "--learning-rate", "auto", *words)
    assert done.status == 0, done.err
    settings = from_dict(RunConfig, read_toml("run/run.toml"), "run.toml").training
    kept = json.loads(Path("run/rates.json").read_text())
    assert settings.learning_rate == kept["rate"]
    assert f"learning rate {kept['rate']:g}" in " ".join(done.out.split())
    card = next(line for line in Path("run/README.md").read_text().splitlines() if "learning rate" in line)
    assert f"{kept['rate']:g}, cosine" in card
    assert all(f"{float(rate):g}:" in card for rate in kept["losses"])
    again = loratune("train", "-c", "run/run.toml", "base", "chat.jsonl", "--out", "again")
    assert again.status == 0, again.err
    assert _losses("again") == _losses("run")
    more = loratune(
        "train", "--resume", "base", "chat.jsonl", "--out", "run", *words[:-1], "8", "--learning-rate", "auto"
    )
    assert more.status == 0, more.err
    assert from_dict(RunConfig, read_toml("run/run.toml"), "run.toml").training.learning_rate == kept["rate"]


def _losses(folder):
    lines = (json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]
