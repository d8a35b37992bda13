"""Tokens a second against peak memory, one JSON object a row.

    python -m benchmarks.memory plans SHAPE BATCH TOKENS PRECISION PLAN [PLAN ...]

Random weights, r = 16 on all seven projections, AdamW, `batch` documents of `tokens` tokens in one packed row, all
tokens trained, as in `benchmarks.ladder`. A PLAN is LEVEL, LEVEL/TILE, or LEVELxN+LEVEL[/TILE]: the first for the
first N layers, the second for the rest. Peaks are those of PyTorch's allocator, allocated and reserved, over all
steps from the first on, recording included.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import time

import torch
import transformers

from benchmarks.shapes import model_of, row_of
from loratune.base.forward import PackedForward, prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.lora.inject import attach
from loratune.ops import nf4
from loratune.ops.policy import TILE, Level, Plan
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, set_rate

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 1 << 30


def plan_of(text: str, layers: int) -> Plan:
    """`full`, `full/2048`, `offloadx20+none`, ..."""
    match = re.fullmatch(r"(\w+?)(?:x(\d+)\+(\w+))?(?:/(\d+))?", text)
    assert match, text
    first, count, other, tile = match.groups()
    level = Level[first.upper()]
    rest = Level[other.upper()] if other else level
    return Plan.mixed(level, int(count or layers), rest, layers, int(tile or TILE))


def prepared(shape: str, precision: str = "bf16") -> PackedForward:
    """The model on the GPU with an adapter."""
    forms = {"bf16": None, "nf4": nf4.quantise}
    model = model_of(shape, form=forms[precision])
    attach(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS), name="default", seed=0)
    return prepare(model)


def measure(forward: PackedForward, batch: int, tokens: int, plan: Plan | None, steps: int = 5) -> dict[str, object]:
    """Speed and memory of one plan; leaves the device as it was."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    forward.plan = plan
    parameters = [p for p in forward.model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, TrainConfig())
    step = GraphStep(forward, parameters, optimizer, 1.0)
    row = [row_of([tokens] * batch, batch * tokens, 0)]
    seconds, losses = [], []
    with forward.installed():
        for _ in range(steps + 3):
            set_rate(optimizer, 1e-4)
            torch.cuda.synchronize()
            start = time.perf_counter()
            losses.append(step(row).loss)
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[3:])
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    del step, optimizer, row
    return {
        "system": "loratune", "batch": batch, "tokens": tokens, "plan": str(plan), "tile": plan and plan.tile,
        "tok_s": round(batch * tokens / median), "step_ms": round(median * 1e3, 1),
        "peak_gib": round(peak / GIB, 3), "reserved_gib": round(reserved / GIB, 3), "base_gib": round(base / GIB, 3),
        "losses": [round(loss, 4) for loss in losses[:4]], "fused": forward.fused is not None,
        "first_s": round(seconds[0], 2), "second_s": round(seconds[1], 2),
    }  # fmt: skip


def main() -> None:
    verb, shape, batch, tokens, precision, *plans = sys.argv[1:]
    assert verb == "plans"
    forward = prepared(shape, precision)
    machine = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    machine["transformers"] = transformers.__version__
    layers = forward.model.config.num_hidden_layers
    for text in plans:
        found: dict[str, object] = {"shape": shape, "precision": precision}
        try:
            found |= measure(forward, int(batch), int(tokens), plan_of(text, layers))
        except torch.OutOfMemoryError as error:
            found |= {"plan": text, "error": str(error).splitlines()[0]}
        print(json.dumps(found | machine), flush=True)


if __name__ == "__main__":
    main()
