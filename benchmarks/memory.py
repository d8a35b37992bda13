"""Tokens a second against peak memory, one JSON object a row.

    python -m benchmarks.memory plans SHAPE BATCH TOKENS PRECISION PLAN [PLAN ...]     the frontier, plan by plan
    python -m benchmarks.memory frontier SHAPE BATCH TOKENS PRECISION CAP [CAP ...]   what auto takes, by cap in GiB
    python -m benchmarks.memory long SHAPE PRECISION LAYERS CAP:TOKENS:PLAN [...]     one document, one step
    python -m benchmarks.memory steps                         10,000 steps of the model in the box on its own data
    python -m benchmarks.memory cpu                           the estimate on a CPU beside the process's peak
    python -m benchmarks.memory estimate                      what is estimated beside what is measured, 26 settings

Random weights, r = 16 on all seven projections, AdamW, `batch` documents of `tokens` tokens in one packed row, all
tokens trained, as in `benchmarks.ladder`. A PLAN is LEVEL, LEVEL/TILE, or LEVELxN+LEVEL[/TILE]: the first for the
first N layers, the second for the rest; @e behind it puts the embeddings on the host, @o the optimizer, @eo both;
1x2048: before it is a size of its own. Peaks are those of PyTorch's allocator, allocated and reserved, over all steps
from the first on, recording included.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config, Qwen3Config

from benchmarks.shapes import SHAPES, model_of, row_of
from loratune.base.forward import PackedForward, prepare
from loratune.base.load import POCKET
from loratune.box import TASKS, data_file
from loratune.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from loratune.estimate import Wish, estimate, survey_of
from loratune.lora.inject import attach
from loratune.ops import nf4
from loratune.ops.policy import TILE, Level, Plan
from loratune.training.budget import CONTEXT, Setting, choose, peak
from loratune.training.course import StepDone
from loratune.training.devices import Device, named
from loratune.training.graph import GraphStep
from loratune.training.imagine import without_data
from loratune.training.optim import adamw, masters_on_host, moments_on_host, set_rate
from loratune.training.run import run
from loratune.training.step import train_step
from loratune.training.survey import ranks_of, survey

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
    ("q0_6b", 0, "nf4", 64, 1, 16384, "full", ""), ("q0_6b", 0, "nf4", 64, 4, 2048, "staged/2048", "uneven"),
    ("l1b", 0, "nf4", 16, 4, 2048, "hosted", ""),
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


def cap_at(gib: float) -> None:
    """Lets PyTorch allocate what a device of so many GiB would leave it beside CUDA's context; 0 for no cap."""
    whole = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((gib * GIB - CONTEXT) / whole if gib else 1.0)


def frontier(shape: str, batch: int, tokens: int, precision: str, caps: list[str]) -> Iterator[dict[str, object]]:
    """What `auto` chooses under each cap, and how fast that is; a cap is GiB, or BATCHxTOKENS:GiB."""
    forward = prepared(shape, precision)
    model = forward.model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = survey(model, ranks_of(model), trainable, "auto", model.dtype, on_gpu=True, dropout=0.0)
    for text in caps:
        size, _, own = text.rpartition(":")
        rows = [int(n) for n in (size or f"{batch}x{tokens}").split("x")]
        cap, setting = float(own), Setting(rows[0] * rows[1], even=True)
        found: dict[str, object] = {"cap_gib": cap, "batch": rows[0], "tokens": rows[1]}
        choice = choose(what, setting, named("H200"), int(cap * GIB))
        if choice is None:
            yield found | {"error": "no plan fits"}
            continue
        cap_at(cap)
        found |= {"estimated_gib": round(choice.bytes.allocated / GIB, 3)}
        found |= {"estimated_tok_s": round(setting.tokens / choice.seconds)}
        try:
            found |= measure(forward, rows[0], rows[1], choice.plan, 3)
        except torch.OutOfMemoryError as error:
            found |= {"plan": str(choice.plan), "error": str(error).splitlines()[0]}
        cap_at(0)
        yield found


def long_document(shape: str, precision: str, layers: int, cases: list[str]) -> Iterator[dict[str, object]]:
    """One document as long as the row: one step, launched kernel by kernel."""
    name = f"{shape}-{layers}" if layers else shape
    SHAPES[name] = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    forward = prepared(name, precision)
    parameters = [p for p in forward.model.parameters() if p.requires_grad]
    for case in cases:
        cap, tokens, text = case.split(":")
        gc.collect()
        torch.cuda.empty_cache()
        cap_at(float(cap))
        torch.cuda.reset_peak_memory_stats()
        plan = forward.plan = plan_of(text, forward.model.config.num_hidden_layers)
        if plan.optimizer_on_host:
            masters_on_host(parameters)
        optimizer = adamw(parameters, TrainConfig())
        if plan.optimizer_on_host:
            moments_on_host(optimizer)
        step = GraphStep(forward, parameters, optimizer, 1.0, record=False)
        found: dict[str, object] = {
            "cap_gib": float(cap),
            "tokens": int(tokens),
            "plan": str(plan),
            "tile": plan.tile,
        }
        start = time.perf_counter()
        try:
            with forward.installed():
                found |= {"loss": round(step([row_of([int(tokens)], int(tokens), 0)]).loss, 4)}
        except torch.OutOfMemoryError as error:
            found |= {"error": str(error).splitlines()[0]}
        found |= {
            "seconds": round(time.perf_counter() - start, 1), "layers": forward.model.config.num_hidden_layers,
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        }  # fmt: skip
        del step, optimizer
        yield found
        cap_at(0)


