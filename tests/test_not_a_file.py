"""A pipe or a link to nowhere in place of any file that is read: one error that names it, at once.

`test_foreign.py` has folders and endless devices.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli_lab import CHAT, SHORT, Outcome, loratune, small_model, write_jsonl

TRAIN = ("train", "base", "chat.jsonl", "--out", "out", *SHORT)
RESUME = ("train", "--resume", "--out", "adapter", "--max-steps", "9")
FILES: dict[str, tuple[str, ...]] = {
    "chat.jsonl": TRAIN,
    "settings.toml": ("train", "-c", "settings.toml"),
    "own.jinja": (*TRAIN, "--chat-template", "own.jinja"),
    "jobs.toml": ("sweep", "base", "jobs.toml", "--out", "out"),
    "base/config.json": TRAIN,
    "base/generation_config.json": ("merge", "adapter", "--model", "base", "--out", "out"),
    "base/model.safetensors": TRAIN,
    "base/tokenizer.json": TRAIN,
    "base/tokenizer_config.json": TRAIN,
    "base/chat_template.jinja": TRAIN,
    "adapter/adapter_config.json": ("inspect", "adapter"),
    "adapter/adapter_model.safetensors": ("merge", "adapter", "--out", "out"),
    "adapter/run.toml": ("inspect", "adapter"),
    "adapter/metrics.jsonl": ("inspect", "adapter"),
    "adapter/identity.json": ("merge", "adapter", "--out", "out"),
    "adapter/prompting.json": ("eval", "adapter", "chat.jsonl"),
    "adapter/manifest.json": ("merge", "adapter", "--out", "out"),
    "adapter/chat_template.jinja": ("eval", "adapter", "chat.jsonl"),
    "adapter/checkpoints/data.json": RESUME,
}
IN_CHECKPOINTS = ("manifest.json", "progress.json", "adapter_model.safetensors", "optimizer.safetensors")
KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": lambda path: os.mkfifo(path),
    "link": lambda path: path.symlink_to("nowhere"),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("files")
    small_model(here / "base")
    write_jsonl(here / "chat.jsonl", CHAT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        made = loratune("train", "base", "chat.jsonl", "--out", "adapter", "--max-steps", "2", *SHORT)
    assert made.status == 0, made.err
    return here


@contextmanager
def within(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the template as working folder."""
    shutil.copytree(template, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "200")
    recorded = Path("adapter/identity.json")  # as if the adapter had been trained here
    recorded.write_text(recorded.read_text().replace(str(template), str(tmp_path / "here")))


def run(name: str, kind: str, *words: str) -> Outcome:
    """Runs a verb after a file was replaced."""
    Path(name).unlink(missing_ok=True)
    KINDS[kind](Path(name))
    with within(5):
        return loratune(*words)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_one_error_names_it(name: str, kind: str) -> None:
    outcome = run(name, kind, *FILES[name])
    assert outcome.status == 2, outcome
    assert outcome.err.count("error: ") == 1, outcome.err
    assert Path(name).name in outcome.err
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IN_CHECKPOINTS)
def test_a_note_names_it_and_the_checkpoint_before_is_used(name: str, kind: str) -> None:
    outcome = run(f"adapter/checkpoints/step-000002/{name}", kind, *RESUME)
    assert outcome.status == 0, outcome.err
    assert f"step-000002: {name}" in outcome.out or f"no {name}" in outcome.out, outcome.out
