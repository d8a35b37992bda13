"""Whole runs: from files to an output folder, and in memory through `lt.train`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import loratune as lt
from loratune.base.load import POCKET
from loratune.box import data_file
from loratune.errors import AdapterError, ConfigError, OutputError
from loratune.lora.files import read_config
from loratune.lora.inject import active, adapter_names, trainable_parameters
from loratune.runs.run import ADAPTER, Prepared, RunResult, run
from loratune.training import checkpoint
from loratune.training.course import StepDone


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The first 60 records of a bundled data set, and the next 20."""
    folder = tmp_path_factory.mktemp("data")
    lines = data_file("dates", "train").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:60]))
    (folder / "heldout.jsonl").write_text("".join(lines[60:80]))
    return folder


def settings(data, out, **training):
    return lt.RunConfig(
        model=POCKET,
        data=[str(data / "train.jsonl")],
        out=str(out),
        device="cpu",
        lora=lt.LoraConfig(r=4, lora_alpha=8),
        dataset=lt.DataConfig(tokens_per_row=256, eval_data=[str(data / "heldout.jsonl")]),
        training=lt.TrainConfig(**({"learning_rate": 3e-3, "max_steps": 6, "eval_every_steps": 3} | training)),
    )


def test_a_run_leaves_a_folder_that_describes_itself(data, tmp_path):
    out = tmp_path / "out"
    events = list(run(settings(data, out)))
    result = events[-1]
    assert isinstance(result, RunResult)
    assert result.reason == "done"
    prepared = next(e for e in events if isinstance(e, Prepared))
    assert prepared.total_steps == 6
    assert 0.8 < prepared.fullness <= 1

    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "run.toml", "metrics.jsonl", "loss.png", "README.md",
        "checkpoints", "identity.json", "manifest.json", "chat_template.jinja", "prompting.json",
    }  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if "loss" in m] == [1, 2, 3, 4, 5, 6]
    assert [m["step"] for m in lines if "eval_loss" in m] == [3, 6]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "train.jsonl" in card
    assert "60" in card
    assert read_config(out).r == 4


def test_the_folder_holds_the_best_adapter_not_the_last(data, tmp_path):
    """The rate is far too high after a good start: the held-out loss rises again, and the best step is kept."""
    out = tmp_path / "out"
    config = settings(
        data, out, learning_rate=0.3, max_steps=8, eval_every_steps=1, lr_scheduler_type="constant", warmup_ratio=1.0
    )
    result = list(run(config))[-1]
    assert result.kept_step == result.progress.best_step < 8
    kept = (out / "adapter_model.safetensors").read_bytes()
    best = checkpoint.at_step(out / "checkpoints", result.kept_step)
    assert kept == (best / "adapter_model.safetensors").read_bytes()
    last = checkpoint.newest(out / "checkpoints")
    assert kept != (last / "adapter_model.safetensors").read_bytes()


