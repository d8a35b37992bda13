"""Tokens per second against peak memory, one JSON object per row.

    python -m benchmarks.memory frontier SHAPE BATCH TOKENS PRECISION CAP [...]    the plan `train --memory` chooses
    python -m benchmarks.memory plans SHAPE BATCH TOKENS PRECISION PLAN [...]      plan by plan
    python -m benchmarks.memory policies SHAPE BATCH TOKENS PRECISION [CAP ...]    auto beside every uniform plan
    python -m benchmarks.memory long SHAPE PRECISION CAP[:TOKENS] [...]            the longest document, one step
    python -m benchmarks.memory steps [STEPS [SECONDS]]    10,000 steps of the bundled model: constant bytes
    python -m benchmarks.memory estimate                   estimate beside measurement, 32 settings
    python -m benchmarks.memory cpu                        the same on a CPU, beside the process's peak

Random weights, r = 16 on all seven projections, AdamW, `batch` documents of `tokens` tokens in one packed row,
all tokens trained, as in `benchmarks.ladder`. SHAPE is one of `benchmarks.shapes`; l7b-8 is l7b with eight
layers. CAP, in GiB, limits the process's device memory as `--memory` does, CUDA's context included. It is
enforced, so a row without an error kept to it. `peak_gib` is PyTorch's allocated peak, as for peers;
`reserved_gib` the allocator's memory; `total_gib` that plus the context. Peaks cover all steps, recording
included. PLAN is LEVEL, LEVEL/TILE, or LEVELxN+LEVEL[/TILE]: the first level for N layers, the second for the
rest. A suffix @e puts the embeddings on the host, @o the optimizer, @eo both. CAP and PLAN may start with a size,
as in 1x2048:6.1.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Iterator

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `loratune train`, before PyTorch

import torch
import transformers

from benchmarks import memory_estimate, memory_runs
from benchmarks.memory_lab import (
    GIB,
    Found,
    attempt,
    fresh,
    measure,
    plan_of,
    prepared,
    sizes_of,
    surveyed,
)
from loratune.base.forward import PackedForward
from loratune.config import TrainConfig
from loratune.fused.policy import Level
from loratune.memory.budget import RowSetting, peak
from loratune.memory.devices import present
from loratune.memory.fit import fit

UNIFORM = [*(level.name.lower() for level in Level), "wide/2048", "full/2048", "offload/2048"]
SHARES = (0.02, 0.2, 0.4, 0.7, 1.1)
"""Caps of `policies`, as shares of the way from the most frugal plan's memory to the most generous plan's."""


def capped(forward: PackedForward, batch: int, tokens: int, cap: float, steps: int = 3) -> Found:
    """Measures a run under `--memory`: `memory.fit` chooses and tries a plan, which then runs under the same cap."""
    parameters = {path: p for path, p in forward.model.named_parameters() if p.requires_grad}
    start = time.perf_counter()
    fitted = fit(forward, parameters, TrainConfig(memory=f"{cap}GiB"), batch * tokens)
    chosen = time.perf_counter() - start
    assert fitted.expected is not None
    torch.cuda.reset_peak_memory_stats()
    what = surveyed(forward)
    even = peak(what, RowSetting(batch * tokens, even=True), fitted.plan)
    return measure(forward, batch, tokens, steps) | {
        "estimated_gib": round(even.allocated / GIB, 3), "estimated_total_gib": round(fitted.expected.total / GIB, 3),
        "tried_gib": round(fitted.tried / GIB, 3), "fit_s": round(chosen, 1),
    }  # fmt: skip


def frontier(shape: str, batch: int, tokens: int, precision: str, caps: list[str]) -> Iterator[Found]:
    """One row for each cap; a cap is GiB, or BATCHxTOKENS:GiB."""
    start = time.perf_counter()
    forward = prepared(shape, precision)
    made = round(time.perf_counter() - start, 1)
    for text in caps:
        rows, row_tokens, cap = sizes_of(text, batch, tokens)
        fresh(forward)
        found = attempt(functools.partial(capped, forward, rows, row_tokens, float(cap)))
        about: Found = {"cap_gib": float(cap), "batch": rows, "tokens": row_tokens, "model_s": made}
        if "total_gib" in found:
            about["kept_to_the_cap"] = float(str(found["total_gib"])) <= float(cap) + 0.001
        yield about | found
    fresh(forward)


def plans(shape: str, batch: int, tokens: int, precision: str, texts: list[str]) -> Iterator[Found]:
    """Measures each plan without a cap."""
    forward = prepared(shape, precision)
    for text in texts:
        rows, row_tokens, own = sizes_of(text, batch, tokens)
        fresh(forward)
        yield {"asked": text} | attempt(functools.partial(_planned, forward, rows, row_tokens, own))
    fresh(forward)


def _planned(forward: PackedForward, batch: int, tokens: int, text: str) -> Found:
    forward.plan = plan_of(text, forward.model.config.num_hidden_layers)
    return measure(forward, batch, tokens, 3)


def policies(shape: str, batch: int, tokens: int, precision: str, caps: list[str]) -> Iterator[Found]:
    """Measures every uniform plan without a cap; then, per cap, auto's plan beside the uniform plans that fit."""
    forward = prepared(shape, precision)
    rows: list[Found] = []
    for text in UNIFORM:
        fresh(forward)
        found = {"policy": text} | attempt(functools.partial(_planned, forward, batch, tokens, text))
        rows.append(found)
        yield found
    rows = [row for row in rows if "total_gib" in row]
    totals = [float(str(row["total_gib"])) for row in rows]
    low, high = min(totals), max(totals)
    for cap in [float(text) for text in caps] or [round(low + share * (high - low), 2) for share in SHARES]:
        fresh(forward)
        auto = attempt(functools.partial(capped, forward, batch, tokens, cap))
        fitting = {str(row["policy"]): int(str(row["tok_s"])) for row in rows if float(str(row["total_gib"])) <= cap}
        best = max(fitting, key=lambda policy: fitting[policy], default=None)
        verdict: Found = {"cap_gib": cap, "fitting": fitting, "best_uniform": best}
        if best is not None and "tok_s" in auto:
            ratio = int(str(auto["tok_s"])) / fitting[best]
            verdict |= {"auto_over_best": round(ratio, 4), "auto_is_fastest": ratio >= 0.99}
        yield verdict | auto
    fresh(forward)


def report(about: Found, rows: Iterator[Found]) -> None:
    """Prints each row as soon as it exists, with machine and versions."""
    machine = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    machine |= {"transformers": transformers.__version__, "device": present(torch.device("cuda")).name}
    for row in rows:
        print(json.dumps(about | row | machine), flush=True)


def main() -> None:
    verb, *words = sys.argv[1:]
    if verb == "estimate":
        report({}, memory_estimate.on_gpu())
    elif verb == "cpu":
        memory_estimate.on_cpu(words)
    elif verb == "steps":
        report({}, memory_runs.many_steps(*map(int, words)))
    elif verb == "long":
        shape, precision, *cases = words
        report({"shape": shape, "precision": precision}, memory_runs.long_documents(shape, precision, cases))
    else:
        shape, batch, tokens, precision, *cases = words
        kinds = {"frontier": frontier, "plans": plans, "policies": policies}
        rows = kinds[verb](shape, int(batch), int(tokens), precision, cases)
        report({"shape": shape, "precision": precision}, rows)


if __name__ == "__main__":
    main()
