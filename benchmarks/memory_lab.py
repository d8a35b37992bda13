"""Shared by the parts of `benchmarks.memory`: models with an adapter, plans by name, one measured plan."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.shapes import SHAPES, model_of, nf4_model_of, row_of
from loratune.base.forward import PackedForward, prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.errors import TrainingError
from loratune.fused.policy import TILE, ActivationPlan, Level
from loratune.lora.inject import attach
from loratune.memory.budget import CONTEXT, RowSetting
from loratune.memory.survey import ModelSurvey, survey, trained_in
from loratune.ops.host import is_mapped
from loratune.training.graph import GraphStep
from loratune.training.optim import FusedAdamW, adamw, masters_on_host, set_rate

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 1 << 30
Found = dict[str, object]


def plan_of(text: str, layers: int) -> ActivationPlan:
    """Parses a plan: `full`, `full/2048`, `offloadx20+none`, ..."""
    match = re.fullmatch(r"([a-z]+)(?:x(\d+)\+([a-z]+))?(?:/(\d+))?(@e?o?)?", text)
    assert match, text
    first, count, other, tile, host = match.groups()
    level = Level[first.upper()]
    rest = Level[other.upper()] if other else level
    plan = ActivationPlan.mixed(level, int(count or layers), rest, layers, int(tile or TILE))
    return replace(plan, embeddings_on_host="e" in (host or ""), optimizer_on_host="o" in (host or ""))


def cut(shape: str, layers: int) -> str:
    """Name of a shape cut to `layers` layers; 0 keeps all."""
    if not layers:
        return shape
    SHAPES[f"{shape}-{layers}"] = SHAPES[shape] | {"num_hidden_layers": layers}
    return f"{shape}-{layers}"


def prepared(shape: str, precision: str = "bf16", r: int = 16) -> PackedForward:
    """The model on the GPU with an adapter; "l7b-8" has 8 of the layers of "l7b"."""
    name, _, layers = shape.partition("-")
    shape = cut(name, int(layers or 0))
    model = {"bf16": model_of, "nf4": nf4_model_of}[precision](shape)
    attach(model, LoraConfig(r=r, lora_alpha=16, target_modules=TARGETS), name="default", seed=0)
    return prepare(model)


def surveyed(forward: PackedForward) -> ModelSurvey:
    """Prepares the forward as `memory.fit` does."""
    model = forward.model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return survey(model, trained_in(model), trainable, fit=forward.fused)


def cap_at(gib: float) -> None:
    """Limits PyTorch to the memory of a device of this many GiB, minus CUDA's context; 0 removes the limit."""
    whole = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * GIB - CONTEXT) / whole) if gib else 1.0)


def fresh(forward: PackedForward) -> None:
    """Resets caps, host placement, gradients and cached memory after the previous case, also after a failure."""
    cap_at(0)
    forward.plan, forward.record = None, True
    for parameter in forward.model.parameters():
        parameter.grad = None
        if is_mapped(parameter):
            parameter.data = parameter.data.clone()
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def attempt(case: Callable[[], Found]) -> Found:
    """Result of a case, or its reason for failing; running out of memory does not end the benchmark."""
    try:
        return case()
    except (RuntimeError, TrainingError) as error:
        return {"error": str(error).strip().splitlines()[0]}


def optimizer_for(forward: PackedForward) -> FusedAdamW:
    """AdamW over the trained parameters, on the host if the plan puts it there."""
    parameters = [p for p in forward.model.parameters() if p.requires_grad]
    on_host = forward.plan is not None and forward.plan.optimizer_on_host
    if on_host and not is_mapped(parameters[0]):
        masters_on_host(parameters)
    optimizer = adamw(parameters, TrainConfig(learning_rate=2e-4))
    if on_host:
        optimizer.move_moments_to_host()
    return optimizer


def lengths_of(batch: int, tokens: int, uneven: bool) -> list[int]:
    """Lengths of the documents of a row of batch x tokens: equal, or as many and as uneven as plans assume."""
    if not uneven:
        return [tokens] * batch
    row, count = batch * tokens, RowSetting(batch * tokens).documents
    first = 2 * row // 5
    return [first, *[(row - first) // (count - 1)] * (count - 2)]  # the last document is padding


def measure(forward: PackedForward, batch: int, tokens: int, steps: int = 5, uneven: bool = False) -> Found:
    """Speed and memory under `forward.plan` over all steps, recording included."""
    base = torch.cuda.memory_allocated()
    plan = forward.plan
    optimizer = optimizer_for(forward)
    parameters = [p for p in forward.model.parameters() if p.requires_grad]
    step = GraphStep(forward, parameters, optimizer, 1.0, record=forward.record)
    row = [row_of(lengths_of(batch, tokens, uneven), batch * tokens, 0)]
    seconds, losses = [], []
    with forward.installed():
        torch.cuda.reset_peak_memory_stats()  # offloaded tensors have left the device
        for _ in range(steps + 3):
            set_rate(optimizer, 1e-4)
            torch.cuda.synchronize()
            start = time.perf_counter()
            losses.append(step(row).loss)
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[3:])
    return {
        "system": "loratune", "batch": batch, "tokens": tokens, "plan": str(plan), "tile": plan and plan.tile,
        "tok_s": round(batch * tokens / median), "step_ms": round(median * 1e3, 1), **peaks(),
        "base_gib": round(base / GIB, 3), "losses": [round(loss, 4) for loss in losses[:4]],
        "fused": forward.fused is not None, "recorded": bool(step._graphs), "why_not": step.why_not,
        "first_s": round(seconds[0], 2), "second_s": round(seconds[1], 2),
    }  # fmt: skip


def peaks() -> Found:
    """Allocator figures since `fresh`; `total_gib` adds CUDA's context."""
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {
        "peak_gib": round(allocated / GIB, 3), "reserved_gib": round(reserved / GIB, 3),
        "total_gib": round((reserved + CONTEXT) / GIB, 3),
    }  # fmt: skip


def sizes_of(text: str, batch: int, tokens: int) -> tuple[int, int, str]:
    """Splits a case such as `1x2048:full` into batch, tokens and the rest; the size is optional."""
    size, _, own = text.rpartition(":")
    first, second = (int(n) for n in (size or f"{batch}x{tokens}").split("x"))
    return first, second, own
