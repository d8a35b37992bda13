"""Many adapters in one row beside the same adapters in turn: tokens of all jobs per second on one GPU.

    python -m benchmarks.many OUT.jsonl CASE...       CASE is SHAPE:JOBS:TOKENS[:RANK], for example l1b:8:512
    python -m benchmarks.many OUT.jsonl --all         every case of `CASES`

Random weights, all seven projections adapted, AdamW, one document of TOKENS tokens per job and step, all trained.
`alone` is one job as `loratune train` runs it (`GraphStep`); jobs in turn have its speed. `bank` is one row with
all jobs' documents and one update per job (`BankGraph`). Both run in one process on one model. The figure is the
median step, from handing over the row until the losses are on the host.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from benchmarks.shapes import model_of, row_of
from loratune.base.forward import prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.lora.inject import attach, detach
from loratune.many.bank import Bank
from loratune.many.graph import BankGraph
from loratune.many.step import MicroStep
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, set_rate

CASES = [
    "l1b:8:512", "l1b:8:256", "l1b:8:2048", "l1b:64:64:8", "l1b:64:256:8", "l8b:8:512", "l8b:8:2048", "l7b:8:512",
]  # fmt: skip
PEFT_TOK_S = 4169
"""Tokens per second of PEFT on Llama-3.2-1B, 512 tokens per step, one adapter, from an earlier run."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_WARM, _STEPS = 4, 7


def alone(model: transformers.PreTrainedModel, tokens: int, config: LoraConfig) -> dict[str, object]:
    """Measures one job alone."""
    attach(model, config, name="default", seed=0)
    forward = prepare(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, TrainConfig(learning_rate=2e-4))
    step = GraphStep(forward, parameters, optimizer, 1.0)
    rows = [row_of([tokens], tokens, seed) for seed in range(4)]
    set_rate(optimizer, 1e-4)
    with forward.installed():
        seconds, losses = timed(lambda index: step([rows[index % 4]], [rows[(index + 1) % 4]]).loss)
    detach(model)
    assert step.why_not is None, step.why_not
    return {"tok_s": round(tokens / seconds), "step_ms": round(seconds * 1e3, 2), "loss": losses}


def bank(model: transformers.PreTrainedModel, jobs: int, tokens: int, config: LoraConfig) -> dict[str, object]:
    """Measures all jobs in one row."""
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    held = Bank.attach(model, [config], jobs)
    forward = prepare(model)
    step = BankGraph(forward, held, jobs * tokens)
    for slot in range(jobs):
        held.place(slot, config, seed=slot)
        step.join(slot, TrainConfig(learning_rate=2e-4))
    states = torch.cuda.memory_allocated() - base
    torch.cuda.reset_peak_memory_stats()
    rows = [[row_of([tokens], tokens, 4 * slot + nth) for nth in range(4)] for slot in range(jobs)]
    rates = dict.fromkeys(range(jobs), 1e-4)

    turns = [
        [MicroStep(slot, rows[slot][nth], float(tokens - 1), None, 0) for slot in range(jobs)] for nth in range(4)
    ]

    def one(index: int) -> float:
        return step.run(turns[index % 4], rates, lambda: turns[(index + 1) % 4])[0].loss

    with forward.installed():
        seconds, losses = timed(one)
    replay = replay_ms(step)
    peak = torch.cuda.max_memory_allocated()
    note = step.why_not
    held.detach()
    return {
        "tok_s": round(jobs * tokens / seconds), "step_ms": round(seconds * 1e3, 2), "replay_ms": replay,
        "base_gib": gib(base), "states_gib": gib(states), "peak_gib": gib(peak), "loss_of_first": losses,
        "fused": forward.fused is not None, "note": note,
    }  # fmt: skip


def timed(step: Callable[[int], float]) -> tuple[float, list[float]]:
    """Median seconds of a step, and the first losses."""
    seconds, losses = [], []
    for index in range(_WARM + _STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(round(step(index), 5))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_WARM:]), losses[:5]


def replay_ms(step: BankGraph) -> float | None:
    """Milliseconds of the recording replayed back to back."""
    graph = next((graph for graph in step._recordings.graphs.values() if graph is not None), None)
    if graph is None:
        return None
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) * 200, 2)


def gib(size: int) -> float:
    return round(size / 2**30, 2)


def measure(case: str, model: transformers.PreTrainedModel) -> dict[str, object]:
    """Measures one case both ways."""
    shape, jobs, tokens, rank = [*case.split(":"), "16"][:4]
    config = LoraConfig(r=int(rank), lora_alpha=16, target_modules=TARGETS)
    single = alone(model, int(tokens), config)
    together = bank(model, int(jobs), int(tokens), config)
    ratio = float(str(together["tok_s"])) / float(str(single["tok_s"]))
    return {
        "shape": shape, "jobs": int(jobs), "tokens": int(tokens), "r": int(rank), "precision": "bf16",
        "ratio": round(ratio, 3), "alone": single, "bank": together,
        "times_peft": round(float(str(together["tok_s"])) / PEFT_TOK_S, 1) if shape == "l1b" else None,
        "machine": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def main() -> None:
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    cases = CASES if cases == ["--all"] else cases
    model, shape = None, None
    with out.open("a") as file:
        for case in cases:
            if case.split(":")[0] != shape:
                del model
                torch.cuda.empty_cache()
                shape = case.split(":")[0]
                model = model_of(shape)
            row = json.dumps(measure(case, model))
            print(row, flush=True)
            file.write(row + "\n")
            file.flush()


if __name__ == "__main__":
    main()
