"""Tokens a second against peak memory, one JSON object a row.

    python -m benchmarks.memory plans SHAPE BATCH TOKENS PRECISION PLAN [PLAN ...]     the frontier, plan by plan
    python -m benchmarks.memory estimate                      what is estimated beside what is measured, 29 settings

Random weights, r = 16 on all seven projections, AdamW, `batch` documents of `tokens` tokens in one packed row, all
tokens trained, as in `benchmarks.ladder`. A PLAN is LEVEL, LEVEL/TILE, or LEVELxN+LEVEL[/TILE]: the first for the
first N layers, the second for the rest; @e behind it puts the embeddings on the host, @o the optimizer, @eo both;
1x2048: before it is a size of its own. Peaks are those of PyTorch's allocator, allocated and reserved, over all steps
from the first on, recording included.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import time
from dataclasses import replace

import torch
import transformers

from benchmarks.shapes import SHAPES, model_of, row_of
from loratune.base.forward import PackedForward, prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.estimate import Wish, survey_of
from loratune.lora.inject import attach
from loratune.ops import nf4
from loratune.ops.policy import TILE, Level, Plan
from loratune.training.budget import Setting, peak
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, masters_on_host, moments_on_host, set_rate

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 1 << 30


def plan_of(text: str, layers: int) -> Plan:
    """`full`, `full/2048`, `offloadx20+none`, ..."""
    match = re.fullmatch(r"([a-z]+)(?:x(\d+)\+([a-z]+))?(?:/(\d+))?(@e?o?)?", text)
    assert match, text
    first, count, other, tile, host = match.groups()
    level = Level[first.upper()]
    rest = Level[other.upper()] if other else level
    plan = Plan.mixed(level, int(count or layers), rest, layers, int(tile or TILE))
    return replace(plan, embeddings_on_host="e" in (host or ""), optimizer_on_host="o" in (host or ""))


def prepared(shape: str, precision: str = "bf16", r: int = 16) -> PackedForward:
    """The model on the GPU with an adapter."""
    forms = {"bf16": None, "nf4": nf4.quantise}
    model = model_of(shape, form=forms[precision])
    attach(model, LoraConfig(r=r, lora_alpha=16, target_modules=TARGETS), name="default", seed=0)
    return prepare(model)


def measure(
    forward: PackedForward, batch: int, tokens: int, plan: Plan | None, steps: int = 5, uneven: bool = False
) -> dict[str, object]:
    """Speed and memory of one plan; leaves the device as it was."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    forward.plan = plan
    parameters = [p for p in forward.model.parameters() if p.requires_grad]
    if plan is not None and plan.optimizer_on_host:
        masters_on_host(parameters)
    optimizer = adamw(parameters, TrainConfig())
    if plan is not None and plan.optimizer_on_host:
        moments_on_host(optimizer)
    step = GraphStep(forward, parameters, optimizer, 1.0)
    lengths = [batch * tokens // 4 - 1, batch * tokens // 8, batch * tokens // 2] if uneven else [tokens] * batch
    row = [row_of(lengths, batch * tokens, 0)]
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


# shape, layers (0 for all), precision, rank, batch, tokens, plan, "uneven" for documents of different lengths
ESTIMATED = [
    ("l7b", 4, "bf16", 16, 4, 2048, "none", ""), ("l7b", 4, "bf16", 16, 4, 2048, "wide/2048", ""),
    ("l7b", 4, "bf16", 16, 4, 2048, "selective", ""), ("l7b", 4, "bf16", 16, 4, 2048, "full", ""),
    ("l7b", 4, "bf16", 16, 4, 2048, "full/1024", ""), ("l7b", 4, "bf16", 16, 4, 2048, "offload/2048", ""),
    ("l7b", 4, "bf16", 16, 4, 2048, "fullx2+none", ""), ("l7b", 4, "bf16", 16, 4, 2048, "none", "uneven"),
    ("l7b", 4, "bf16", 64, 1, 2048, "none", ""), ("l7b", 4, "bf16", 64, 4, 2048, "full", "uneven"),
    ("l7b", 4, "nf4", 16, 4, 2048, "none", ""), ("l7b", 4, "nf4", 16, 4, 2048, "full/2048", ""),
    ("l7b", 4, "nf4", 8, 1, 2048, "offload/1024", ""), ("l7b", 4, "nf4", 128, 1, 4096, "selective", "uneven"),
    ("q8b", 4, "bf16", 16, 2, 2048, "none", ""), ("q8b", 4, "bf16", 16, 2, 2048, "full/1024", "uneven"),
    ("q8b", 4, "nf4", 16, 2, 2048, "offload/2048", ""), ("q8b", 4, "nf4", 32, 1, 8192, "wide", ""),
    ("l1b", 0, "bf16", 16, 1, 512, "none", ""), ("l1b", 0, "bf16", 16, 4, 2048, "none", ""),
    ("l1b", 0, "bf16", 16, 4, 2048, "full/2048", "uneven"), ("l1b", 0, "nf4", 16, 4, 2048, "offload", ""),
    ("q0_6b", 0, "bf16", 16, 2, 2048, "none", ""), ("q0_6b", 0, "bf16", 8, 2, 2048, "selective", "uneven"),
    ("q0_6b", 0, "nf4", 64, 1, 16384, "full", ""), ("l7b", 0, "bf16", 16, 4, 2048, "none", ""),
    ("l7b", 0, "bf16", 16, 4, 2048, "offload/2048", ""), ("l7b", 0, "nf4", 16, 4, 2048, "fullx16+none", ""),
    ("l7b", 0, "nf4", 16, 1, 2048, "offload/1024", "uneven"),
]  # fmt: skip


def estimates() -> None:
    """Prints one row for each of `ESTIMATED`."""
    model: tuple[object, ...] = ()
    for shape, layers, precision, r, batch, tokens, text, uneven in ESTIMATED:
        name = f"{shape}-{layers}" if layers else shape
        SHAPES[name] = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
        if model[:3] != (name, precision, r):
            model = ()
            gc.collect()
            torch.cuda.empty_cache()
            model = (name, precision, r, prepared(name, precision, r))
        forward = model[3]
        assert isinstance(forward, PackedForward)
        wish = Wish("nf4" if precision == "nf4" else "auto", LoraConfig(r=r, target_modules=TARGETS), Setting(0))
        what = survey_of(model_of(name, "meta"), wish)
        plan = plan_of(text, what.layers)
        expected = peak(what, Setting(batch * tokens, even=not uneven), plan)
        found = measure(forward, batch, tokens, plan, 1, bool(uneven))
        allocated = float(str(found["peak_gib"]))
        print(json.dumps({
            "shape": shape, "layers": what.layers, "precision": precision, "r": r, "batch": batch, "tokens": tokens,
            "documents": uneven or "even", "plan": str(plan), "tile": plan.tile, "measured_gib": allocated,
            "estimated_gib": round(expected.allocated / GIB, 3),
            "over": round(expected.allocated / GIB / allocated - 1, 4), "reserved_gib": found["reserved_gib"],
            "estimated_reserved_gib": round((expected.total - expected.context) / GIB, 3),
        }), flush=True)  # fmt: skip


def main() -> None:
    if sys.argv[1] == "estimate":
        estimates()
        return
    _, shape, batch, tokens, precision, *plans = sys.argv[1:]
    forward = prepared(shape, precision)
    machine = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    machine["transformers"] = transformers.__version__
    layers = forward.model.config.num_hidden_layers
    for text in plans:
        found: dict[str, object] = {"shape": shape, "precision": precision}
        size, _, own = text.rpartition(":")
        rows = [int(n) for n in (size or f"{batch}x{tokens}").split("x")]
        try:
            found |= measure(forward, *rows, plan_of(own, layers))
        except torch.OutOfMemoryError as error:
            found |= {"plan": text, "error": str(error).splitlines()[0]}
        print(json.dumps(found | machine), flush=True)


if __name__ == "__main__":
    main()
