"""Training on a CPU: ours beside PEFT in a plain PyTorch loop, alternating in one run.

    python -m benchmarks.cpu [--rounds 5] [--out benchmarks/results/cpu.json]

Two models: the bundled one, and a Llama of hidden size 512. Two precisions: float32, and bfloat16, which CPUs
with AMX or AVX512-BF16 multiply several times faster. Two kinds of data: `full`, rows of 512 tokens without
padding, and `documents`, the bundled orders of 50 to 90 tokens, which PEFT's loop pads to the longest of its
batch and we pack. Speed counts document tokens per second of whole optimizer steps. Rounds alternate, so drift of
the machine affects both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

import loratune as lt
from loratune.base.forward import prepare
from loratune.base.load import POCKET, stop_ids
from loratune.box import data_file
from loratune.data.examples import Example
from loratune.data.feed import prepare as prepare_data
from loratune.data.feed import rows_of_epoch
from loratune.training.optim import adamw
from loratune.training.step import train_step

ROW, STEPS = 512, 6


def pocket():
    return lt.load(POCKET, device="cpu")


def llama512():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        max_position_embeddings=1024,
    )
    return tf.LlamaForCausalLM(config).requires_grad_(False).eval()


def full_examples(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    ones = np.ones(ROW, dtype=np.float32)
    return [Example(rng.integers(10, 4000, ROW).astype(np.int32), ones, "random") for _ in range(count)]


def document_examples() -> list[Example]:
    tokenizer = lt.load_tokenizer(POCKET)
    settings = lt.DataConfig(tokens_per_row=ROW, eval_fraction=0.0)
    ids = stop_ids(POCKET, tokenizer)
    return prepare_data([str(data_file("orders", "train"))], tokenizer, settings, stop_ids=ids).train


def ours(model, examples):
    lt.attach(model, lt.LoraConfig(r=16, lora_alpha=32))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, lt.TrainConfig(learning_rate=2e-4))
    forward = prepare(model)
    rows = rows_of_epoch(examples, ROW, 0, seed=0, epoch=0)

    def round_(at: int) -> float:
        tokens, started = 0, time.perf_counter()
        with forward.installed():
            for n in range(at, at + STEPS):
                row = rows[n % len(rows)]
                train_step(forward, [row], parameters, optimizer, max_grad_norm=1.0)
                tokens += sum(len(examples[i]) for i in rows.packing[n % len(rows)])
        return tokens / (time.perf_counter() - started)

    return round_


def peft(model, examples):
    model = get_peft_model(model, PeftConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    order = np.random.default_rng(0).permutation(len(examples))
    per_batch = max(1, round(ROW / np.mean([len(e) for e in examples])))

    def round_(at: int) -> float:
        tokens, started = 0, time.perf_counter()
        for n in range(at, at + STEPS):
            batch = [examples[order[(n * per_batch + i) % len(order)]] for i in range(per_batch)]
            longest = max(map(len, batch))
            ids = torch.zeros(per_batch, longest, dtype=torch.long)
            labels = torch.full((per_batch, longest), -100)
            mask = torch.zeros(per_batch, longest, dtype=torch.long)
            for i, e in enumerate(batch):
                ids[i, : len(e)] = torch.from_numpy(e.token_ids).long()
                labels[i, : len(e)] = ids[i, : len(e)].masked_fill(torch.from_numpy(e.weights) == 0, -100)
                mask[i, : len(e)] = 1
            attention = {} if bool(mask.all()) else {"attention_mask": mask}
            model(input_ids=ids, labels=labels, **attention).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += sum(map(len, batch))
        return tokens / (time.perf_counter() - started)

    return round_


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    data = {"full": full_examples(24), "documents": document_examples()}
    results = []
    for name, make in (("pocket", pocket), ("llama-512", llama512)):
        for dtype, kind in itertools.product((torch.float32, torch.bfloat16), data):
            examples = data[kind]
            systems = {"loratune": ours(make().to(dtype), examples), "peft": peft(make().to(dtype), examples)}
            speeds: dict[str, list[float]] = {system: [] for system in systems}
            for n in range(arguments.rounds + 1):  # the first warms up
                for system, round_ in systems.items():
                    speed = round_(n * STEPS)
                    if n:
                        speeds[system].append(speed)
            ratio = statistics.median(a / b for a, b in zip(speeds["loratune"], speeds["peft"], strict=True))
            precision = str(dtype).removeprefix("torch.")
            row = {"model": name, "precision": precision, "data": kind, "ratio": round(ratio, 3)}
            row |= {f"{system}_tok_s": round(statistics.median(s)) for system, s in speeds.items()}
            results.append(row)
            speed = f"ours {row['loratune_tok_s']:>6} tok/s   PEFT {row['peft_tok_s']:>6}   {ratio:.2f}x"
            print(f"{name:<10} {precision:<9} {kind:<10} {speed}", flush=True)
    machine = {
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
        "command": "python -m benchmarks.cpu",
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps([machine | row for row in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
