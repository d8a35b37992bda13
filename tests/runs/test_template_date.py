"""A run keeps the date that its chat template prints, so it can be resumed on another day."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from loratune.box import data_file
from loratune.config import DataConfig, LoraConfig, RunConfig, TrainConfig, from_dict, read_toml
from loratune.errors import ConfigError
from loratune.runs.run import run
from loratune.sweep.folder import read_state
from loratune.sweep.plan import read_plan
from loratune.sweep.run import sweep

CLOCK = (
    "{{- '<|system|>Today is ' + strftime_now('%d %b %Y') + '<|end|>' }}"
    "{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A short run with a template that prints the date."""
    (tmp_path / "clock.jinja").write_text(CLOCK)
    return RunConfig(
        model="loratune/pocket",
        data=[str(data_file("dates", "heldout"))],
        out=str(tmp_path / "run"),
        device="cpu",
        lora=LoraConfig(r=2),
        dataset=DataConfig(tokens_per_row=512, chat_template=str(tmp_path / "clock.jinja")),
        training=TrainConfig(learning_rate=1e-3, max_steps=2, save_every_steps=1),
    )


def stored(folder: str) -> str | None:
    file = f"{folder}/run.toml"
    return from_dict(RunConfig, read_toml(file), file).dataset.template_date


def test_a_run_stores_the_day_on_which_it_began_if_the_template_prints_it(config: RunConfig, tmp_path: Path) -> None:
    list(run(config))
    assert stored(config.out) == datetime.now().date().isoformat()
    plain = replace(config, out=str(tmp_path / "plain"), dataset=replace(config.dataset, chat_template=None))
    list(run(plain))
    assert stored(plain.out) is None


def test_a_run_goes_on_with_its_date_on_another_day(config: RunConfig) -> None:
    """The settings name no date, as on the command line; the run began on 2 January 2020."""
    began = replace(config, dataset=replace(config.dataset, template_date="2020-01-02"))
    list(run(began))
    longer = replace(config.training, max_steps=3)
    events = list(run(replace(config, resume=True, training=longer)))
    assert stored(config.out) == "2020-01-02"
    assert events[-1].progress.step == 3  # type: ignore[union-attr]
    today = replace(config.dataset, template_date="2021-01-02")
    with pytest.raises(ConfigError, match="template_date is '2020-01-02' in this run and '2021-01-02' now"):
        list(run(replace(config, resume=True, dataset=today)))


def test_the_jobs_of_a_sweep_have_the_date_of_the_sweep(config: RunConfig, tmp_path: Path) -> None:
    text = f"""
data = ["{config.data[0]}"]
chat_template = "{config.dataset.chat_template}"
tokens_per_row = 512
max_steps = 2
r = 2
[grid]
learning_rate = [1e-3]
"""
    (tmp_path / "jobs.toml").write_text(text)
    plan = read_plan(str(tmp_path / "jobs.toml"), model="loratune/pocket", out=str(tmp_path / "sweep"), device="cpu")
    list(sweep(plan, text, str(tmp_path / "sweep")))
    (job,) = plan.jobs
    assert stored(f"{tmp_path}/sweep/{job.name}") == read_state(tmp_path / "sweep").date
