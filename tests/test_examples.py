"""Every example runs as its first lines say, and does what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(name: str, cwd: Path, *words: str) -> str:
    """Output of an example, with the package of this tree."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_the_training_loop_learns_and_saves(tmp_path):
    said = run("training_loop.py", tmp_path, "--steps", "24")
    held_out = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", said)]
    assert len(held_out) == 4
    assert held_out[-1] < 0.25 * held_out[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_switching_is_exact(tmp_path):
    answers = re.findall(r": +(True|False)$", run("switching.py", tmp_path), re.MULTILINE)
    assert answers == ["True"] * 5


def test_the_sweep_ranks_its_jobs(tmp_path):
    said = run("sweep.py", tmp_path, "--steps", "4")
    assert len(re.findall(r"rate[\d.e-]+-r\d+", said)) >= 4
    assert len(list((tmp_path / "sweep-example").glob("*/adapter_model.safetensors"))) == 4


def test_the_objective_widens_the_margin(tmp_path):
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run("custom_objective.py", tmp_path))]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