def many_steps() -> None:
    """Prints what is allocated and reserved behind some of 10,000 steps over real, uneven data."""
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model=POCKET,
            data=[str(data_file(TASKS[0], "train"))],
            out=folder + "/out",
            dataset=DataConfig(tokens_per_row=512, eval_fraction=0.0),
            training=TrainConfig(max_steps=10_000, save_every_steps=10_000),
        )
        seen: list[tuple[int, int]] = []
        for event in run(config):
            if isinstance(event, StepDone):
                seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
                if event.step in (1, 2, 3, 10, 100, 1000, 2500, 5000, 7500, 9999, 10_000):
                    print(
                        json.dumps({"step": event.step, "allocated": seen[-1][0], "reserved": seen[-1][1]}),
                        flush=True,
                    )
        behind = {allocated for allocated, _ in seen[1:]}
        print(
            json.dumps({"different_counts_behind_step_2": len(behind), "spread_bytes": max(behind) - min(behind)}),
            flush=True,
        )


CPU = {
    "llama": (LlamaConfig, {"num_key_value_heads": 8}), "gpt2": (GPT2Config, {}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 4, "head_dim": 64}),
    "phi3": (Phi3Config, {"num_key_value_heads": 8, "pad_token_id": 0}),
}  # fmt: skip
CPU_CASES = [
    ("llama", 1024, 8, "none"), ("llama", 4096, 8, "none"), ("llama", 4096, 64, "full"), ("qwen3", 2048, 8, "none"),
    ("qwen3", 4096, 8, "full"), ("gpt2", 1024, 8, "none"), ("phi3", 2048, 16, "none"), ("phi3", 4096, 16, "full"),
]  # fmt: skip


def on_cpu(name: str, tokens: int, r: int, policy: str) -> dict[str, object]:
    """Peak of this process over three steps, beside what was estimated before the model was made."""
    kind, own = CPU[name]
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = kind(**shape, vocab_size=8000, max_position_embeddings=4096, **own)
    wish = Wish("auto", LoraConfig(r=r), Setting(tokens), policy, on_gpu=False)
    expected = estimate(without_data(config, torch.float32), wish, Device("CPU", 0, 0, 0, 0), 0).choice.bytes
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()
    attach(model, wish.lora, name="default", seed=0)
    forward = prepare(model)
    forward.plan = Plan.uniform(Level[policy.upper()], 8)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, TrainConfig())
    with forward.installed():
        for seed in range(3):
            rows = [row_of([tokens], tokens, seed)]
            train_step(forward, rows, parameters, optimizer, max_grad_norm=1.0)
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "model": name, "tokens": tokens, "r": r, "activations": policy, "measured_gib": round(measured / GIB, 3),
        "estimated_gib": round(expected.total / GIB, 3), "over": round(expected.total / measured - 1, 3),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def plans(shape: str, batch: str, tokens: str, precision: str, texts: list[str]) -> Iterator[dict[str, object]]:
    """Each plan measured."""
    forward = prepared(shape, precision)
    layers = forward.model.config.num_hidden_layers
    for text in texts:
        size, _, own = text.rpartition(":")
        rows = [int(n) for n in (size or f"{batch}x{tokens}").split("x")]
        try:
            yield measure(forward, *rows, plan_of(own, layers))
        except torch.OutOfMemoryError as error:
            yield {"plan": text, "error": str(error).splitlines()[0]}


def main() -> None:
    verb, *words = sys.argv[1:]
    if verb == "estimate":
        estimates()
        return
    if verb == "cpu":
        # glibc keeps freed blocks of up to 32 MiB, which a process's peak would count; so they go back at once.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        for case in [words] if words else CPU_CASES:
            if words:
                print(json.dumps(on_cpu(case[0], int(case[1]), int(case[2]), case[3])))
            else:  # a process each, since a process remembers its peak
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.memory", "cpu", *map(str, case)], check=True, env=environment
                )
        return
    if verb == "steps":
        many_steps()
        return
    if verb == "long":
        shape, precision, layers, *cases = words
        rows = long_document(shape, precision, int(layers), cases)
    elif verb == "frontier":
        shape, batch, tokens, precision, *caps = words
        rows = frontier(shape, int(batch), int(tokens), precision, caps)
    else:
        shape, batch, tokens, precision, *texts = words
        rows = plans(shape, batch, tokens, precision, texts)
    report(shape, precision, rows)


def report(shape: str, precision: str, rows: Iterator[dict[str, object]]) -> None:
    """Prints each row as it comes, with the machine and the versions."""
    about = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    about["transformers"] = transformers.__version__
    for row in rows:
        print(json.dumps({"shape": shape, "precision": precision} | row | about), flush=True)


if __name__ == "__main__":
    main()
