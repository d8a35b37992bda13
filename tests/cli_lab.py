"""Helpers for tests of the command line: folders of small models, and a way to run a verb."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as tf

from loratune import cli
from loratune.box import MODEL_DIR
from tests.conftest import SMALL

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CHAT = [
    {"messages": [{"role": "user", "content": f"double {n}"}, {"role": "assistant", "content": str(2 * n)}]}
    for n in range(24)
]
SHORT = ["--tokens-per-row", "64", "--r", "2", "--cache-dir", ""]
"""Settings for steps of a few milliseconds."""


def small_model(folder: Path, **settings: Any) -> Path:
    """Saves a random two-layer Llama with the bundled model's tokenizer."""
    sizes = SMALL | {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 5} | settings
    tf.set_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(MODEL_DIR / name, folder)
    return folder


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Outcome:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


def loratune(*words: str) -> Outcome:
    """Runs a verb in this process, as `loratune WORDS` would."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: Any = cli.main(words)
        except SystemExit as leaving:  # the argument parser exits
            status = leaving.code
    return Outcome(int(status or 0), out.getvalue(), err.getvalue())


def start(*words: str, cwd: Path, **settings: Any) -> subprocess.Popen[str]:
    """Starts `loratune WORDS` in a process of its own, with a cache in the working folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / ".cache"), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "loratune", *words],
        cwd=cwd,
        env=environment,
        stdin=settings.pop("stdin", subprocess.DEVNULL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def finish(process: subprocess.Popen[str], given: str | None = None, timeout: float = 120) -> Outcome:
    """Waits for a process from `start`."""
    out, err = process.communicate(given, timeout=timeout)
    return Outcome(process.returncode, out, err)


def tree(folder: Path) -> dict[str, str]:
    """All files and folders below, hidden ones too: path -> hash of the content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
