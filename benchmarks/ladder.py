"""Tokens per second of one whole optimizer step as `loratune train` runs it, one JSON object per row.

    python -m benchmarks.ladder SHAPE BATCH TOKENS [VARIANT] [STEPS] [--precision P] [--both-ways]
    python -m benchmarks.ladder --all OUT.jsonl [VARIANT] [STEPS]        every case of `CASES`

P is bf16, nf4 or fp8. `--both-ways` also stores the transposed 8-bit weights, as `loratune train` does if they
fit.

`first_step_s` counts from process start; with `--all`, where one process measures all shapes, earlier shapes are
subtracted.

Random weights, r = 16 on all seven projections, AdamW, `batch` documents of `tokens` tokens in one packed row,
all tokens trained. A step lasts from handing over the row until its loss is on the host. Variants: `graph` is the
default of `loratune train`; `eager` the same without recording; `modules` transformers' layers with our LoRA
layers; `written` computes soft caps without their kernel (`ops.attention.capped`); `separate` runs layers that
are not fused with transformers' own norms and activations. `benchmarks.peers` measures the other systems on the
same machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

STARTED = time.perf_counter()
IMPORTED = 0.0
WARM_UP = 3
"""Steps that are not counted: the first runs eagerly, the second is recorded, the third is the first replay."""

CASES = [
    ("l7b", 4, 2048, "bf16", False), ("l7b", 1, 512, "bf16", False), ("l1b", 1, 512, "bf16", False),
    ("l1b", 4, 2048, "bf16", False), ("q0_6b", 2, 2048, "bf16", False), ("q8b", 2, 2048, "bf16", False),
    ("l7b", 4, 2048, "fp8", False), ("l7b", 4, 2048, "fp8", True),
    ("q8b", 2, 2048, "fp8", False), ("q8b", 2, 2048, "fp8", True),
]  # fmt: skip


def measure(
    shape: str, batch: int, tokens: int, precision: str, both_ways: bool, variant: str, steps: int
) -> dict[str, object]:
    """One variant on one shape; `both_ways` is `ActivationPlan.hold_transposed`."""
    import torch
    import transformers

    from benchmarks.shapes import limit_tok_s, model_of, row_of
    from loratune.base.forward import prepare
    from loratune.config import LoraConfig, TrainConfig
    from loratune.fused.policy import ActivationPlan, Level
    from loratune.lora.inject import attach
    from loratune.ops.attention import documents as attention
    from loratune.ops.attention import flash
    from loratune.precision.contract import weight_format
    from loratune.tables import PRECISIONS
    from loratune.training.graph import GraphStep
    from loratune.training.optim import adamw, set_rate
    from loratune.training.step import train_step

    global IMPORTED
    IMPORTED = IMPORTED or time.perf_counter() - STARTED
    started = time.perf_counter() - IMPORTED
    model = model_of(shape, form=weight_format(precision).quantise if precision in PRECISIONS else None)
    torch.cuda.synchronize()
    built = time.perf_counter() - started
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    attach(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets), name="default", seed=0)
    if variant == "written":
        attention._has_kernel = lambda *_: False
    forward = prepare(model)
    if variant == "modules":
        forward.fused = None
    if variant in ("modules", "separate"):
        forward.one_pass = False
    if both_ways:
        forward.plan = ActivationPlan((Level.NONE,) * model.config.num_hidden_layers, hold_transposed=True)
    torch.cuda.synchronize()
    prepared = time.perf_counter() - started
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, TrainConfig(learning_rate=2e-4))
    step = GraphStep(forward, parameters, optimizer, 1.0, record=variant == "graph")
    rows = [[row_of([tokens] * batch, batch * tokens, seed)] for seed in range(4)]
    seconds, losses = [], []
    torch.cuda.reset_peak_memory_stats()
    with forward.installed():
        for index in range(steps + WARM_UP):
            set_rate(optimizer, 1e-4)
            torch.cuda.synchronize()
            start = time.perf_counter()
            row, later = rows[index % 4], rows[(index + 1) % 4]  # `later` as the training loop announces it
            taken = (
                train_step(forward, row, parameters, optimizer, max_grad_norm=1.0)
                if variant == "modules"
                else step(row, later)
            )
            seconds.append(time.perf_counter() - start)
            losses.append(taken.loss)
            if index == 0:
                first = time.perf_counter() - started
    median = statistics.median(seconds[WARM_UP:])
    replay = _replay_ms(step)
    speed = batch * tokens / median
    return {
        "system": "loratune", "shape": shape, "batch": batch, "tokens": tokens, "precision": precision,
        "both_ways": both_ways, "policy": variant, "tok_s": round(speed), "step_ms": round(median * 1e3, 2),
        "replay_ms": replay, "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "first_step_s": round(first, 1), "imported_s": round(IMPORTED, 1), "built_s": round(built, 1),
        "prepared_s": round(prepared, 1), "second_step_s": round(seconds[1], 2),
        "limit_share": round(speed / limit_tok_s(shape, batch, tokens, precision), 3),
        "losses": [round(loss, 5) for loss in losses[:8]], "fused": forward.fused is not None, "note": step.why_not,
        "attention": "capped" if getattr(model.config, "attn_logit_softcapping", None) is not None
        else "flash4" if flash.fits(model.device, model.config.head_dim) else "pytorch",
        "machine": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def _replay_ms(step: object) -> float | None:
    """Milliseconds of the recorded step replayed back to back, without waiting for the host."""
    import torch

    graph = next((graph for graph in step._graphs.values() if graph is not None), None)  # type: ignore[attr-defined]
    if graph is None:
        return None
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) * 100, 2)


def release() -> None:
    """Frees everything the last measurement allocated, so the next one starts from the same state."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder")
    parser.add_argument(
        "words", nargs="+", help="SHAPE BATCH TOKENS, or with --all OUT.jsonl; then variant and steps"
    )
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--precision", choices=["bf16", "nf4", "fp8"], default="bf16")
    parser.add_argument("--both-ways", action="store_true")
    given = parser.parse_args()
    own = 1 if given.all else 3
    variant, steps = [*given.words[own:], *["graph", "12"][len(given.words) - own :]]
    if not given.all:
        shape, batch, tokens = given.words[:own]
        case = shape, int(batch), int(tokens), given.precision, given.both_ways
        print(json.dumps(measure(*case, variant, int(steps))))
        return
    for case in CASES:
        row = json.dumps(measure(*case, variant, int(steps)))
        print(row, flush=True)
        with Path(given.words[0]).open("a") as out:
            out.write(row + "\n")
        release()


if __name__ == "__main__":
    main()
