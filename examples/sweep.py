"""A sweep from Python: four jobs train together over one base, each with the same result as alone.

python examples/sweep.py [--steps 20] [--out sweep-example]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from loratune.box import data_file
from loratune.sweep.plan import read_plan
from loratune.sweep.run import SweepResult, sweep

JOBS = """
data = [{train}]
eval_data = [{held_out}]
tokens_per_row = 256
max_steps = {steps}
eval_every_steps = {steps}

[grid]
learning_rate = [5e-4, 2e-3]
r = [4, 16]
"""


def main() -> None:
    """Runs the sweep and prints its ranking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="sweep-example")
    given = parser.parse_args()
    files = {name: json.dumps(str(data_file("dates", part))) for name, part in PARTS.items()}
    text = JOBS.format(steps=given.steps, **files)
    jobs = Path(f"{given.out}.toml")
    jobs.write_text(text)
    plan = read_plan(str(jobs), model="loratune/pocket", out=given.out)
    *_, result = sweep(plan, text, given.out, overwrite=True)
    assert isinstance(result, SweepResult)
    print((Path(given.out) / "README.md").read_text())


PARTS = {"train": "train", "held_out": "heldout"}

if __name__ == "__main__":
    main()
