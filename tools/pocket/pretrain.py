"""Pretrain the pocket model on one GPU within a budget of wall-clock seconds.

    python -m tools.pocket.pretrain --tokenizer FOLDER --out FOLDER --seconds 500

Worker processes make shards of the corpus while the GPU trains; shards are used in a fixed order, each three times.
The learning rate follows the clock (warm-up, plateau, linear decay to zero), so the run ends well on any machine.
Matrices are trained by Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/), the rest by AdamW.
"""

import argparse
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tools.pocket import corpus
from tools.pocket.model import Pocket, config, document_mask, to_transformers

WARM_UP, PLATEAU = 0.01, 0.40  # shares of the run; after the plateau the rate falls linearly to zero
MATRIX_RATE, VECTOR_RATE, MOMENTUM, DECAY = 0.02, 3e-3, 0.95, 0.05
REPLAYS = (12, 40)  # a shard is seen again so many new shards later: sixteen cores write slower than one H200 reads
PROMPT_WEIGHT = 0.1  # loss weight of prompts; answers and plain text have 1


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model; each tensor is (rows, T)."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    documents: Tensor


def unpack(rows: Tensor) -> Batch:
    """Splits flags from tokens; returns targets, weights and document numbers."""
    rows = rows.to(torch.int32)  # uint16 arrives as int16: the flags survive the sign
    tokens = (rows & 0x0FFF).long()
    starts = (rows & 0x4000) != 0
    trained = (rows & 0x8000) != 0
    weights = torch.where(trained, 1.0, PROMPT_WEIGHT) * (tokens != 0) * ~starts
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    weights = torch.nn.functional.pad(weights[:, 1:], (0, 1))
    return Batch(tokens, targets, weights, starts.long().cumsum(1) + (tokens == 0))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack (n, rows, columns) by five Newton-Schulz steps in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if tall else x
    return x.float()


class Muon:
    """Momentum, then orthogonalized updates, on stacks of same-shaped matrices."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.groups = [[p for p in parameters if tuple(p.shape) == shape] for shape in shapes]
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.orthogonalized = torch.compile(orthogonalized) if parameters[0].is_cuda else orthogonalized

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update all matrices; shapes with more rows than columns take proportionally larger steps."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = self.orthogonalized(gradient.lerp(momentum, MOMENTUM))
            scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            torch._foreach_mul_(group, 1 - rate * DECAY)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-rate * scale)


def rate_at(progress: float) -> float:
    """Learning-rate factor at a share 0..1 of the run."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return min(1.0, max(0.0, (1 - progress) / (1 - PLATEAU)))


@cache
def _maker(tokenizer_file: Path) -> corpus.Maker:
    return corpus.Maker(tokenizer_file)  # loaded once per worker process


@dataclass(frozen=True)
class ShardJob:
    """Initialises a worker process so that it can make any shard."""

    tokenizer_file: Path
    n_rows: int
    folder: Path

    def __call__(self, number: int) -> Path:
        """Make one shard and return the file it is in."""
        path = self.folder / f"shard{number:05}.npy"
        np.save(path, _maker(self.tokenizer_file).shard(number, self.n_rows))
        return path


def shards(pool: ProcessPoolExecutor, job: ShardJob, ahead: int) -> Iterator[Tensor]:
    """Yields shards 0, 1, 2, ... in order, each twice more later (`REPLAYS`); `ahead` shards are made in advance."""
    futures = [pool.submit(job, i) for i in range(ahead)]  # before the first one is asked for
    return _in_order(pool, job, futures)


def _in_order(pool: ProcessPoolExecutor, job: ShardJob, futures: list[Future[Path]]) -> Iterator[Tensor]:
    made: list[Tensor] = []
    while True:
        path = futures.pop(0).result()
        made.append(torch.from_numpy(np.load(path).view(np.int16)))
        path.unlink()
        futures.append(pool.submit(job, len(made) + len(futures)))
        yield made[-1]
        for lag in REPLAYS:
            if len(made) > lag:
                old = made[-1 - lag]
                yield old[torch.randperm(len(old), generator=torch.Generator().manual_seed(lag))]


