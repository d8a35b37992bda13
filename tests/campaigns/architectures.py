"""Every causal-LM type of transformers, small and random, through every column of docs/models.md.

    python -m tests.campaigns.architectures [--only llama bloom ...] [--again] [--seconds 200] [--write]

Then encoders, encoder-decoders, vision, audio and vision-language classes (`other_models`). Each type runs in a
process of its own with a time limit, and its results go to build/architectures/TYPE.json. A type with such a file is
not run again, unless `--again` is given, so the sweep can be continued. `--write` makes docs/models.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.campaigns import models_page, other_models
from tests.campaigns.architecture_checks import COLUMNS, check
from tests.campaigns.other_models import GROUPS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "architectures"
SECONDS = 150
"""Time limit of one type."""


OTHERS = [name for names in GROUPS.values() for name in names]


def kinds(only: list[str] | None) -> list[str]:
    """The types of transformers' causal-LM mapping and the other classes, or those given."""
    known = [*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *OTHERS]
    unknown = set(only or []) - set(known)
    if unknown:
        sys.exit(f"no causal-LM types of transformers {transformers.__version__}: {', '.join(sorted(unknown))}")
    return only or known


def run(kind: str, limit: int = SECONDS) -> dict[str, object]:
    """Runs one type in a process of its own and stores its row. Returns the row."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{kind}.json"
    file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        signal.alarm(limit)
        try:
            for row in (other_models.check if kind in OTHERS else check)(kind):
                file.write_text(json.dumps(dataclasses.asdict(row), indent=1))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    found: dict[str, object] = json.loads(file.read_text())
    return found


def main(given: argparse.Namespace) -> int:
    """Runs the types that have no result yet, and returns the number of types with a failed column."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    started, failures = time.monotonic(), 0
    for kind in kinds(given.only):
        if (RESULTS / f"{kind}.json").exists() and not given.again:
            continue
        if time.monotonic() - started > given.seconds:
            print("out of time; run again to continue", flush=True)
            break
        begun = time.monotonic()
        row = run(kind)
        columns = row["columns"]
        assert isinstance(columns, dict)
        wanted = other_models.COLUMNS if kind in OTHERS else COLUMNS
        faults = {c: columns.get(c, "not run") for c in wanted if columns.get(c, "not run")}
        failures += bool(faults)
        facts = row["facts"]
        assert isinstance(facts, dict)
        print(
            f"{kind:<26}{time.monotonic() - begun:5.1f} s  {facts.get('path', '-'):<14}{faults or 'passes'}",
            flush=True,
        )
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    status = 1 if main(given) else 0
    if given.write:
        models_page.write(RESULTS, ROOT / "docs" / "models.md", kinds(None))
    sys.exit(status)
