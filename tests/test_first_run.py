"""The first run, without flags: it learns, its settings are complete, and later commands ask as training did."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import loratune as lt
from benchmarks.first_run import DATA, rows_of_table
from loratune.cli import main
from loratune.config import DataConfig, RunConfig, TrainConfig, from_dict, read_toml
from loratune.data import prompting
from loratune.infer.engine import Sampling
from loratune.infer.opened import open_folders
from loratune.runs.metrics import losses_of
from loratune.runs.run import Prepared, run
from loratune.screen.chat import Chat

SHORT = Sampling(max_new_tokens=24, temperature=0.0, top_p=1.0, top_k=0, seed=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `extraction` data (prompt and completion) and a run without flags over them."""
    folder = tmp_path_factory.mktemp("first run")
    train, held = DATA["extraction"]()
    for name, records in (("train", train[:60]), ("held", held[:20])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["train", "loratune/pocket", str(folder / "train.jsonl"), "--out", str(folder / "run")]
    assert main([*words, "--device", "cpu", "--cache-dir", "", "--eval-data", str(folder / "held.jsonl")]) == 0
    return folder


def settings(folder: Path) -> RunConfig:
    return from_dict(RunConfig, read_toml(str(folder / "run.toml")), "run.toml")


def test_no_flags_learn_and_leave_complete_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = settings(folder / "run")
    assert found.dataset.tokens_per_row == 320
    assert found.training.gradient_accumulation_steps == 1
    assert found.training.epochs == 10
    assert found.training.learning_rate == 1.8e-3
    assert main(["eval", str(folder / "run"), str(folder / "held.jsonl"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["results"][0]["exact_match"] >= 0.8
    assert "note" not in result


def test_preview_shows_the_choices_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder / "train.jsonl"), "--eval-data", str(folder / "held.jsonl"), "--cache-dir", ""]
    assert main(["preview", "loratune/pocket", *words]) == 0
    shown = capsys.readouterr().out
    for line in (
        "tokens_per_row = 320:",
        "gradient_accumulation_steps = 1:",
        "epochs = 10:",
        "learning_rate = 0.0018:",
    ):
        assert line in shown, shown
    assert main(["estimate", "loratune/pocket", "--gpu", "24GiB", "--data", words[0]]) == 0
    assert "tokens_per_row = 256:" in capsys.readouterr().out


def test_a_run_from_its_run_toml_is_the_same_run(folder: Path) -> None:
    stops = iter([False, False, True])
    events = list(run(replace(settings(folder / "run"), out=str(folder / "again")), stop=lambda: next(stops)))
    assert next(event for event in events if isinstance(event, Prepared)).choices == ()
    losses = losses_of(folder / "again" / "metrics.jsonl")
    assert len(losses) == 3
    assert losses == losses_of(folder / "run" / "metrics.jsonl")[:3]


def test_chat_asks_as_in_training(folder: Path) -> None:
    assert prompting.read(folder / "run") == ("completion",)
    opened = open_folders([str(folder / "run")], device="cpu")
    assert opened.tokenizer.chat_template
    output = io.StringIO()
    console = Console(file=output, width=100)
    talk = Chat(
        opened.model,
        opened.tokenizer,
        stop_ids=opened.stop_ids,
        console=console,
        sampling=SHORT,
        forms=opened.forms,
    )
    record = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    ids = talk._prompt([{"role": "user", "content": record["prompt"]}])
    assert opened.tokenizer.decode(ids, skip_special_tokens=True) == record["prompt"]
    talk.welcome("base")
    assert "was trained on prompts and completions without a template" in output.getvalue()
    talk.say("/adapter none")  # the base knows its template
    assert "<|assistant|>" in opened.tokenizer.decode(talk._prompt([{"role": "user", "content": "Hi"}]))


def test_merge_resize_and_eval_keep_the_form(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(folder / "run"), "--out", str(folder / "merged")]) == 0
    assert open_folders([str(folder / "merged")], device="cpu").forms == {None: ("completion",)}
    assert main(["resize", str(folder / "run"), "--out", str(folder / "small"), "--rank", "4"]) == 0
    assert prompting.read(folder / "small") == ("completion",)
    turns = [{"role": "user", "content": "Since 1990, Ada lives in Oslo."}, {"role": "assistant", "content": "x"}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    capsys.readouterr()
    assert main(["eval", str(folder / "run"), str(folder / "chat.jsonl"), "--json"]) == 0
    note = json.loads(capsys.readouterr().out)["note"]
    assert "trained on prompts and completions without a template, but these records are conversations" in note


def test_the_next_commands_fit_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("The cat sat.\n\nThe dog ran.\n\nA bird sang.\n")
    out = tmp_path / "my run"
    words = ["train", "loratune/pocket", str(tmp_path / "a.txt"), "--out", str(out), "--max-steps", "2"]
    assert main([*words, "--device", "cpu", "--cache-dir", ""]) == 0
    shown = capsys.readouterr().out
    assert f"loratune eval '{out}' HELD_OUT.jsonl --no-generate" in shown
    assert f"loratune chat '{out}'" in shown
    assert "only 2 optimizer steps" in " ".join(shown.split())
    assert prompting.read(out) == ("text",)


def test_a_row_far_beyond_the_data_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "huge"
    words = ["train", "loratune/pocket", str(folder / "train.jsonl"), "--out", str(out), "--device", "cpu"]
    assert main([*words, "--tokens-per-row", "10000000", "--cache-dir", ""]) == 2
    assert "tokens_per_row is 10,000,000, but all training documents together have" in capsys.readouterr().err
    assert not out.exists()


def test_the_same_command_resumes_with_the_choices_of_the_run(folder: Path) -> None:
    data = [str(folder / "train.jsonl")]
    config = RunConfig(model="loratune/pocket", data=data, out=str(folder / "stopped"), device="cpu")
    stops = iter([False, False, True])
    list(run(config, stop=lambda: next(stops)))
    stops = iter([False, True])
    events = list(run(replace(config, resume=True), stop=lambda: next(stops)))
    assert [e.step for e in events if hasattr(e, "grad_norm")] == [4, 5]


def test_python_and_a_sweep_choose_alike(folder: Path, tmp_path: Path) -> None:
    data = [str(folder / "train.jsonl")]
    model, tokenizer = lt.load("loratune/pocket", device="cpu"), lt.load_tokenizer("loratune/pocket")
    lt.attach(model, lt.LoraConfig(), name="a")
    events: list[object] = []
    lt.train(model, tokenizer, data, TrainConfig(max_steps=1), dataset=DataConfig(), on_event=events.append)
    prepared = next(event for event in events if isinstance(event, Prepared))
    assert {choice.setting: choice.value for choice in prepared.choices} == {
        "tokens_per_row": 256,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1.8e-3,
    }
    (tmp_path / "jobs.toml").write_text(
        f'data = ["{data[0]}"]\nmax_steps = 1\n[grid]\nlearning_rate = [1e-4, 2e-4]\n'
    )
    words = ["sweep", "loratune/pocket", str(tmp_path / "jobs.toml"), "--out", str(tmp_path / "sweep")]
    assert main([*words, "--device", "cpu"]) == 0
    for job, rate in (("rate0.0001", 1e-4), ("rate0.0002", 2e-4)):
        found = settings(tmp_path / "sweep" / job)
        assert (found.dataset.tokens_per_row, found.training.gradient_accumulation_steps) == (256, 1)
        assert found.training.learning_rate == rate


def test_the_table_compares_with_the_best_run_of_the_sweep(tmp_path: Path) -> None:
    """Of equally good runs the shorter one counts; a sweep in one bank has no times of single runs."""
    jobs = [(0.5, 180, 40.0), (0.8, 180, 40.0), (0.8, 60, 10.0)]
    sweep = [{"metric": m, "rate": 0.001, "steps": n, "seconds": s} for m, n, s in jobs]
    plain = {"metric": 0.76, "seconds": 30.0, "steps": 300, "epochs": 6, "tokens_per_row": 256}
    found = {"records": 2_400, "no flags": plain, "sweep": sweep, "sweep seconds": 90.0}
    (tmp_path / "dates.json").write_text(json.dumps(found))
    row = "| dates | 2,400 | 256, 6, 300 | 0.760 | 0.800 (rate 0.001, 60 steps) | 95% | "
    assert list(rows_of_table(tmp_path))[2:] == [row + "3.0 | 0.33 |"]
    for job in sweep:
        del job["seconds"]
    (tmp_path / "dates.json").write_text(json.dumps(found))
    assert list(rows_of_table(tmp_path))[2:] == [row + " | 0.33 |"]
