"""Milliseconds of one step by part, beside the bound of the frozen products.

    python -m benchmarks.profile SHAPE BATCH TOKENS [bf16|nf4|fp8]
    python -m benchmarks.profile MODEL                                  a model of `benchmarks.recipes`

Kernels of an eager step (a graph replays the same ones), grouped by purpose. The bound of the frozen products is
their arithmetic at 692 TFLOP/s; other groups show their number of launches.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.recipes import DOCUMENTS, TOKENS, random_model
from benchmarks.shapes import limit_tok_s, model_of, row_of
from loratune.base.forward import prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.lora.inject import attach
from loratune.precision.contract import weight_format
from loratune.tables import PRECISIONS
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw

PARTS = (
    ("attention", ("flash", "cudnn", "fmha", "sdpa", "mha")),
    ("products", ("gemm", "nvjet", "cutlass", "splitk", "gemv", "xmma")),
    ("compiled passes", ("triton",)),
    ("optimizer, norms, casts of many tensors", ("multi_tensor",)),
    ("elementwise", ("elementwise", "reduce", "copy", "fill", "memset", "memcpy", "index", "cat")),
)


def main() -> None:
    recipe = len(sys.argv) == 2
    shape, batch, tokens = sys.argv[1], *((DOCUMENTS, TOKENS) if recipe else map(int, sys.argv[2:4]))
    precision = sys.argv[4] if len(sys.argv) > 4 else "bf16"
    form = weight_format(precision).quantise if precision in PRECISIONS else None
    model = random_model(shape) if recipe else model_of(shape, form=form)
    attach(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"), name="default", seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    forward = prepare(model)
    step = GraphStep(forward, parameters, adamw(parameters, TrainConfig(learning_rate=2e-4)), 1.0, record=False)
    rows = [row_of([tokens] * batch, batch * tokens, 0)]
    with forward.installed():
        for _ in range(4):
            step(rows)
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            step(rows)
            torch.cuda.synchronize()
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    kernels = sorted(recorded.key_averages(), key=lambda event: -event.device_time_total)
    for event in kernels:
        name = event.key.lower()
        part = next((part for part, marks in PARTS if any(mark in name for mark in marks)), "other")
        parts[part][0] += event.device_time_total / 1e3
        parts[part][1] += event.count
    result = {
        "shape": shape, "batch": batch, "tokens": tokens, "precision": precision,
        "parts_ms_and_launches": {part: [round(ms, 3), count] for part, (ms, count) in parts.items()},
        "total_ms": round(sum(ms for ms, _ in parts.values()), 2),
        "bound_ms": None if recipe else round(1e3 * batch * tokens / limit_tok_s(shape, batch, tokens, precision), 2),
        "kernels": [[e.key[:90], e.count, round(e.device_time_total / 1e3, 3)] for e in kernels[:32]],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
