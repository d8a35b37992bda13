"""Instruction data: documents of many lengths, trained documents per second, three systems on the same data.

    python -m benchmarks.instruction SYSTEM [--shape l1b] [--documents 2000]     loratune, hf or unsloth
    python -m benchmarks.instruction --all OUT.jsonl

Lengths are log-normal with median 180 and 99 % below 1,500 tokens. The last 60 % of each document, the answer, is
trained. Random weights, r = 16 on all seven projections, AdamW. Each system trains the same documents with about
the same tokens per step, as its users would run it:

    loratune   rows of 8,192 tokens packed by `data.feed`, `training.loop`
    hf         PEFT with transformers' Trainer defaults (bf16): 8 documents per step, padded to the longest
    unsloth    documents packed into rows of 8,192 tokens with restarting positions; its model, kernels and, where its
               forward takes `packed_seq_lengths`, its variable-length attention; a plain AdamW loop; no checkpointing

The result is trained documents over seconds, collation included, after the first steps (compilation and
recording).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROW, BATCH, LONGEST = 8192, 8, 2048
WARM_UP = 6
PROMPT = 0.4


def lengths_of(count: int) -> list[int]:
    """Log-normal: median 180, the 99th percentile at 1,500; at least 16 and at most `LONGEST` tokens."""
    sigma = math.log(1500 / 180) / 2.326
    drawn = np.random.default_rng(0).lognormal(math.log(180), sigma, count)
    return [int(n) for n in drawn.clip(16, LONGEST)]


def documents_of(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and 0/1 loss weights of each document."""
    rng = np.random.default_rng(1)
    return [
        (rng.integers(0, 260, n).astype(np.int64), (np.arange(n) >= PROMPT * n).astype(np.float32))
        for n in lengths_of(count)
    ]