def test_an_existing_folder_is_unchanged(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        list(run(settings(data, out)))
    assert [p.name for p in out.iterdir()] == ["precious.txt"]


def test_overwrite_replaces_only_the_files_of_a_run(data, tmp_path):
    out = tmp_path / "out"
    list(run(settings(data, out, max_steps=2)))
    (out / "precious.txt").write_text("mine")
    config = settings(data, out, max_steps=1)
    config.overwrite = True
    list(run(config))
    assert (out / "precious.txt").read_text() == "mine"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == ["step-000001"]


def test_a_memory_limit_that_nothing_enforces_is_refused(data, tmp_path):
    """On a CPU; before the model is loaded, and nothing is written."""
    config = replace(settings(data, tmp_path / "out", memory="8GiB"), model=str(tmp_path / "no model"))
    with pytest.raises(ConfigError, match=r"memory 8GiB limits GPU memory, and this run is on cpu"):
        list(run(config))
    model, tokenizer = lt.load(POCKET, device="cpu"), lt.load_tokenizer(POCKET)
    lt.attach(model, lt.LoraConfig(r=4))
    with pytest.raises(ConfigError, match="memory 8GiB"):
        lt.train(model, tokenizer, config.data, config.training, dataset=config.dataset)
    assert not (tmp_path / "out").exists()


def test_train_in_memory(data):
    """The API in ten lines: attach, train, and the model answers with the adapter."""
    model, tokenizer = lt.load(POCKET, device="cpu"), lt.load_tokenizer(POCKET)
    lt.attach(model, lt.LoraConfig(r=4, lora_alpha=8), name="dates")
    steps = []
    result = lt.train(
        model,
        tokenizer,
        str(data / "train.jsonl"),
        lt.TrainConfig(learning_rate=3e-3, max_steps=5),
        dataset=lt.DataConfig(tokens_per_row=256),
        on_event=lambda event: steps.append(event) if isinstance(event, StepDone) else None,
    )
    assert len(steps) == 5
    assert steps[-1].loss < steps[0].loss
    assert result.out is None
    assert active(model) == adapter_names(model) == ("dates",)
    assert not model.training


def test_train_in_memory_ends_with_the_best_adapter(data, tmp_path):
    """Without a folder of checkpoints, the model still ends with the best adapter, to the bit."""
    training = settings(
        data,
        "unused",
        learning_rate=0.3,
        max_steps=8,
        eval_every_steps=1,
        lr_scheduler_type="constant",
        warmup_ratio=1.0,
    ).training
    ended = {}
    for out in (None, str(tmp_path / "out")):
        model, tokenizer = lt.load(POCKET, device="cpu"), lt.load_tokenizer(POCKET)
        lt.attach(model, lt.LoraConfig(r=4, lora_alpha=8))
        dataset = lt.DataConfig(tokens_per_row=256, eval_data=[str(data / "heldout.jsonl")])
        result = lt.train(model, tokenizer, str(data / "train.jsonl"), training, dataset=dataset, out=out)
        assert result.kept_step < 8
        ended[out is None] = trainable_parameters(model)
    assert all(torch.equal(ended[True][path], ended[False][path]) for path in ended[True])


def test_train_writes_the_files_of_the_command_line(data, tmp_path):
    model, tokenizer = lt.load(POCKET, device="cpu"), lt.load_tokenizer(POCKET)
    lt.attach(model, lt.LoraConfig(r=4, lora_alpha=8), seed=0)
    config = settings(data, tmp_path / "cli")
    lt.train(
        model,
        tokenizer,
        config.data,
        config.training,
        dataset=config.dataset,
        out=str(tmp_path / "api"),
    )
    list(run(config))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "api" / name).read_bytes() == (tmp_path / "cli" / name).read_bytes()


def test_train_needs_exactly_one_active_adapter(data):
    model, tokenizer = lt.load(POCKET, device="cpu"), lt.load_tokenizer(POCKET)
    with pytest.raises(AdapterError, match="attach"):
        lt.train(model, tokenizer, str(data / "train.jsonl"))


def test_training_leaves_the_base_unchanged(data, tmp_path):
    model, tokenizer = lt.load(POCKET, device="cpu"), lt.load_tokenizer(POCKET)
    prompt = torch.tensor([tokenizer("hello")["input_ids"]])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logits = model(input_ids=prompt).logits
    lt.attach(model, lt.LoraConfig(r=4))
    lt.train(model, tokenizer, str(data / "train.jsonl"), lt.TrainConfig(max_steps=2, learning_rate=1e-2),
             dataset=lt.DataConfig(tokens_per_row=256))  # fmt: skip
    assert not torch.equal(model(input_ids=prompt).logits, logits)
    lt.detach(model)
    assert torch.equal(model(input_ids=prompt).logits, logits)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_adapter_has_the_name_of_the_run_only_in_memory(data, tmp_path):
    list(run(settings(data, tmp_path / "out", max_steps=1)))
    assert ADAPTER not in (tmp_path / "out" / "adapter_model.safetensors").read_bytes()[:20000].decode("latin-1")
