"""Rendering of chat data against `datasets.map` with two `apply_chat_template` calls per record, as TRL does it.

    python -m benchmarks.rendering [--megabytes 60] [--cores 2] [--rounds 3] [--out benchmarks/results/rendering.json]

Both read the same JSON Lines file and end with token ids and a mask of the trained tokens. loratune's time includes
all of its checks. Each measurement runs in a process of its own, by turns, so that memory can be told apart; imports
are not timed. Conversations have one to three answers of random words, from a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import AutoTokenizer

from loratune.box import MODEL_DIR
from loratune.config import DataConfig
from loratune.data.records import read_records
from loratune.data.render import render


def main() -> None:
    """Writes the data, measures both ways by turns and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(*given.one, given.cores)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "chat.jsonl")
        write(Path(path), int(given.megabytes * 1e6))
        rounds = [{way: in_process(way, path, given.cores) for way in WAYS} for _ in range(given.rounds)]
    assert len({found["tokens"] for one in rounds for found in one.values()}) == 1  # both made the same tokens
    ratios = [one["loratune"]["tokens_per_second"] / one["datasets.map"]["tokens_per_second"] for one in rounds]
    result = {
        "command": "python -m benchmarks.rendering", "megabytes": given.megabytes, "cores": given.cores,
        "machine_cores": os.cpu_count(), "transformers": transformers.__version__, "datasets": datasets.__version__,
        "rounds": rounds, "ratios": [round(ratio, 2) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 2),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if given.out:
        Path(given.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write(path: Path, size: int) -> None:
    """Writes about `size` bytes of conversations."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5_000)]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            messages = [
                {"role": role, "content": " ".join(rng.choices(words, k=rng.randint(10, 80)))}
                for _ in range(rng.randint(1, 3))
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def in_process(way: str, path: str, cores: int) -> dict[str, Any]:
    """Measures one way in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.rendering", "--one", way, path, "--cores", str(cores)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(way: str, path: str, cores: int) -> dict[str, Any]:
    """Seconds, tokens and the memory that the work adds, in MB, in this process."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer("a")
    before, started = _peak_mb(), time.perf_counter()
    tokens = WAYS[way](path, tokenizer, cores)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds),
        "added_peak_mb": round(_peak_mb() - before),
    }


def _peak_mb() -> float:
    """Peak resident memory of this process, without its workers."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def as_trl(path: str, tokenizer: Any, cores: int) -> int:
    """The prompt and the whole conversation of each record through the template. Returns the number of tokens."""

    def tokenised(record: dict[str, Any]) -> dict[str, list[int]]:
        messages = record["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        return {"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))}

    with tempfile.TemporaryDirectory() as folder:
        data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=folder)
        mapped = data.map(tokenised, num_proc=cores if cores > 1 else None, remove_columns=data.column_names)
        return sum(map(len, mapped["input_ids"]))


def as_loratune(path: str, tokenizer: Any, cores: int) -> int:
    """Reads, checks and renders the file. Returns the number of tokens."""
    config = DataConfig(num_proc=cores)
    rendered = render(
        read_records([path]), tokenizer, config, max_tokens=None, stop_ids=frozenset({tokenizer.eos_token_id})
    )
    return sum(map(len, rendered.examples))


WAYS = {"datasets.map": as_trl, "loratune": as_loratune}

if __name__ == "__main__":
    main()
