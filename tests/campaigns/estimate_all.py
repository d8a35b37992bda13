"""`loratune estimate` on every configuration of transformers' causal-LM mapping, and on models people use.

    python -m tests.campaigns.estimate_all [--only llama mixtral ...] [--gpu 24GiB] [--out FILE]

Each configuration is estimated by the command line in a process of its own, which already has the imports. Right is
a JSON answer of finite numbers within 10 seconds, or one error that says why the configuration makes no model. The
script prints one line per configuration and exits with 1 if any line is wrong. FILE gets one JSON line for each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loratune.cli import main
from tests.campaigns.realistic_configs import REALISTIC

SECONDS = 10.0
_NO_MODEL = (
    "no causal language model can be made of this configuration",
    "no usable model configuration",
    "cannot be estimated",
)


class Answer(NamedTuple):
    """Outcome of one estimate."""

    status: int
    """Exit status; -1 for a traceback, -9 for a process that did not end."""
    seconds: float
    said: str
    """Standard output and standard error."""

    @property
    def fault(self) -> str:
        """The violated property; "" if there is none."""
        if self.status not in (0, 2):
            return "does not end" if self.status == -signal.SIGKILL else "traceback"
        if self.seconds > SECONDS:
            return "slow"
        if self.status == 2:
            return "" if any(reason in self.said for reason in _NO_MODEL) else "refused"
        found = json.loads(self.said)
        numbers = [*found["bytes"].values(), found["total_bytes"], found["tokens_per_second"] or 0]
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or not found["bytes"]["base"]:
            return "wrong numbers"
        return "" if found["fits"] or not found["tokens_per_second"] else "speed without memory"


def configurations(only: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, config.json): the default of every model type of the mapping, then the realistic ones."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if only is None or kind in only:
            yield kind, {"model_type": kind}
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(CONFIG_MAPPING)
    for name, config in REALISTIC.items():
        if only is None or name in only:
            yield name, config


def answer(config: dict[str, Any], *words: str, limit: float = 60.0) -> Answer:
    """Estimates a configuration in a process of its own, killed after `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        report = Path(folder) / "report.json"
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            signal.alarm(int(limit))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            _estimate(folder, words, report)
        _, status = os.waitpid(child, 0)
        seconds = time.perf_counter() - started
        if status or not report.exists():
            return Answer(-signal.SIGKILL, seconds, "")
        return Answer(*json.loads(report.read_text()))


def _estimate(folder: str, words: tuple[str, ...], report: Path) -> None:
    """Runs the command, writes an `Answer`, and ends the process."""
    text, started, status = io.StringIO(), time.perf_counter(), -1
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            status = main(["estimate", folder, "--json", *words])
    finally:
        said = text.getvalue() if status >= 0 else traceback.format_exc()
        report.write_text(json.dumps([status, time.perf_counter() - started, said]))
        os._exit(0)


def run(only: list[str] | None, out: Path | None, *words: str) -> int:
    """Estimates all configurations and prints a line for each. Returns the number of faults."""
    faults, lines = 0, list[str]()
    for name, config in configurations(only):
        found = answer(config, *words)
        faults += bool(found.fault)
        last = found.said.strip().splitlines()[-1:] or [""]
        shown = last[0] if found.status else _short(json.loads(found.said))
        print(f"{found.fault or 'right':<22}{found.seconds:6.1f} s  {name:<28}{shown[:160]}", flush=True)
        line = {"name": name, "fault": found.fault, "status": found.status, "seconds": round(found.seconds, 1)}
        lines.append(json.dumps(line | {"answer": shown}) + "\n")
        if out is not None:
            out.write_text("".join(lines))
    return faults


def _short(found: dict[str, Any]) -> str:
    speed = found["tokens_per_second"]
    rate = f"{speed:,} tokens/s" if speed else "no speed"
    return f"{found['total_bytes'] / 2**30:,.1f} GiB, {rate}, {len(found['changes'])} changes, {found['activations']}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--gpu", default="24GiB")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    main(["estimate", "loratune/pocket", "--gpu", given.gpu])  # the imports, once
    sys.exit(1 if run(given.only, given.out, "--gpu", given.gpu) else 0)
