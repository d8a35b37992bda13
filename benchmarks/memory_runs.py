"""Parts of `benchmarks.memory` that run long: the longest document that fits, and ten thousand steps."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch

from benchmarks.memory_lab import GIB, Found, attempt, cap_at, fresh, optimizer_for, peaks, prepared, surveyed
from benchmarks.shapes import row_of
from loratune.base.forward import PackedForward, prepare
from loratune.base.load import POCKET, load, load_tokenizer
from loratune.box import TASKS, data_file
from loratune.config import DataConfig, LoraConfig, TrainConfig
from loratune.data.feed import rows_of_epoch
from loratune.lora.inject import attach
from loratune.memory.budget import RowSetting, choose, largest
from loratune.memory.devices import free_bytes, named
from loratune.memory.survey import ModelSurvey
from loratune.runs.run import dataset_of
from loratune.training.course import Rows, StepDone
from loratune.training.graph import GraphStep
from loratune.training.loop import Loop
from loratune.training.optim import set_rate

TO_BEAT = {8: 2_972, 12: 21_848, 24: 78_475, 80: 342_733}
"""GiB -> tokens published by Unsloth for QLoRA of Llama-3.1-8B with its gradient checkpointing."""
_TRIES = 3
_OF_THE_HOST = 0.8


def long_documents(shape: str, precision: str, cases: list[str]) -> Iterator[Found]:
    """Trains one document as long as the row for one eager step; a case is a cap, optionally with tokens."""
    forward = prepared(shape, precision)
    what = surveyed(forward)
    for case in cases:
        gib, _, asked = case.partition(":")
        cap, host = float(gib), int(_OF_THE_HOST * free_bytes(torch.device("cpu")))
        start = time.perf_counter()
        longest = largest(what, named("H200"), int(cap * GIB), host)
        tokens = int(asked or (longest[0] if longest else 0))
        about: Found = {
            "cap_gib": cap, "largest_by_estimate": longest and longest[0], "to_beat": TO_BEAT.get(int(cap)),
            "choosing_s": round(time.perf_counter() - start, 1),
        }  # fmt: skip
        for nth in range(_TRIES):
            fresh(forward)
            found = attempt(functools.partial(_one_step, forward, what, cap, tokens, host))
            yield about | {"tokens": tokens, "try": nth + 1} | found | peaks()
            if "error" not in found or tokens < 512:
                break
            tokens = int(0.95 * tokens) // 256 * 256
    fresh(forward)


def _one_step(forward: PackedForward, what: ModelSurvey, cap: float, tokens: int, host: int) -> Found:
    choice = choose(what, RowSetting(tokens, even=True), named("H200"), int(cap * GIB), host)
    if choice is None:
        raise RuntimeError("no plan is estimated to fit")
    forward.plan = choice.plan
    cap_at(cap)
    optimizer = optimizer_for(forward)
    parameters = [p for p in forward.model.parameters() if p.requires_grad]
    step = GraphStep(forward, parameters, optimizer, 1.0, record=False)
    row = [row_of([tokens], tokens, 0)]
    set_rate(optimizer, 1e-4)
    with forward.installed():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = step(row)
        seconds = time.perf_counter() - start
    return {
        "plan": str(choice.plan), "tile": choice.plan.tile, "seconds": round(seconds, 1),
        "tok_s": round(tokens / seconds), "loss": round(result.loss, 4), "grad_norm": round(result.grad_norm, 4),
        "estimated_gib": round(choice.bytes.allocated / GIB, 3),
        "estimated_total_gib": round(choice.bytes.total / GIB, 3),
    }  # fmt: skip


def many_steps(steps: int = 10_000, seconds: int = 60) -> Iterator[Found]:
    """Allocated and reserved bytes after every step over uneven data, from the fourth pass over the data on.

    By then every row layout has been recorded. Stops at the first different byte, or when the seconds are over.
    """
    start = time.perf_counter()
    loop, each_pass = _pocket_loop(steps)
    expected: tuple[int, int] | None = None
    now, step, compared = (0, 0), 0, 0
    for event in loop.run():
        if not isinstance(event, StepDone):
            yield {"event": type(event).__name__, "what": str(getattr(event, "why", ""))}
            continue
        now, step = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()), event.step
        if step in (1, 2, 3, 10) or step % max(1, steps // 4) == 0:
            yield {"step": step, "allocated": now[0], "reserved": now[1], "seconds": round(_since(start), 1)}
        if step <= 3 * each_pass:
            continue
        expected = expected or now
        compared += 1
        if now != expected or _since(start) > seconds:
            break
    same = expected is not None and now == expected
    yield {
        "steps": step, "asked": steps, "compared": compared, "same_to_the_byte": same, "rows_in_a_pass": each_pass,
        "expected": expected, "last": now, "seconds": round(_since(start), 1),
        "recordings": len(loop._graph._graphs) if loop._graph else 0,
    }  # fmt: skip


def _pocket_loop(steps: int, device: str = "cuda") -> tuple[Loop, int]:
    """Trains the bundled model on its data, without evaluation, checkpoints or output files."""
    settings = DataConfig(tokens_per_row=256, eval_fraction=0.0)
    tokenizer, model = load_tokenizer(POCKET), load(POCKET, "bfloat16", device)
    attach(model, LoraConfig(), name="default", seed=0)
    dataset = dataset_of(model, tokenizer, [str(data_file(TASKS[0], "train"))], settings, 0, None)
    packed = rows_of_epoch(dataset.train, settings.tokens_per_row, 0, seed=0, epoch=0)
    rows = [packed[index] for index in range(min(64, len(packed)))]
    parameters = {path: p for path, p in model.named_parameters() if p.requires_grad}
    training = TrainConfig(learning_rate=2e-4, max_steps=steps, save_every_steps=steps, eval_every_steps=steps)
    return Loop(prepare(model), "default", parameters, Rows(lambda _: rows, []), training, None), len(rows)


def _since(start: float) -> float:
    return time.perf_counter() - start