def train(arguments: argparse.Namespace, stream: Iterator[Tensor]) -> Pocket:
    """Trains until the time is over; returns the trained model."""
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Pocket(config(arguments.size)).to(device)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon, adam = (
        Muon(matrices),
        torch.optim.AdamW(others, lr=VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu),
    )
    losses = torch.compile(model.losses, dynamic=False) if on_gpu else model.losses
    make_mask = torch.compile(create_block_mask, dynamic=False) if on_gpu else None

    def step(rows: Tensor, factor: float) -> Tensor:
        batch = unpack(rows.to(device, non_blocking=True))
        mask = document_mask(batch.documents, make_mask)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = losses(batch.tokens, mask, batch.targets)
        (loss * batch.weights).sum().div(batch.weights.sum()).backward()
        for group in adam.param_groups:
            group["lr"] = VECTOR_RATE * factor
        adam.step()
        muon.step(MATRIX_RATE * factor)
        model.zero_grad(set_to_none=True)
        full = batch.weights == 1
        return (loss.detach() * full).sum() / full.sum()

    noise = torch.randint(10, 4096, (arguments.rows, corpus.TOKENS_PER_ROW), dtype=torch.int16)
    for _ in range(3):
        step(noise, 0.0)  # compile while the first shards are made; at a rate of zero the weights stay as they are
    print(f"ready after {time.perf_counter() - arguments.started:.0f}s", flush=True)
    shard = next(stream)
    begin, waited, n_steps = time.perf_counter(), 0.0, 0
    while True:
        for rows in shard.split(arguments.rows):
            progress = (time.perf_counter() - begin) / arguments.seconds
            if progress >= 1:
                return model
            if len(rows) < arguments.rows:
                continue
            loss = step(rows, rate_at(progress))
            n_steps += 1
            if n_steps % arguments.log_every == 0:
                seen = n_steps * arguments.rows * corpus.TOKENS_PER_ROW / 1e6
                spent = time.perf_counter() - begin
                speed = f"{seen / spent:.2f} M/s, waited {waited:.0f}s for data"
                print(f"step {n_steps} loss {loss.item():.4f}, {seen:.0f}M tokens, {spent:.0f}s, {speed}", flush=True)
        asked = time.perf_counter()
        shard = next(stream)
        waited += time.perf_counter() - asked


def same_logits(model: Pocket) -> float:
    """Largest difference between this model's logits and those of the exported one in float32."""
    tokens = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    ours = Pocket(model.config)
    ours.load_state_dict({k: v.detach().cpu().bfloat16().float() for k, v in model.state_dict().items()})
    theirs = to_transformers(model).float()  # parameters are bfloat16 values in both
    with torch.no_grad():
        mask = document_mask(torch.zeros_like(tokens), None)
        return float((ours(tokens, mask) - theirs(tokens).logits).abs().max())


def main() -> None:
    """Makes data and trains side by side, exports the model, and prints figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder made by tools.pocket.tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--size", choices=("pocket", "middle", "larger"), default="pocket")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--rows", type=int, default=128, help="rows of 1,024 tokens a step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--shard-rows", type=int, default=corpus.ROWS_PER_SHARD)
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--log-every", type=int, default=100)
    arguments = parser.parse_args()
    arguments.started = time.perf_counter()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the worker processes are the parallelism
    scratch = arguments.scratch / "pocket-shards"
    scratch.mkdir(exist_ok=True)
    pool = ProcessPoolExecutor(
        arguments.workers,
        mp_context=multiprocessing.get_context("spawn"),
    )
    job = ShardJob(arguments.tokenizer / "tokenizer.json", arguments.shard_rows, scratch)
    model = train(arguments, shards(pool, job, ahead=3 * arguments.workers))
    to_transformers(model).save_pretrained(arguments.out)
    for path in arguments.tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, arguments.out / path.name)
    print(f"logits differ from transformers' by at most {same_logits(model):.1e}", flush=True)
    pool.shutdown(wait=True, cancel_futures=True)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
