"""Effect of a 4-bit base on the loss, on a model that we trained: our bf16 and NF4 beside bitsandbytes + PEFT.

    python -m benchmarks.nf4_loss OUT.jsonl [--model FOLDER] [--train FILE] [--heldout FILE] [--device cuda]
                                  [--prose] [--rate 1e-3] [--steps 120] [--tokens 1024] [--seeds 3] [--no-peers]

One line per system and seed: held-out loss (nats per trained token) of the bare base and after several step
counts. All systems see the same rows in the same order, start from the same A, and use the same AdamW, schedule
and clipping. The peer's rows are padded batches of the same documents in a plain PyTorch loop. `--prose` replaces
the files by a task that is not learnt to the end (`benchmarks.prose`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.prose import write
from loratune.base.forward import prepare
from loratune.base.load import load, load_tokenizer, stop_ids
from loratune.config import DataConfig, LoraConfig, TrainConfig
from loratune.data.feed import prepare as prepare_data
from loratune.data.feed import rows_of_epoch
from loratune.data.pack import Row
from loratune.lora.files import save
from loratune.lora.inject import attach, trainable_parameters
from loratune.runs.evaluation import pad_id
from loratune.training.optim import adamw, learning_rate, set_rate
from loratune.training.step import evaluate_loss, train_step

BOX = Path(__file__).parent.parent / "loratune" / "box"
RANK = 16
Data = tuple[list[Row], list[Row]]


def rows_of(given: argparse.Namespace, seed: int) -> Data:
    """Training rows for `steps` updates, and the held-out rows."""
    tokenizer = load_tokenizer(given.model)
    settings = DataConfig(tokens_per_row=given.tokens, eval_data=[given.heldout], num_proc=1, truncate=given.prose)
    dataset = prepare_data(
        [given.train], tokenizer, settings, stop_ids=stop_ids(given.model, tokenizer), max_tokens=given.tokens,
        seed=seed, cache_dir=None,
    )  # fmt: skip
    pad, rows, epoch = pad_id(tokenizer), [], 0
    while len(rows) < given.steps:
        rows += list(rows_of_epoch(dataset.train, given.tokens, pad, seed=seed, epoch=epoch))
        epoch += 1
    return rows[: given.steps], list(rows_of_epoch(dataset.eval, given.tokens, pad, seed=0, epoch=0))


def ours(given: argparse.Namespace, precision: str, seed: int, data: Data, start: Path) -> dict[str, object]:
    """Trains with loratune and saves the initial adapter to `start`."""
    rows, heldout = data
    model = load(given.model, precision, given.device)  # type: ignore[arg-type]
    before, after = _evaluated(model, heldout), {}
    attach(model, LoraConfig(r=RANK, lora_alpha=2 * RANK), seed=seed)
    save(model, start, overwrite=True)
    parameters = list(trainable_parameters(model).values())
    config = TrainConfig(learning_rate=given.rate)
    optimizer, forward, losses = adamw(parameters, config), prepare(model), []
    began = time.perf_counter()
    with forward.installed():
        for index, row in enumerate(rows):
            set_rate(optimizer, learning_rate(index, given.steps, config))
            losses.append(train_step(forward, [row], parameters, optimizer, max_grad_norm=1.0).loss)
            if index + 1 in given.evaluate_at:
                after[index + 1] = evaluate_loss(forward, heldout)[0]
    return _line(f"loratune {precision}", seed, before, after, losses, began)


def _evaluated(model: Any, heldout: list[Row]) -> float:
    forward = prepare(model)
    with forward.installed():
        return evaluate_loss(forward, heldout)[0]


def peer(given: argparse.Namespace, seed: int, data: Data, start: Path) -> dict[str, object]:
    """Trains with bitsandbytes + PEFT from the adapter at `start`."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    rows, heldout = data
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    folder = str(BOX / "model") if given.model == "loratune/pocket" else given.model
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.bfloat16, device_map={"": given.device}
    )
    before, after = _peer_evaluated(base, heldout), {}
    model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    config, losses = TrainConfig(learning_rate=given.rate), []
    optimizer = adamw(parameters, config)
    began = time.perf_counter()
    for index, row in enumerate(rows):
        set_rate(optimizer, learning_rate(index, given.steps, config))
        loss = _peer_loss(model, row) / float(row.weights.sum())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if index + 1 in given.evaluate_at:
            after[index + 1] = _peer_evaluated(model, heldout)
    return _line("bitsandbytes + PEFT", seed, before, after, losses, began)


def _peer_loss(model: Any, row: Row) -> Tensor:
    """Loss summed over the row's documents, run as a padded batch."""
    starts = row.cu_seqlens.tolist()
    bounds = [(a, b) for a, b in itertools.pairwise(starts) if bool(row.weights[a:b].any())]
    longest = max(b - a for a, b in bounds)
    tokens, mask, targets = (torch.zeros(len(bounds), longest, dtype=torch.long) for _ in range(3))
    weights = torch.zeros(len(bounds), longest)
    for index, (a, b) in enumerate(bounds):
        tokens[index, : b - a], mask[index, : b - a] = row.tokens[a:b], 1
        targets[index, : b - a], weights[index, : b - a] = row.targets[a:b], row.weights[a:b]
    tokens, mask, targets, weights = (t.to(model.device) for t in (tokens, mask, targets, weights))
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float()
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return -(logprobs * weights).sum()


@torch.no_grad()
def _peer_evaluated(model: Any, heldout: list[Row]) -> float:
    total = sum(float(_peer_loss(model, row)) for row in heldout)
    return total / sum(float(row.weights.sum()) for row in heldout)


def _line(
    system: str, seed: int, before: float, after: dict[int, float], losses: list[float], began: float
) -> dict[str, object]:
    assert all(map(math.isfinite, losses))
    return {
        "system": system, "seed": seed, "base_heldout": round(before, 5),
        "heldout_at": {str(step): round(loss, 5) for step, loss in after.items()},
        "losses": [round(loss, 4) for loss in losses], "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def main() -> None:
    """Runs all systems and seeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--model", default="loratune/pocket")
    parser.add_argument("--train", default=str(BOX / "data" / "orders.train.jsonl"))
    parser.add_argument("--heldout", default=str(BOX / "data" / "orders.heldout.jsonl"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--evaluate-at", type=int, nargs="+", default=[10, 20, 40, 120])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--prose", action="store_true")
    given = parser.parse_args()
    with open(given.out, "a", encoding="utf-8") as out, tempfile.TemporaryDirectory() as folder:
        if given.prose:
            given.train, given.heldout = map(str, write(Path(folder)))
        for seed in range(given.seeds):
            start = Path(folder) / f"start-{seed}"
            data = rows_of(given, seed)
            runs = [partial(ours, given, precision, seed, data, start) for precision in ("bfloat16", "nf4")]
            if not given.no_peers:
                runs.append(partial(peer, given, seed, data, start))
            for run in runs:
                line = {"model": given.model, "device": given.device, "torch": torch.__version__} | run()
                print(json.dumps(line), flush=True)
                print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main()