def loratune(shape: str, count: int) -> dict[str, object]:
    """loratune, through the training loop of `loratune train`."""
    import torch

    from benchmarks.shapes import model_of
    from loratune.base.forward import prepare
    from loratune.config import LoraConfig, TrainConfig
    from loratune.data.examples import Example
    from loratune.data.feed import rows_of_epoch
    from loratune.lora.inject import attach, trainable_parameters
    from loratune.training.course import Rows, StepDone
    from loratune.training.loop import Loop

    examples = [Example(ids.astype(np.int32), weights, "random") for ids, weights in documents_of(count)]
    model = model_of(shape)
    attach(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"), name="default", seed=0)
    rows = Rows(lambda epoch: rows_of_epoch(examples, ROW, 0, seed=0, epoch=epoch), [])
    packed = rows.of_epoch(0)
    config = TrainConfig(learning_rate=2e-4, max_steps=2 * len(packed), gradient_accumulation_steps=1)
    loop = Loop(prepare(model), "default", trainable_parameters(model), rows, config, None)
    ends: list[float] = []
    for event in loop.run():
        if isinstance(event, StepDone):
            ends.append(time.perf_counter())
    torch.cuda.synchronize()
    first, last = WARM_UP + len(packed) // 4, len(ends) - 1
    documents = [len(chosen) for epoch in (0, 1) for chosen in rows.of_epoch(epoch).packing]
    trained = sum(documents[first + 1 : last + 1])
    return _result("loratune", shape, trained, ends[last] - ends[first], {"fullness": round(packed.fullness, 4)})


def hf(shape: str, count: int) -> dict[str, object]:
    """PEFT with transformers' Trainer, both with defaults, in bf16."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from benchmarks.peers import TARGETS
    from benchmarks.shapes import model_of

    documents = documents_of(count)

    class Documents(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(documents)

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids, weights = documents[index]
            return {"input_ids": ids, "labels": np.where(weights > 0, ids, -100)}

    def padded(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in batch)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        out = {name: torch.full((len(batch), longest), value) for name, value in fill.items()}
        for index, item in enumerate(batch):
            size = len(item["input_ids"])
            out["input_ids"][index, :size] = torch.from_numpy(item["input_ids"])
            out["labels"][index, :size] = torch.from_numpy(item["labels"])
            out["attention_mask"][index, :size] = 1
        return out

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    config = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model_of(shape).train(), config)
    settings = TrainingArguments(
        output_dir="/tmp/instruction-hf", per_device_train_batch_size=BATCH, max_steps=count // BATCH, bf16=True,
        save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, settings, data_collator=padded, train_dataset=Documents(), callbacks=[Clock()]).train()
    steps = len(ends) - 1 - WARM_UP
    return _result("peft + hf trainer", shape, steps * BATCH, ends[-1] - ends[WARM_UP], {})


def unsloth(shape: str, count: int) -> dict[str, object]:
    """Unsloth's model on packed rows."""
    from benchmarks.peers import _unsloth  # imports unsloth before transformers

    model, _ = _unsloth(shape, ROW, "unsloth")
    import torch

    from loratune.data.pack import best_fit

    documents = documents_of(count)
    packing = best_fit([len(ids) for ids, _ in documents], ROW, 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ends: list[float] = []
    note = "packed_seq_lengths"
    for chosen in packing:
        row = _packed([documents[index] for index in chosen])
        batch = {name: tensor.cuda(non_blocking=True) for name, tensor in row.items()}
        if note != "packed_seq_lengths":
            batch.pop("packed_seq_lengths")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            try:
                loss = model(**batch, use_cache=False).loss
            except TypeError:
                note = "its forward takes no packed_seq_lengths: documents of a row see each other"
                batch.pop("packed_seq_lengths")
                loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
    trained = sum(len(chosen) for chosen in packing[WARM_UP + 1 :])
    return _result("unsloth", shape, trained, ends[-1] - ends[WARM_UP], {"note": note})


def _packed(documents: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """One row of `ROW` tokens: labels (the first of each document is not predicted), restarting positions.

    The rest of the row is a document that is not trained, because a compiler may specialise on the row's length.
    """
    import torch

    spare = ROW - sum(len(ids) for ids, _ in documents)
    if spare:
        documents = [*documents, (np.zeros(spare, dtype=np.int64), np.zeros(spare, dtype=np.float32))]
    ids = np.concatenate([ids for ids, _ in documents])
    labels = np.concatenate([np.where((w > 0) & (np.arange(len(w)) > 0), ids, -100) for ids, w in documents])
    positions = np.concatenate([np.arange(len(ids)) for ids, _ in documents])
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "packed_seq_lengths": torch.tensor([len(ids) for ids, _ in documents], dtype=torch.int32),
    }


def _result(system: str, shape: str, documents: int, seconds: float, more: dict[str, object]) -> dict[str, object]:
    import torch

    from benchmarks.peers import versions

    return {
        "system": system, "shape": shape, "precision": "bf16", "documents_s": round(documents / seconds, 1),
        "documents": documents, "seconds": round(seconds, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "machine": torch.cuda.get_device_name(), "versions": versions(),
    } | more  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="?", choices=("loratune", "hf", "unsloth"))
    parser.add_argument("--all", type=Path)
    parser.add_argument("--shape", default="l1b")
    parser.add_argument("--documents", type=int, default=2000)
    given = parser.parse_args()
    if given.system:
        os.environ.update({"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"})
        run = {"loratune": loratune, "hf": hf, "unsloth": unsloth}[given.system]
        print(json.dumps(run(given.shape, given.documents)))
        return
    for system in ("loratune", "hf", "unsloth"):
        command = [sys.executable, "-m", "benchmarks.instruction", system, "--shape", given.shape]
        done = subprocess.run([*command, "--documents", str(given.documents)], capture_output=True, text=True)
        print(done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr[-2500:], flush=True)
        if done.returncode == 0:
            with given.all.open("a", encoding="utf-8") as file:
                file.write(done.stdout.strip().splitlines()[-1] + "\n")


if __name__ == "__main__":
    main()
