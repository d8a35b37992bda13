"""Loss curves of four ways to run one training: modules, fused layers, one CUDA graph, and an 8-bit base.

    python -m benchmarks.curves OUT.jsonl orders|prose MODEL [MODEL ...]      a folder, or loratune/pocket

All ways use the same rows, seeds, rates and initial adapters. `orders` is learnt to the end. `prose`
(`benchmarks.prose`) is not, so its last held-out losses can be compared. Deterministic algorithms are on, so
recorded and eager steps can be compared to the bit. One JSON object per run holds every training loss and the
held-out losses; after each seed a line gives each way's last held-out loss relative to `graph`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.prose import write
from loratune.base.forward import prepare
from loratune.base.load import load, load_tokenizer, stop_ids
from loratune.box import data_file
from loratune.config import DataConfig, LoraConfig, TrainConfig
from loratune.data.feed import prepare as prepare_data
from loratune.data.feed import rows_of_epoch
from loratune.lora.inject import attach
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, learning_rate, set_rate
from loratune.training.step import evaluate_loss, train_step

VARIANTS = ("plain", "fused", "graph", "fp8")
SEEDS = (0, 1, 2)
STEPS, ROW, EVALUATE = 120, 2048, 40


def curve(name: str, variant: str, seed: int, files: tuple[Path, Path]) -> dict[str, object]:
    """Trains on the first of `files` and evaluates on the second."""
    fp8 = variant == "fp8"
    on_gpu = torch.cuda.is_available()
    model = load(name, "fp8" if fp8 else "bfloat16" if on_gpu else "float32")
    tokenizer = load_tokenizer(name)
    data = DataConfig(tokens_per_row=ROW, eval_data=[str(files[1])], truncate=True)
    dataset = prepare_data([str(files[0])], tokenizer, data, stop_ids=stop_ids(name, tokenizer))
    attach(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), name="default", seed=seed)
    forward = prepare(model)
    if variant == "plain":
        forward.fused = None
    parameters = [p for p in model.parameters() if p.requires_grad]
    config = TrainConfig(learning_rate=1e-3, max_steps=STEPS, seed=seed)
    optimizer = adamw(parameters, config)
    recorded = on_gpu and variant in ("graph", "fp8")
    step = GraphStep(forward, parameters, optimizer, config.max_grad_norm, record=recorded) if on_gpu else None
    held_out = rows_of_epoch(dataset.eval, ROW, 0, seed=seed, epoch=0)
    losses, held = [], {}
    with forward.installed():
        for index in range(STEPS):
            set_rate(optimizer, learning_rate(index, STEPS, config))
            rows = rows_of_epoch(dataset.train, ROW, 0, seed=seed, epoch=0)
            epoch, at = divmod(index, len(rows))
            rows = rows_of_epoch(dataset.train, ROW, 0, seed=seed, epoch=epoch)
            if step is not None:
                losses.append(step([rows[at]]).loss)
            else:
                taken = train_step(forward, [rows[at]], parameters, optimizer, max_grad_norm=config.max_grad_norm)
                losses.append(taken.loss)
            if (index + 1) % EVALUATE == 0:
                held[index + 1] = evaluate_loss(forward, held_out)[0]
    return {
        "model": Path(name).name, "parameters": sum(p.numel() for p in model.parameters()), "variant": variant,
        "seed": seed, "steps": STEPS, "tokens": ROW, "fused": forward.fused is not None,
        "recorded": recorded and step is not None and step.why_not is None, "losses": losses, "held_out": held,
        "machine": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    out, task, *models = sys.argv[1:]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # with warnings only, FlashAttention's backward adds in no fixed order
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    place = tempfile.mkdtemp()
    files = (data_file("orders", "train"), data_file("orders", "heldout")) if task == "orders" else write(Path(place))
    for name in models:
        for seed in SEEDS:
            eager: list[float] = []
            ends: dict[str, float] = {}
            for variant in VARIANTS:
                started = time.perf_counter()
                row = {"task": task} | curve(name, variant, seed, files)
                with Path(out).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                losses, held = row["losses"], row["held_out"]
                assert isinstance(losses, list)
                assert isinstance(held, dict)
                ends[variant] = held[STEPS]
                same = ""
                if variant == "fused":
                    eager = losses
                if variant == "graph":
                    same = "equal to fused, to the bit" if losses == eager else "NOT equal to fused"
                took = time.perf_counter() - started
                print(
                    f"{row['model']} {variant:<9} seed {seed} held-out {held[STEPS]:.5f} {took:.1f} s {same}",
                    flush=True,
                )
            print({variant: f"{end / ends['graph'] - 1:+.4%}" for variant, end in ends.items()}, flush=True)


if __name__ == "__main__":
    main()
