"""Changes of settings that allow a run to be resumed, and changes that would make it another run."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratune import atomic, tables
from loratune.base.identity import BaseIdentity, RunIdentity
from loratune.config import DataConfig, LoraConfig, RunConfig, TrainConfig, to_toml
from loratune.data.examples import Example
from loratune.data.feed import Dataset
from loratune.errors import ConfigError, OutputError
from loratune.runs.resume import check_data, find_run, record_data
from loratune.training import checkpoint
from loratune.training.checkpoint import Progress

# A value other than the default for every setting that decides the result.
OTHERS = {
    "": {"model": "another", "precision": "bfloat16", "trust_remote_code": True},
    "lora": {
        "r": 8,
        "lora_alpha": 1.0,
        "lora_dropout": 0.5,
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.down_proj"],
        "exclude_modules": ["v_proj"],
        "use_rslora": True,
        "use_dora": True,
        "bias": "all",
        "modules_to_save": ["lm_head"],
        "init_lora_weights": "gaussian",
        "layers_to_transform": [0],
        "layers_pattern": ["layers"],
        "rank_pattern": {"q": 1},
        "alpha_pattern": {"q": 1.0},
    },
    "dataset": {
        "format": "text",
        "train_on": "all",
        "tokens_per_row": 64,
        "truncate": True,
        "eval_fraction": 0.5,
        "template_date": "2026-01-02",
    },
    "training": {
        "objective": "other",
        "learning_rate": 1.0,
        "loraplus_lr_ratio": 4.0,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.5,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.5,
        "adam_beta1": 0.5,
        "adam_beta2": 0.5,
        "adam_epsilon": 0.5,
        "max_grad_norm": 0.5,
        "eval_every_steps": 7,
        "optim": "adamw_8bit",
        "seed": 7,
    },
}
FREE = {
    "": {"out", "device", "overwrite", "resume", "data"},
    "lora": set(),
    "dataset": {"num_proc", "cache_dir", "eval_data", "chat_template"},
    "training": {"activations", "memory", "save_every_steps", "log_to", "epochs", "max_steps"}
    | {"early_stopping_patience"},
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run with one checkpoint."""
    config = RunConfig(model="base", data=["a.jsonl"], out=str(tmp_path), training=TrainConfig(epochs=2, max_steps=9))
    atomic.write_text(tmp_path / "run.toml", to_toml(config))
    identity = RunIdentity("run", BaseIdentity("base", str(Path("base").resolve()), None, None), None)
    atomic.write_text(tmp_path / "identity.json", atomic.to_json(asdict(identity)))
    save_checkpoint(tmp_path, 3)
    return config


def save_checkpoint(out: Path, step: int, run_id: str = "run", **progress: Any) -> Path:
    """A checkpoint with an adapter of a few bytes."""

    def adapter(folder: Path) -> None:
        atomic.write_text(folder / "adapter_config.json", "{}")
        atomic.write_bytes(folder / "adapter_model.safetensors", bytes(100))

    return checkpoint.write_parts(out / "checkpoints", adapter, {}, Progress(step=step, **progress), run_id)


def changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    return replace(config, **({section: replace(getattr(config, section), **values)} if section else values))


def test_every_setting_is_either_free_or_checked() -> None:
    """A new setting must be added to one of the two lists."""
    for section, kind in {"": RunConfig, "lora": LoraConfig, "dataset": DataConfig, "training": TrainConfig}.items():
        names = {setting.name for setting in fields(kind)} - {"lora", "dataset", "training"}
        assert names == FREE[section] | OTHERS[section].keys()
        assert is_dataclass(kind)


def test_the_same_settings_can_be_resumed(config: RunConfig, tmp_path: Path) -> None:
    found = find_run(replace(config, resume=True, device="cpu", data=["moved.jsonl"]))
    assert (found.checkpoint, found.notes) == (tmp_path / "checkpoints/step-000003", [])


@pytest.mark.parametrize(("section", "name"), [(s, name) for s, names in OTHERS.items() for name in names])
def test_settings_that_decide_the_result_must_not_change(
    config: RunConfig, section: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tables.OBJECTIVES, "other", "tests.extending.toy_objective:pairs")
    if name == "layers_pattern":
        config = changed(config, "lora", layers_to_transform=[0])
        atomic.write_text(Path(config.out) / "run.toml", to_toml(config))
    with pytest.raises(ConfigError, match=f"{name} is .* in this run and .* now"):
        find_run(changed(config, section, **{name: OTHERS[section][name]}))


@pytest.mark.parametrize(
    ("values", "goes_on"),
    [
        ({"max_steps": 10}, True),
        ({"max_steps": 8}, False),
        ({"max_steps": None}, True),
        ({"epochs": 3}, True),
        ({"epochs": 1}, False),
        ({"early_stopping_patience": 3}, False),
    ],
)
def test_a_run_may_only_get_longer(config: RunConfig, values: dict[str, int], goes_on: bool) -> None:
    longer = changed(config, "training", **values)
    if goes_on:
        (note,) = find_run(longer).notes
        assert next(iter(values)) in note
    else:
        with pytest.raises(ConfigError, match="can only rise"):
            find_run(longer)


def test_a_folder_without_a_checkpoint(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no checkpoint"):
        find_run(replace(config, out=str(tmp_path / "elsewhere")))


def dataset(tokens: list[int], weights: list[float], **hashes: str) -> Dataset:
    example = Example(np.array(tokens, dtype=np.int32), np.array(weights, dtype=np.float32), "a:1")
    return Dataset([example], [], [], hashes)


def test_data_are_compared_by_their_rendered_content(tmp_path: Path) -> None:
    record_data(tmp_path, dataset([1, 2], [0, 1], a="x"))
    check_data(tmp_path, dataset([1, 2], [0, 1], moved="x"))
    with pytest.raises(ConfigError, match="a has changed"):
        check_data(tmp_path, dataset([1, 3], [0, 1], a="y"))
    with pytest.raises(ConfigError, match="b has changed"):
        check_data(tmp_path, dataset([1, 3], [0, 1], a="x", b="y"))
    with pytest.raises(ConfigError, match="tokenizer or chat template has changed"):
        check_data(tmp_path, dataset([1, 2], [1, 1], a="x"))


def test_a_record_of_the_data_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"data\.json"):
        check_data(tmp_path, dataset([1], [0]))
