"""A sweep beside single runs on a CPU: 8 rates x 2 ranks on a real task with the bundled model.

    python -m benchmarks.sweep [--steps 40] [--out benchmarks/results/sweep.json] [--keep DIR]

One process runs the sweep of 16 jobs, then the same 16 jobs in turn through the code of `loratune train`, from
files to finished folders. Both are measured in wall time and processor time; other work on the machine disturbs
the latter less. Then the same sweep runs in processes that are killed at random moments and resumed. It must end
in the same table, and every other verb must work on the winner's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from loratune.base.load import POCKET
from loratune.box import data_file
from loratune.runs import metrics
from loratune.runs.run import run
from loratune.sweep.plan import SweepPlan, read_plan
from loratune.sweep.run import SweepResult, sweep

HELD_OUT = 40  # records
JOBS = """\
# The bundled dates task: a date in any spelling becomes ISO 8601.
data = ["{train}"]
eval_data = ["{held_out}"]
tokens_per_row = 256
max_steps = {steps}
eval_every_steps = {every}
warmup_ratio = 0.1
cache_dir = ""

[grid]
learning_rate = [1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
r = [8, 32]
"""


def timed(work) -> tuple[float, float]:
    """Wall-clock seconds and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def the_sweep(plan: SweepPlan, text: str, out: str) -> SweepResult:
    *_, result = sweep(plan, text, out)
    assert isinstance(result, SweepResult)
    return result


def the_runs(plan: SweepPlan, out: Path) -> None:
    for job in plan.jobs:
        for _ in run(replace(job.config, out=str(out / job.name))):
            pass


def differences(plan: SweepPlan, a: Path, b: Path) -> dict[str, float]:
    """Largest relative difference of a training loss per job, over all steps."""
    found = {}
    for job in plan.jobs:
        ours, theirs = (metrics.losses_of(folder / job.name / "metrics.jsonl") for folder in (a, b))
        assert len(ours) == len(theirs)
        found[job.name] = max(abs(x - y) / y for x, y in zip(ours, theirs, strict=True))
    return found


def loratune(*words: str, given: str | None = None) -> str:
    """Output of a command."""
    command = [sys.executable, "-m", "loratune.cli", *words]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=os.environ | {"COLUMNS": "110"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def killed_and_resumed(jobs: Path, out: Path, seconds: float, kills: int, rng: random.Random) -> list[float]:
    """Starts a sweep, kills it at random moments and lets the last start finish; returns the moments in seconds."""
    moments: list[float] = []
    while True:
        words = (
            ["sweep", POCKET, str(jobs), "--out", str(out)]
            if not moments
            else ["sweep", "--resume", "--out", str(out)]
        )
        process = subprocess.Popen([sys.executable, "-m", "loratune.cli", *words], stdout=subprocess.DEVNULL)
        if len(moments) == kills:
            assert process.wait() == 0
            return moments
        until = time.monotonic() + 60  # no folder, no sweep to resume: wait for the first file
        while not (out / "sweep.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        moments.append(round(rng.uniform(0.1, 0.6) * seconds, 1))
        time.sleep(moments[-1])
        process.send_signal(signal.SIGKILL)
        process.wait()


def table(out: Path) -> list[str]:
    """The ranking as in README.md of the sweep's folder."""
    return [line for line in (out / "README.md").read_text().splitlines() if line.startswith("|")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sweep.json"))
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    place = given.keep or Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    lines = data_file("dates", "heldout").read_text().splitlines(keepends=True)
    (place / "heldout.jsonl").write_text("".join(lines[:HELD_OUT]))
    train = data_file("dates", "train")
    every = max(1, given.steps // 4)
    text = JOBS.format(train=train, held_out=place / "heldout.jsonl", steps=given.steps, every=every)
    (place / "jobs.toml").write_text(text)
    plan = read_plan(str(place / "jobs.toml"), model=POCKET, out=str(place / "sweep"))
    list(
        run(
            replace(
                plan.jobs[0].config,
                out=str(place / "warm"),
                training=replace(plan.jobs[0].config.training, max_steps=2),
            )
        )
    )

    results: list[SweepResult] = []
    together = timed(lambda: results.append(the_sweep(plan, text, str(place / "sweep"))))
    print(f"sweep: {together[0]:.1f} s, {together[1]:.1f} s of the processor")
    alone = timed(lambda: the_runs(plan, place / "alone"))
    print(f"16 runs: {alone[0]:.1f} s, {alone[1]:.1f} s of the processor")
    moments = killed_and_resumed(
        place / "jobs.toml", place / "killed", together[0], given.kills, random.Random(time.time_ns())
    )
    same = table(place / "killed") == table(place / "sweep")
    print(f"killed after {moments} s: {'the same table' if same else 'ANOTHER TABLE'}")
    best = place / "sweep" / results[0].standings[0].name
    transcript = {
        "inspect": loratune("inspect", str(best)),
        "eval": loratune("eval", str(best), str(place / "heldout.jsonl")),
        "chat": loratune("chat", str(best), given="Convert the date to ISO 8601: the 3rd of May 2021\n"),
        "merge": loratune("merge", str(best), "--out", str(place / "merged")),
    }
    for verb, said in transcript.items():
        print(f"--- {verb}\n{said}")
    outcome = {
        "jobs": len(plan.jobs),
        "steps": given.steps,
        "sweep_seconds": together[0],
        "runs_seconds": alone[0],
        "sweep_processor_seconds": together[1],
        "runs_processor_seconds": alone[1],
        "runs_over_sweep": alone[0] / together[0],
        "runs_over_sweep_processor": alone[1] / together[1],
        "largest_relative_difference_of_a_loss": differences(plan, place / "sweep", place / "alone"),
        "killed_after_seconds": moments,
        "same_table_after_kills": same,
        "ranking": json.loads((place / "sweep" / "results.json").read_text()),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
    }
    given.out.write_text(json.dumps(outcome, indent=2) + "\n")
    print("\n".join(table(place / "sweep")))
    print({key: value for key, value in outcome.items() if not isinstance(value, list | dict)})


if __name__ == "__main__":
    main()
