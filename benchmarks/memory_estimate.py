"""Parts of `benchmarks.memory`: estimates made before a model exists, beside measurements on GPU and CPU."""

from __future__ import annotations

import functools
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config, Qwen3Config

from benchmarks.memory_lab import GIB, TARGETS, Found, attempt, cut, fresh, measure, plan_of, prepared
from benchmarks.shapes import model_of, row_of
from loratune.base.forward import PackedForward, prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.fused.policy import ActivationPlan, Level
from loratune.lora.inject import attach
from loratune.memory.budget import RowSetting, peak
from loratune.memory.devices import DeviceSpec
from loratune.memory.estimate import EstimateRequest, estimate, survey_of
from loratune.memory.simulate import without_data
from loratune.training.optim import adamw
from loratune.training.step import train_step

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
    ("l1b", 0, "nf4", 16, 4, 2048, "hosted", ""), ("l1b", 0, "nf4", 16, 2, 2048, "stagedx12+none", ""),
    ("q8b", 4, "nf4", 128, 1, 2048, "full/1024", "uneven"), ("q8b", 4, "nf4", 4, 4, 1024, "selective@e", ""),
    ("l8b", 3, "nf4", 32, 1, 4096, "stagedx2+none", ""), ("l8b", 3, "nf4", 32, 2, 4096, "offload/2048@eo", "uneven"),
]  # fmt: skip


def on_gpu() -> Iterator[Found]:
    """One row for each of `ESTIMATED`, and one that counts them."""
    forward: PackedForward | None = None
    known: tuple[object, ...] = ()
    over: list[float] = []
    for shape, layers, precision, r, batch, tokens, text, uneven in ESTIMATED:
        name = cut(shape, layers)
        if forward is None or known != (name, precision, r):
            forward = None
            gc.collect()
            torch.cuda.empty_cache()
            known, forward = (name, precision, r), prepared(name, precision, r)
        wish = EstimateRequest(
            "nf4" if precision == "nf4" else "auto", LoraConfig(r=r, target_modules=TARGETS), RowSetting(0)
        )
        what = survey_of(model_of(name, "meta"), wish)
        plan = plan_of(text, what.layers)
        expected = peak(what, RowSetting(batch * tokens, even=not uneven), plan)
        fresh(forward)
        forward.plan = plan
        found = attempt(functools.partial(measure, forward, batch, tokens, 1, bool(uneven)))
        row: Found = {
            "shape": shape, "layers": what.layers, "precision": precision, "r": r, "batch": batch, "tokens": tokens,
            "documents": uneven or "even", "plan": str(plan), "tile": plan.tile,
            "estimated_gib": round(expected.allocated / GIB, 3),
            "estimated_reserved_gib": round((expected.total - expected.context) / GIB, 3),
        }  # fmt: skip
        if "error" in found:
            yield row | found
            continue
        allocated = float(str(found["peak_gib"]))
        over.append(expected.allocated / GIB / allocated - 1)
        yield row | {
            "measured_gib": allocated, "over": round(over[-1], 4), "reserved_gib": found["reserved_gib"],
            "recorded": found["recorded"], "fused": found["fused"], "notes": forward.notes,
        }  # fmt: skip
    yield {
        "settings": len(ESTIMATED), "measured": len(over),
        "within_5_percent": sum(abs(share) <= 0.05 for share in over),
        "under": sum(share < 0 for share in over), "least": round(min(over), 4), "most": round(max(over), 4),
    }  # fmt: skip


CPU = {
    "llama": (LlamaConfig, {"num_key_value_heads": 8}), "gpt2": (GPT2Config, {}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 4, "head_dim": 64}),
    "phi3": (Phi3Config, {"num_key_value_heads": 8, "pad_token_id": 0}),
}  # fmt: skip
CPU_CASES = [
    ("llama", 1024, 8, "none"), ("llama", 4096, 8, "none"), ("llama", 4096, 64, "full"), ("qwen3", 2048, 8, "none"),
    ("qwen3", 4096, 8, "full"), ("gpt2", 1024, 8, "none"), ("phi3", 2048, 16, "none"), ("phi3", 4096, 16, "full"),
]  # fmt: skip


def _case(name: str, tokens: int, r: int, policy: str) -> dict[str, object]:
    """Peak memory of this process over three steps, beside the estimate made before the model existed."""
    kind, own = CPU[name]
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = kind(**shape, vocab_size=8000, max_position_embeddings=4096, **own)
    wish = EstimateRequest("auto", LoraConfig(r=r), RowSetting(tokens), policy, on_gpu=False)
    expected = estimate(without_data(config, torch.float32), wish, DeviceSpec("CPU", 0, 0, 0, 0), 0).choice.bytes
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()
    attach(model, wish.lora, name="default", seed=0)
    forward = prepare(model)
    forward.plan = ActivationPlan.uniform(Level[policy.upper()], 8)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, TrainConfig(learning_rate=2e-4))
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


def on_cpu(words: list[str]) -> None:
    """Prints one row per case of `CPU_CASES`. Each runs in its own process, since a process keeps its peak."""
    # glibc keeps freed blocks of up to 32 MiB, which a process's peak would count; so they go back at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    if words:
        print(json.dumps(_case(words[0], int(words[1]), int(words[2]), words[3])))
        return
    for case in CPU_CASES:
        command = [sys.executable, "-m", "benchmarks.memory", "cpu", *map(str, case)]
        subprocess.run(command, check=True, env=environment)
