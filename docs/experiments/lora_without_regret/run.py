"""Runs the experiment and writes one JSON line for each run.

    python -m docs.experiments.lora_without_regret.run OUT.jsonl [--seconds 95] [--small]

Parts come in the order of their importance; when the time is up, the rest is left out, which the file shows.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import loratune as lt
from docs.experiments.lora_without_regret.stacked import ATTENTION, MLP, Batches, Kind, Stack, Training, held_out
from loratune.base.load import POCKET, stop_ids
from loratune.box import data_file
from loratune.data.examples import Example
from loratune.data.feed import prepare

LORA_RATES = [1.25e-4 * 2**k for k in range(9)]  # to 3.2e-2
FULL_RATES = [1.25e-5 * 2**k for k in range(9)]  # to 3.2e-3
RANKS = (1, 4, 16, 64, 128)
FACTS, FACT_BATCH = 256, 64
FACT_RATES = [1e-3]  # of LoRA; a fifth of it for full tuning: where "rates" finds the best ones
FACT_RANKS = (1, 2, 4, 8, 16, 64)


def examples(task: str, folder: Path) -> tuple[list[Example], list[Example]]:
    """Training and held-out documents: "dates" and "orders" are in the box, "facts" are made here."""
    if task == "facts":
        path = folder / "facts.jsonl"
        path.write_text("".join(json.dumps(fact) + "\n" for fact in _facts()))
        files = (str(path), None)
    else:
        files = (str(data_file(task, "train")), str(data_file(task, "heldout")))
    tokenizer = lt.load_tokenizer(POCKET)
    settings = lt.DataConfig(eval_fraction=0.0, eval_data=[files[1]] if files[1] else [], cache_dir="")
    dataset = prepare([files[0]], tokenizer, settings, stop_ids=stop_ids(POCKET, tokenizer))
    return dataset.train, dataset.eval


def _facts() -> Iterator[dict[str, object]]:
    """Random facts: four digits ask for six others, so each holds 20 bits to remember."""
    rng = random.Random(0)
    for key in rng.sample(range(10000), FACTS):
        answer = f"{rng.randrange(10**6):06d}"
        yield {"messages": [{"role": "user", "content": f"{key:04d}"}, {"role": "assistant", "content": answer}]}


def padded(documents: Sequence[Example]) -> Batches:
    """One document per row."""
    length = max(map(len, documents))
    ids, targets = (torch.zeros(len(documents), length, dtype=torch.long) for _ in range(2))
    weights = torch.zeros(len(documents), length)
    for row, document in enumerate(documents):
        n = len(document)
        ids[row, :n] = torch.from_numpy(document.token_ids).long()
        targets[row, : n - 1] = ids[row, 1:n]
        weights[row, : n - 1] = torch.from_numpy(document.weights[1:]).float()
    return Batches(ids, targets, weights)


def order(documents: int, batch: int, steps: int, seed: int) -> torch.Tensor:
    """(steps, batch): documents in a new random order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch // documents) + 1
    shuffled = torch.cat([torch.randperm(documents, generator=generator) for _ in range(epochs)])
    return shuffled[: steps * batch].view(steps, batch)


def plan(small: bool) -> Iterator[tuple[str, str, Kind, list[float], int, int, int]]:
    """(part, task, kind, rates, batch, steps, seed) of each stack; in "capacity" every rate with all `FACT_RANKS`."""
    rounds = 1 if small else 2
    steps, long = (4, 6) if small else (150, 240)
    for seed in range(rounds):
        for task in ("orders", "dates"):
            yield "rates", task, Kind(0), FULL_RATES, 32, steps, seed
            for rank in RANKS:
                yield "rates", task, Kind(rank), LORA_RATES, 32, steps, seed
    yield "capacity", "facts", Kind(0), [rate / 5 for rate in FACT_RATES], FACT_BATCH, long, 0
    yield "capacity", "facts", Kind(max(FACT_RANKS)), FACT_RATES, FACT_BATCH, long, 0
    pairs = [(3, 2, FACT_RATES, seed) for seed in range(rounds)] + [(24, 16, [5e-4, 1e-3, 2e-3], 0)]
    for attention, mlp, module_rates, seed in pairs:
        for rank, modules in ((attention, ATTENTION), (mlp, MLP)):
            yield "modules", "facts", Kind(rank, modules), module_rates, FACT_BATCH, long, seed


def main() -> None:
    """Trains the stacks of `plan` one after another."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--seconds", type=float, default=95.0)
    arguments.add_argument("--parts", default="rates,capacity,modules")
    arguments.add_argument("--small", action="store_true", help="few steps, to try the script")
    given = arguments.parse_args()
    started = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = lt.load(POCKET, "float32", device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    data: dict[str, tuple[Batches, Batches | None]] = {}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w") as out:
        for part, task, kind, rates, batch, steps, seed in plan(given.small):
            if part not in given.parts.split(","):
                continue
            if time.perf_counter() - started > given.seconds:
                print(f"time is up before {part} {task} {kind}", flush=True)
                break
            if task not in data:
                train, held = examples(task, given.out.parent)
                data[task] = padded(train).to(device), padded(held).to(device) if held else None
            train_batches, held_batches = data[task]
            begun = time.perf_counter()
            ranks = FACT_RANKS if part == "capacity" and kind.rank else (kind.rank,)
            runs = [(rank, rate) for rank in ranks for rate in rates]
            stack = Stack(model, kind, len(runs), seed, [rank for rank, _ in runs])
            rates = [rate for _, rate in runs]
            losses = Training(stack, rates, train_batches, order(len(train_batches.ids), batch, steps, seed)).run()
            tested = held_out(stack, held_batches) if held_batches else losses[-50:].mean(0)
            seconds = time.perf_counter() - begun
            print(f"{part} {task} rank {kind.rank} seed {seed}: {seconds:.2f} s, {tested.tolist()}", flush=True)
            every = max(1, steps // 150)
            for run, (rank, rate) in enumerate(runs):
                curve = losses[: steps // every * every, run].view(-1, every).mean(1)
                row = {
                    "part": part, "task": task, "rank": rank, "modules": [m.split(".")[1] for m in kind.modules],
                    "parameters": stack.flat.shape[1] * max(1, rank) // max(1, kind.rank), "rate": rate,
                    "seed": seed, "batch": batch, "steps": steps,
                    "held_out": round(float(tested[run]), 5) if held_batches else None,
                    "last_50": round(float(losses[-50:, run].mean()), 5), "every": every,
                    "curve": [round(float(x), 4) for x in curve],
                    "machine": machine, "torch": torch.__version__,
                }  # fmt: skip
                out.write(json.dumps(row) + "\n")
            out.flush()
            del stack


if __name__ == "__main__":
    main()
