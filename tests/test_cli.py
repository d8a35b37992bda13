"""The command line as a whole: it starts quickly, lists its settings, and interrupted runs can be resumed."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratune as lt
from loratune.cli import VERBS, process
from loratune.cli.process import NOT_FOR_TEXT
from loratune.config import RunConfig, from_dict
from tests.cli_lab import CHAT, SHORT, finish, loratune, small_model, start, tree, write_jsonl

STEPS = 120
LONG = ["--max-steps", str(STEPS), "--save-every-steps", "20", "--eval-every-steps", "30", "--lora-dropout", "0.1"]
RUN = ["train", "base", "chat.jsonl", *SHORT, *LONG, "--learning-rate", "0.01", "--gradient-accumulation-steps", "2"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a model, data and one uninterrupted run `whole`. All runs use one thread."""
    folder = tmp_path_factory.mktemp("cli")
    small_model(folder / "base")
    write_jsonl(folder / "chat.jsonl", CHAT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "120")
        done = loratune(*RUN, "--out", "whole")
        assert done.status == 0, done.err
        yield folder
    torch.set_num_threads(threads)


def same_run(a: Path, b: Path) -> None:
    """Asserts equal adapters to the bit, and equal losses at the same steps."""
    ours, theirs = load_file(a / "adapter_model.safetensors"), load_file(b / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert losses(a) == losses(b)


def losses(run: Path) -> list[tuple[int, Any, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]


# Starting


def test_help_appears_within_half_a_second() -> None:
    """About a tenth is usual; most of it is Python itself."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "loratune.cli", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) <= 0.5, seconds


@pytest.mark.parametrize("module", ["loratune", "loratune.cli"])
def test_the_command_line_runs_as_a_module(module: str, tmp_path: Path) -> None:
    """Launchers such as torchrun start a module; the exit status must be the command's own."""
    version = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (version.returncode, version.stdout) == (0, f"loratune {lt.__version__}\n")
    missing = subprocess.run([sys.executable, "-m", module, "inspect", str(tmp_path / "none")], capture_output=True)
    assert missing.returncode == 2


@pytest.mark.parametrize(
    "code",
    [
        "import loratune",
        "from loratune.cli import main; main(['--help'])",
        "from loratune.cli import main; main(['--version'])",
        "from loratune.cli import main; main(['train', 'm', 'd', '--out', 'o', '--print-config'])",
        "from loratune.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib', 'pyarrow', 'numpy'}"
    check = f"import sys\n{code}\nsys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_imports_nothing_for_images_or_sound_and_hides_nothing_afterwards(tmp_path: Path) -> None:
    """Installed optional packages are hidden from transformers while it is imported, and visible afterwards."""
    for name in NOT_FOR_TEXT:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    check = f"""
import importlib, sys
from loratune.cli.process import NOT_FOR_TEXT, library_imports
sys.path.insert(0, {str(tmp_path)!r})
with library_imports():
    from transformers import PreTrainedModel
    from loratune.runs.run import run
assert not sys.modules.keys() & set(NOT_FOR_TEXT), sys.modules.keys() & set(NOT_FOR_TEXT)
for name in NOT_FOR_TEXT:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("configured", [False, True])
def test_kernels_of_flash_attention_are_cached_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, configured: bool
) -> None:
    names = [f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("ENABLED", "DIR")]
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if configured:
            monkeypatch.setenv(name, "mine")
    check = """
import os
from loratune.cli.process import library_imports
with library_imports():
    print(os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"], os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == (["mine"] * 2 if configured else ["1", "/somewhere/loratune/flash_attention"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    said = loratune(verb, "--help")
    assert said.status == 0
    assert f"usage: loratune {verb}" in said.out
    assert " STR [" not in said.out.splitlines()[0]  # positionals have names
    assert verb in loratune("--help").out


# Settings


def test_a_printed_configuration_is_complete_and_gives_itself_again(here: Path) -> None:
    words = ["train", "base", "chat.jsonl", "more.jsonl", "--out", "o", "--r", "3", "--target-modules", "q_proj"]
    words += ["--adam-epsilon", "1e-7", "--eval-data", "held.jsonl", "--log-to", "tensorboard", "--epochs", "3"]
    printed = loratune(*words, "--print-config")
    assert printed.status == 0, printed.err
    (here / "printed.toml").write_text(printed.out)
    assert loratune("train", "-c", "printed.toml", "--print-config").out == printed.out
    config = from_dict(RunConfig, tomllib.loads(printed.out), "printed")
    assert (config.data, config.lora.r, config.training.adam_epsilon) == (["chat.jsonl", "more.jsonl"], 3, 1e-7)
    assert config.lora.target_modules == ["q_proj"]
    for section in ("lora", "dataset", "training"):
        for name, value in vars(getattr(config, section)).items():
            assert value is None or name in tomllib.loads(printed.out)[section]


def test_flags_win_over_the_file_and_the_file_over_defaults(here: Path) -> None:
    (here / "some.toml").write_text(
        'model = "base"\ndata = ["chat.jsonl"]\nout = "o"\n[lora]\nr = 3\nlora_alpha = 7\n'
    )
    printed = tomllib.loads(loratune("train", "-c", "some.toml", "--r", "5", "--print-config").out)
    assert (printed["lora"]["r"], printed["lora"]["lora_alpha"], printed["lora"]["lora_dropout"]) == (5, 7, 0.0)


def test_positionals_win_over_the_file(here: Path) -> None:
    (here / "some.toml").write_text('model = "base"\ndata = ["chat.jsonl"]\nout = "o"\n')
    printed = tomllib.loads(loratune("train", "other", "a.jsonl", "b.jsonl", "-c", "some.toml", "--print-config").out)
    assert (printed["model"], printed["data"]) == ("other", ["a.jsonl", "b.jsonl"])


# Output folders


def test_a_run_leaves_a_folder_that_describes_itself(here: Path) -> None:
    whole = here / "whole"
    names = {"adapter_config.json", "adapter_model.safetensors", "run.toml", "metrics.jsonl", "loss.png", "README.md"}
    assert {path.name for path in whole.iterdir()} == names | {
        "checkpoints",
        "identity.json",
        "manifest.json",
        "chat_template.jinja",
        "prompting.json",
    }
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [step for step, loss, _ in losses(whole) if loss is not None] == list(range(1, STEPS + 1))
    assert [step for step, _, held_out in losses(whole) if held_out is not None] == [30, 60, 90, 120]


def test_its_run_toml_runs_again_to_the_same_adapter(here: Path) -> None:
    again = loratune("train", "-c", "whole/run.toml", "--out", "again")
    assert again.status == 0, again.err
    same_run(here / "again", here / "whole")


def test_every_verb_takes_the_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(here / "whole")
    measured = loratune("eval", "whole", "chat.jsonl", "--json", "--limit", "4", "--max-new-tokens", "8")
    assert measured.status == 0, measured.err
    assert isinstance(json.loads(measured.out), dict)
    shown = loratune("inspect", "whole")
    assert shown.status == 0, shown.err
    assert f"{STEPS}" in shown.out
    previewed = loratune("preview", "base", "chat.jsonl", "--tokens-per-row", "64", "--cache-dir", "")
    assert previewed.status == 0, previewed.err
    merged = loratune("merge", "whole", "--out", "merged")
    assert merged.status == 0, merged.err
    assert (here / "merged/model.safetensors").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("double 4\n/adapter none\ndouble 4\n/nonsense\n"))
    talked = loratune("chat", "whole", "--max-new-tokens", "4")
    assert talked.status == 0, talked.err
    assert "> double 4" in talked.out
    assert "unknown command /nonsense" in talked.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("double 4\n"))
    assert loratune("chat", "merged", "--max-new-tokens", "4").status == 0
    assert tree(here / "whole") == before


# Interrupting and resuming


@pytest.fixture(scope="module")
def stopped(here: Path) -> dict[str, tuple[int, str]]:
    """Three runs in processes of their own, stopped at a random step: folder -> (exit status, output)."""
    ways = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM, "sigkill": signal.SIGKILL}
    running = {name: start(*RUN, "--out", name, cwd=here) for name in ways}
    waiting = {name: random.randint(2, 60) for name in ways}
    waiting["sigkill"] += 20  # after the first checkpoint
    deadline = time.monotonic() + 120
    while waiting and time.monotonic() < deadline:
        for name, step in list(waiting.items()):
            file = here / name / "metrics.jsonl"
            if file.exists() and file.read_bytes().count(b"\n") >= step:
                running[name].send_signal(ways[name])
                del waiting[name]
        time.sleep(0.002)
    outcomes = {name: finish(process) for name, process in running.items()}
    return {name: (outcome.status, outcome.out + outcome.err) for name, outcome in outcomes.items()}


@pytest.mark.parametrize("way", ["ctrl-c", "sigterm"])
def test_a_signal_saves_and_resuming_is_as_if_it_had_not_come(way: str, here: Path, stopped: Any) -> None:
    status, said = stopped[way]
    assert status == 130, said  # so `train && merge` does not merge
    assert "interrupted; everything is saved" in said
    assert f"loratune train --resume --out {way}" in said
    assert (here / way / "adapter_model.safetensors").exists()
    assert losses(here / way)[-1][0] < STEPS, "the run was over before the signal came"
    resumed = loratune("train", "--resume", "--out", way)
    assert resumed.status == 0, resumed.err
    assert "continuing after step" in resumed.out
    same_run(here / way, here / "whole")


def test_a_killed_run_goes_on_from_its_last_checkpoint(here: Path, stopped: Any) -> None:
    assert stopped["sigkill"][0] == -signal.SIGKILL
    assert losses(here / "sigkill")[-1][0] < STEPS, "the run was over before the signal came"
    resumed = loratune("train", "--resume", "--out", "sigkill")
    assert resumed.status == 0, resumed.err
    same_run(here / "sigkill", here / "whole")


def test_a_run_killed_after_its_last_step_is_finished(here: Path) -> None:
    """A run can be killed between its last checkpoint and writing the adapter."""
    shutil.copytree(here / "whole", here / "late")
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png"):
        (here / "late" / name).unlink()
    resumed = loratune("train", "--resume", "--out", "late")
    assert resumed.status == 0, resumed.err
    same_run(here / "late", here / "whole")
    assert (here / "late/README.md").exists()


def test_a_complete_run_can_be_extended(here: Path) -> None:
    """More steps, and the data file at another path: only its content counts."""
    shutil.copytree(here / "whole", here / "longer")
    shutil.copy(here / "chat.jsonl", here / "moved.jsonl")
    words = ["--resume", "--out", "longer", "--max-steps", str(STEPS + 5)]
    resumed = loratune("train", "base", "moved.jsonl", *words)
    assert resumed.status == 0, resumed.err
    assert f"training.max_steps rises from {STEPS} to {STEPS + 5}" in resumed.out
    assert [step for step, loss, _ in losses(here / "longer") if loss is not None] == list(range(1, STEPS + 6))
    assert tomllib.loads((here / "longer/run.toml").read_text())["training"]["max_steps"] == STEPS + 5


def test_a_run_that_stopped_early_stays_stopped_until_patience_rises(here: Path) -> None:
    patient = [*RUN, "--early-stopping-patience", "1", "--learning-rate", "1e-9", "--eval-every-steps", "2"]
    words = [*patient, "--max-steps", "40", "--out", "early"]
    done = loratune(*words)
    assert done.status == 0, done.err
    ended = losses(here / "early")[-1][0]
    assert "stopped early" in done.out
    assert ended < 40
    refused = loratune("train", "--resume", "--out", "early")
    assert refused.status == 2
    assert "--early-stopping-patience" in refused.err
    resumed = loratune("train", "--resume", "--out", "early", "--early-stopping-patience", "2")
    assert resumed.status == 0, resumed.err
    assert losses(here / "early")[-1][0] > ended


def test_errors_cannot_control_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """Messages quote data files, templates and names of files, also names that are not UTF-8."""
    process.print_error("bad \x1b[31mred\x1b]0;title\x07 \x9b31m \udce9 name\nnext")
    shown = capfd.readouterr().err
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\x9b" not in shown
    assert "\\udce9 name" in shown


def test_ctrl_c_before_the_first_step_stops_at_once() -> None:
    """While data are rendered, nothing needs saving; once training asks, the step ends first."""
    with process.stop_on_signals(process.console()) as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
