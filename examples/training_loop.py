"""The training loop, written out: from a JSONL file to a saved adapter, in one file.

    python examples/training_loop.py [--model loratune/pocket] [--data FILE] [--steps 60] [--out adapter]

`lt.train` does the same with checkpoints, resuming, recording on a GPU and a model card. This version shows the
values that pass from stage to stage:

    Record -> Example(token_ids, weights) -> Row -> log-probabilities -> loss -> adapter files
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import torch

import loratune as lt
from loratune.base.forward import PackedForward, prepare
from loratune.box import data_file
from loratune.data.examples import Example
from loratune.data.feed import rows_of_epoch
from loratune.data.pack import Row
from loratune.data.records import read_records
from loratune.data.render import render
from loratune.ops.dropout import row_key
from loratune.training.objectives.sft import sft
from loratune.training.step import DeviceRow

TOKENS_PER_ROW = 512
ROWS_PER_STEP = 2
SEED = 0


def main() -> None:
    """Trains, evaluates after every quarter, and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="loratune/pocket", help="folder or hub id")
    parser.add_argument("--data", default=str(data_file("dates", "train")), help="JSONL, JSON, CSV, Parquet or text")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--out", default="adapter")
    given = parser.parse_args()

    model, tokenizer = lt.load(given.model), lt.load_tokenizer(given.model)
    print(lt.attach(model, lt.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05), seed=SEED))

    records = read_records([given.data], "auto")
    settings = lt.DataConfig(tokens_per_row=TOKENS_PER_ROW)
    stop_ids = frozenset({tokenizer.eos_token_id})
    examples = render(records, tokenizer, settings, max_tokens=TOKENS_PER_ROW, stop_ids=stop_ids).examples
    train, held_out = examples[:-50], examples[-50:]
    held_out_rows = rows_of_epoch(held_out, TOKENS_PER_ROW, 0, seed=SEED, epoch=0)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    forward = prepare(model)  # finds an exact way to run packed rows through this model
    with forward.installed():
        for step, rows in enumerate(batches(train, given.steps)):
            for group in optimizer.param_groups:
                group["lr"] = given.learning_rate * cosine(step, given.steps)
            loss, norm = train_step(forward, rows, parameters, optimizer, step)
            print(f"step {step + 1:>3}  loss {loss:.4f}  gradient norm {norm:.3f}")
            if (step + 1) % max(1, given.steps // 4) == 0:
                print(f"step {step + 1:>3}  held-out loss {evaluate(forward, held_out_rows):.4f}")
    lt.save(model, given.out, overwrite=True)
    print(f"saved to {given.out}")


def batches(examples: Sequence[Example], steps: int) -> Iterator[list[Row]]:
    """Packs every epoch anew and yields the rows of each optimizer step."""
    waiting: list[Row] = []
    epoch = 0
    for _ in range(steps):
        while len(waiting) < ROWS_PER_STEP:
            waiting += rows_of_epoch(examples, TOKENS_PER_ROW, 0, seed=SEED, epoch=epoch)
            epoch += 1
        yield [waiting.pop(0) for _ in range(ROWS_PER_STEP)]


def train_step(
    forward: PackedForward,
    rows: Sequence[Row],
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> tuple[float, float]:
    """One update. The loss is normalised over the trained tokens of all rows, so k rows equal one long row.

    Returns: loss, and gradient norm before clipping.
    """
    normaliser = sum(sft.normaliser(row) for row in rows)
    total = 0.0
    for nth, row in enumerate(rows):
        key = row_key(SEED + step, nth * TOKENS_PER_ROW, forward.model.device)
        with forward.state.dropout(key):
            loss = row_loss(forward, row) / normaliser
            loss.backward()
        total += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return total, norm


@torch.no_grad()
def evaluate(forward: PackedForward, rows: Sequence[Row]) -> float:
    """Mean negative log-likelihood over the trained tokens, without dropout."""
    forward.model.eval()
    total = sum(float(row_loss(forward, row)) for row in rows)
    forward.model.train()
    return total / sum(sft.normaliser(row) for row in rows)


def row_loss(forward: PackedForward, row: Row) -> torch.Tensor:
    """The objective's terms of one row, summed."""
    sent = DeviceRow.send(row, forward.model.device)
    logprobs = forward.logprobs(sent.tokens, sent.position_ids, sent.cu_seqlens, sent.predicting, sent.targets)
    return sft.terms(logprobs, sent.batch).values.sum()


def cosine(step: int, steps: int) -> float:
    """Learning-rate factor: two warm-up steps, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / 2)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


if __name__ == "__main__":
    main()
