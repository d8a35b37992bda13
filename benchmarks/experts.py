"""Mixtures of experts: tokens a second of a whole optimizer step, and the time of their grouped products.

    python -m benchmarks.experts OUT.jsonl CASE... [--layers N] [--steps 8] [--device cuda]

Cases: a shape, the tokens of its one row, and the adapted part, joined by colons; for example

    qwen3-30b:4096:attention    r = 16 on the attention of Qwen3-30B-A3B, experts frozen
    qwen3-30b:4096:experts      and a pair of rank 16 for every expert
    qwen3-30b:4096:experts:nf4  the same with random 4-bit codes in linear layers and experts
    ...:adamw_8bit              with 8-bit moments
    ...:72GiB                   `memory.fit` chooses the activations under this limit, as `--memory` does in a run
    gpt-oss-20b:4096:attention
    products:qwen3-30b:4096     microseconds of each grouped product, ours beside torch.nn.functional.grouped_mm

Weights are random, in bfloat16 unless the case says otherwise. Codes of NF4 and of MXFP4 cost the same, except
that MXFP4 has 4.25 instead of 4.13 bits. A step trains all tokens of one packed row of two documents. It runs as a
CUDA graph where the model allows. Its time ends with the loss on the host; rows give the median.

Rows name the plan of activations. Peaks are bytes that PyTorch allocated; a limit counts CUDA's context as well.

With `--layers N` a model has N decoder layers. `tok_s_extrapolated` and `peak_gib_extrapolated` then state what all
layers would take: a second model with N / 2 layers is measured, and the difference is the cost of a layer.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.shapes import random_codes, row_of
from loratune.base.forward import prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.lora.inject import attach
from loratune.memory.fit import fit
from loratune.ops.experts import grouped_outer, grouped_product, plain_product, route
from loratune.ops.gates import GateFormula, gated_rows, gated_rows_backward
from loratune.precision.linear import quantise_linears
from loratune.training.graph import GraphStep
from loratune.training.optim import optimizer_of, set_rate

WARM_UP, RANK = 4, 16
_QWEN = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960,
}  # fmt: skip
_TINY = _QWEN | {
    "vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_experts": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2,
}  # fmt: skip
SHAPES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "qwen3-30b": (tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM, _QWEN),
    "gpt-oss-20b": (tf.GptOssConfig, tf.GptOssForCausalLM, {"num_hidden_layers": 24, "num_local_experts": 32}),
    "tiny": (tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM, _TINY),
}


def random_model(shape: str, layers: int | None, device: str, precision: str) -> PreTrainedModel:
    """A frozen model with random weights; bfloat16 on a GPU, float32 on a CPU."""
    config, kind, values = SHAPES[shape]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        settings = values | ({} if layers is None else {"num_hidden_layers": layers})
        with torch.device("meta"):
            model: PreTrainedModel = kind(config(**settings))
        if precision == "nf4":
            quantise_linears(model.model.layers, lambda weight: random_codes(weight, torch.device(device)))
        model.to_empty(device=device)
        model.tie_weights()
        with torch.device(device):
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)
        return model.requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def measure(
    shape: str,
    tokens: int,
    adapted: str,
    options: list[str],
    layers: int | None,
    steps: int,
    device: str,
) -> dict[str, Any]:
    """One case with a number of layers."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = random_model(shape, layers, device, "nf4" if "nf4" in options else "bf16")
    parameters_of = {"experts": "all-experts", "attention": None}[adapted]
    report = attach(model, LoraConfig(r=RANK, lora_alpha=RANK, target_parameters=parameters_of))
    forward = prepare(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    settings = TrainConfig(
        learning_rate=2e-4,
        optim="adamw_8bit" if "adamw_8bit" in options else "adamw",
        memory=next((option for option in options if option.endswith("GiB")), None),
    )
    if settings.memory is not None:
        fit(forward, trained, settings, tokens)
    optimizer = optimizer_of(parameters, settings)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = GraphStep(forward, parameters, optimizer, 1.0, record=device == "cuda")
    rows = [[row_of([tokens // 2] * 2, tokens, seed)] for seed in range(4)]
    seconds, losses = [], []
    with forward.installed():
        for index in range(steps + WARM_UP):
            set_rate(optimizer, 1e-4)
            start = time.perf_counter()
            losses.append(step(rows[index % 4], rows[(index + 1) % 4]).loss)
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[WARM_UP:])
    return {
        "layers": model.config.num_hidden_layers, "plan": str(forward.plan or "none"),
        "tokens": tokens, "trained": report.trainable_parameters,
        "tok_s": round(tokens / median), "step_ms": round(median * 1e3, 2), "path": forward.path,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None,
        "fused": forward.fused is not None, "notes": [*forward.notes, *filter(None, [step.why_not])],
        "losses": [round(loss, 4) for loss in losses[:4]],
    }  # fmt: skip


def release() -> None:
    """Frees the memory of the previous model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def of_a_model(case: str, layers: int | None, steps: int, device: str) -> dict[str, Any]:
    """The row of a case, extrapolated to all layers if it has fewer."""
    shape, tokens, adapted, *options = case.split(":")
    row = measure(shape, int(tokens), adapted, options, layers, steps, device)
    release()
    if layers is None:
        return row
    half = measure(shape, int(tokens), adapted, options, layers // 2, steps, device)
    release()
    missing, more = SHAPES[shape][2]["num_hidden_layers"] - layers, layers - layers // 2
    step_ms = row["step_ms"] + (row["step_ms"] - half["step_ms"]) / more * missing
    row["tok_s_extrapolated"] = round(int(tokens) / step_ms * 1e3)
    if device == "cuda":
        gib = row["peak_gib"] + (row["peak_gib"] - half["peak_gib"]) / more * missing
        row["peak_gib_extrapolated"] = round(gib, 2)
    return row


def timed(run: Callable[[], object], device: str) -> float:
    """Median microseconds of 20 runs."""
    found = []
    for _ in range(23):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e6)
    return round(statistics.median(found[3:]), 1)


def gate_of(shape: str) -> GateFormula:
    """The gated activation of a shape."""
    return GateFormula("silu", True, 1.702, 7.0, 1.0) if shape == "gpt-oss-20b" else GateFormula("silu")


def of_products(shape: str, tokens: int, device: str) -> dict[str, Any]:
    """Microseconds of the grouped products of one layer."""
    values = SHAPES[shape][0](**SHAPES[shape][2])
    d, m = values.hidden_size, getattr(values, "moe_intermediate_size", values.intermediate_size)
    experts = getattr(values, "num_local_experts", None) or values.num_experts
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    index = torch.rand(tokens, experts, device=device).topk(values.num_experts_per_tok, -1).indices
    routing = route(index, experts)
    pairs = routing.order.shape[0]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) * 0.02

    x, rows, hidden, low = random(tokens, d), random(pairs, d), random(pairs, 2 * m), random(pairs, RANK)
    up, A, B = random(experts, 2 * m, d), random(experts, RANK, d), random(experts, 2 * m, RANK)
    active, factors, gate = random(pairs, m), torch.rand(pairs, device=device), gate_of(shape)
    ends, at, W = routing.ends, routing.tokens, up.transpose(1, 2)
    runs: dict[str, Callable[[], object]] = {
        "route_us": lambda: route(index, experts),
        "up_us": lambda: plain_product(x, W, ends, at),
        "up_kernel_us": lambda: grouped_product(x, W, ends, at),
        "up_back_us": lambda: plain_product(hidden, up, ends),
        "up_back_kernel_us": lambda: grouped_product(hidden, up, ends),
        "up_with_pair_us": lambda: grouped_product(x, W, ends, at, low, B.transpose(1, 2)),
        "low_us": lambda: grouped_product(x, A.transpose(1, 2), ends, at),
        "gate_us": lambda: gated_rows(hidden, gate, None, routing.experts),
        "gate_back_us": lambda: gated_rows_backward(hidden, gate, None, routing.experts, active, factors, None),
        "outer_A_us": lambda: grouped_outer(low, x, ends, at),
        "outer_B_us": lambda: grouped_outer(low, hidden, ends, None, True),
        "sort_route_us": lambda: index.view(-1).sort(stable=True),
    }
    if device == "cuda":
        theirs = torch.nn.functional.grouped_mm
        runs |= {
            "gather_us": lambda: x[at],
            "torch_up_us": lambda: theirs(rows, W, offs=ends),
            "torch_up_back_us": lambda: theirs(hidden, up, offs=ends),
            "torch_low_us": lambda: theirs(rows, A.transpose(1, 2), offs=ends),
            "torch_outer_A_us": lambda: theirs(low.T, rows, offs=ends),
        }
    found: dict[str, Any] = {name: timed(run, device) for name, run in runs.items()}
    flops = 2 * pairs * d * 2 * m
    found["up_tflops"] = round(flops / found["up_us"] / 1e6, 1)
    if device == "cuda":
        found["torch_up_tflops"] = round(flops / found["torch_up_us"] / 1e6, 1)
        found["up_error"] = float((grouped_product(x, W, ends, at) - theirs(x[at], W, offs=ends)).abs().max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts")
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--layers", type=int, help="decoder layers, instead of all")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    for case in given.cases:
        try:
            kind, *rest = case.split(":")
            if kind == "products":
                row = of_products(rest[0], int(rest[1]), given.device)
            else:
                row = of_a_model(case, given.layers, given.steps, given.device)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            row = {"error": f"{type(error).__name__}: {error}"[:600]}
            release()
        machine = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
        row = {"case": case} | row | {"machine": machine, "torch": torch.__version__, "transformers": tf.__version__}
        line = json.dumps(row)
        print(line, flush=True)
        with given.out.open("a") as out:
            out.write(line + "\n")


if __name__ == "__main__":
    main()
