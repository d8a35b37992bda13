"""Recurrent models: tokens a second of a whole optimizer step, packed, one document at a time, and PEFT.

    python -m benchmarks.recurrent OUT.jsonl CASE... [--steps 8] [--device cuda]

Cases: a shape and a system, joined by a colon; for example

    falcon-h1:packed        8 layers of hidden size 1,024, one row of 4,096 tokens with documents of uneven length
    falcon-h1:alone         the same, one document at a time
    falcon-h1:peft          PEFT and transformers on 2 x 2,048 tokens, without documents
    qwen3-next:packed       8 layers of Qwen3-Next's width, with 64 of its 512 experts
    qwen3_5:packed          8 layers of a dense Qwen3.5
    tiny:packed             a few seconds on a CPU, with `--device cpu`

Weights are random, in bfloat16 on a GPU. r = 16 on all linear layers, AdamW, all tokens trained. Our steps run as a
CUDA graph where the model allows. A step ends with the loss on the host; rows give the median. PEFT uses the kernels
of flash-linear-attention, causal-conv1d and mamba-ssm where they are installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from transformers import PreTrainedModel

from benchmarks.shapes import row_of
from loratune.base.forward import prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.lora.inject import attach
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, set_rate

WARM_UP, RANK, TOKENS = 4, 16, 4096
DOCUMENTS = (1400, 60, 333, 255, 1000, 48, 700, 300)
"""Lengths of the documents of a row of 4,096 tokens."""
_ATTENTION = {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "num_hidden_layers": 8}
_DELTA = {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2}
SHAPES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "falcon-h1": (
        tf.FalconH1Config,
        tf.FalconH1ForCausalLM,
        {
            "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "mamba_d_ssm": 1536,
            "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
        },
    ),
    "qwen3-next": (
        tf.Qwen3NextConfig,
        tf.Qwen3NextForCausalLM,
        _ATTENTION | _DELTA | {"hidden_size": 2048, "num_experts": 64, "vocab_size": 32768},
    ),
    "qwen3_5": (
        tf.Qwen3_5TextConfig,
        tf.Qwen3_5ForCausalLM,
        _ATTENTION | _DELTA | {"hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 32768},
    ),
    "tiny": (
        tf.Qwen3_5TextConfig,
        tf.Qwen3_5ForCausalLM,
        {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}  # fmt: skip


def random_model(shape: str, device: str) -> PreTrainedModel:
    """A frozen model with random weights; bfloat16 on a GPU, float32 on a CPU."""
    config, kind, values = SHAPES[shape]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model: PreTrainedModel = kind(config(**values)).to(dtype)
    return model.requires_grad_(False).eval()


def ours(shape: str, path: str, steps: int, device: str) -> dict[str, Any]:
    """Seconds of each of our steps."""
    model = random_model(shape, device)
    report = attach(model, LoraConfig(r=RANK, lora_alpha=RANK))
    forward = prepare(model)
    if path == "alone":
        forward.path, forward.one_pass = "per document", False
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, TrainConfig(learning_rate=2e-4))
    step = GraphStep(forward, parameters, optimizer, 1.0, record=device == "cuda" and path != "alone")
    rows = [[row_of(list(DOCUMENTS), TOKENS, seed)] for seed in range(4)]
    seconds, losses = [], []
    with forward.installed():
        for index in range(steps + WARM_UP):
            set_rate(optimizer, 1e-4)
            start = time.perf_counter()
            losses.append(step(rows[index % 4], rows[(index + 1) % 4]).loss)
            seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds, "trained": report.trainable_parameters, "path": forward.path, "losses": losses[:4],
        "one_pass": forward.one_pass, "notes": [*forward.notes, *filter(None, [step.why_not])],
    }  # fmt: skip


def theirs(shape: str, steps: int, device: str) -> dict[str, Any]:
    """Seconds of each step of PEFT and transformers."""
    model = peft.get_peft_model(
        random_model(shape, device), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    ).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device == "cuda")
    vocabulary = SHAPES[shape][2]["vocab_size"]
    seconds, losses = [], []
    for _ in range(steps + WARM_UP):
        ids = torch.randint(0, vocabulary, (2, TOKENS // 2), device=device)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "trained": sum(p.numel() for p in parameters), "losses": losses[:4]}


def measured(case: str, steps: int, device: str) -> dict[str, Any]:
    """The row of a case."""
    shape, _, system = case.partition(":")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row = theirs(shape, steps, device) if system == "peft" else ours(shape, system, steps, device)
    median = statistics.median(row.pop("seconds")[WARM_UP:])
    row |= {"tok_s": round(TOKENS / median), "step_ms": round(median * 1e3, 2)}
    row["losses"] = [round(loss, 4) for loss in row["losses"]]
    if device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recurrent")
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    for case in given.cases:
        try:
            row = measured(case, given.steps, given.device)
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            row = {"error": f"{type(error).__name__}: {error}"[:600]}
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()
        machine = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
        row = {"case": case} | row | {"machine": machine, "torch": torch.__version__, "transformers": tf.__version__}
        line = json.dumps(row)
        print(line, flush=True)
        with given.out.open("a") as out:
            out.write(line + "\n")


if __name__ == "__main__":
    main()
