"""Seconds from the start of the process to the end of the first step, with a 7B model in a folder on disk.

    python -m benchmarks.first_step [OUT.jsonl] [--shape l7b] [--precision auto] [--cold]

Writes a checkpoint of random weights (safetensors in shards, with a tokenizer) to the temporary directory, then
starts the whole of training as `loratune train` does, in a process of its own, and says when its parts were done:
imports, model in memory, everything prepared, first step of 4 x 2048 tokens. Warm: the files are in the page cache,
as after a download. `--cold` drops the weights from the page cache first (Python's and PyTorch's files stay).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS_PER_ROW = 8192


def measure(folder: str, data: str, precision: str, started: float) -> dict[str, object]:
    """The child: `started` is when the parent started it, in seconds since the epoch."""
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks[name] = round(time.time() - started, 2)

    mark("python")
    import torch

    mark("torch")
    from loratune.base import load as base
    from loratune.config import RunConfig, from_dict
    from loratune.training.loop import StepDone
    from loratune.training.run import Prepared, run

    mark("imports")
    plain_load = base.load

    def timed_load(*arguments: object) -> object:
        mark("before_load")
        model = plain_load(*arguments)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        mark("loaded")
        return model

    base.load = timed_load  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as out:
        settings = {
            "model": folder, "data": [data], "out": f"{out}/run", "precision": precision,
            "lora": {"r": 16, "lora_alpha": 16}, "dataset": {"tokens_per_row": TOKENS_PER_ROW},
            "training": {"max_steps": 3},
        }  # fmt: skip
        for event in run(from_dict(RunConfig, settings, "benchmark")):
            if isinstance(event, Prepared):
                mark("prepared")
            if isinstance(event, StepDone):
                mark(f"step_{event.step}")
                if event.step == 2:
                    break
    return {
        "system": "loratune", "precision": precision, "first_step_s": marks["step_1"], "marks": marks,
        "tokens": TOKENS_PER_ROW, "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "machine": torch.cuda.get_device_name(), "torch": torch.__version__,
    }  # fmt: skip


def write_data(path: Path) -> None:
    """Documents of 2,000 bytes, which the tokenizer of bytes makes as many tokens."""
    lines = [json.dumps({"text": f"{index:05} " + "the quick brown fox " * 99}) for index in range(64)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def drop_from_cache(folder: Path) -> None:
    """Lets the kernel forget the weights' files."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--shape", default="l7b")
    parser.add_argument("--precision", nargs="+", default=["auto"])
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        folder, data, precision, started = given.child
        print(json.dumps(measure(folder, data, precision, float(started))))
        return
    from benchmarks.peers import folder_of

    folder, data = folder_of(given.shape), Path(tempfile.gettempdir()) / "first_step.jsonl"
    write_data(data)
    for precision in given.precision:
        for cold in (False, True)[: 1 + given.cold]:
            if cold:
                drop_from_cache(folder)
            command = [sys.executable, "-m", "benchmarks.first_step", "--child", str(folder), str(data), precision]
            done = subprocess.run([*command, str(time.time())], capture_output=True, text=True)
            if done.returncode:
                print(done.stderr[-3000:], flush=True)
                continue
            row = json.loads(done.stdout.strip().splitlines()[-1]) | {"shape": given.shape, "cold": cold}
            print(json.dumps(row), flush=True)
            if given.out:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
