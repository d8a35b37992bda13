"""Rendering of chat data against `datasets.map` with two `apply_chat_template` calls per record, as TRL does it.

    python -m benchmarks.rendering [--megabytes 60] [--processes 2]

Both read the same JSON Lines file in one run and end with token ids and a mask of the trained tokens. loratune's time
includes all of its checks. Conversations have one to three answers of random words, from a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer

from loratune.box import MODEL_DIR
from loratune.config import DataConfig
from loratune.data.records import read_records
from loratune.data.render import render


def main() -> None:
    """Writes the data, measures both ways and prints tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "chat.jsonl")
        write(Path(path), int(given.megabytes * 1e6))
        started = time.perf_counter()
        theirs = as_trl(path, tokenizer, given.processes, folder)
        middle = time.perf_counter()
        ours = as_loratune(path, tokenizer, given.processes)
        ended = time.perf_counter()
    rates = {"datasets.map": theirs / (middle - started), "loratune": ours / (ended - middle)}
    for name, rate in rates.items():
        print(f"{name:<14}{rate / 1e6:8.2f}M tokens/s")
    print(f"{'ratio':<14}{rates['loratune'] / rates['datasets.map']:8.2f}")


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


def as_trl(path: str, tokenizer: Any, processes: int, folder: str) -> int:
    """The prompt and the whole conversation of each record through the template. Returns the number of tokens."""

    def tokenised(record: dict[str, Any]) -> dict[str, list[int]]:
        messages = record["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        return {"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))}

    data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=folder)
    mapped = data.map(tokenised, num_proc=processes if processes > 1 else None, remove_columns=data.column_names)
    return sum(map(len, mapped["input_ids"]))


def as_loratune(path: str, tokenizer: Any, processes: int) -> int:
    """Reads, checks and renders the file. Returns the number of tokens."""
    config = DataConfig(num_proc=processes)
    rendered = render(
        read_records([path]), tokenizer, config, max_tokens=None, stop_ids=frozenset({tokenizer.eos_token_id})
    )
    return sum(map(len, rendered.examples))


if __name__ == "__main__":
    main()
