"""`loratune demo`: the whole journey on the bundled model, in about two minutes on a laptop's CPU.

It asks the base, which cannot answer, and trains two adapters. It measures all three on held-out records, switches
between them and compares the logits to the bit. Then it merges, verifies the result, and shows the next commands. All
steps use the functions of the other verbs; the demo adds the narration. `--out DIR` saves the figures in `demo.json`.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune import atomic
from loratune.base.load import POCKET, load, load_tokenizer, stop_ids
from loratune.box import TASKS, data_file
from loratune.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from loratune.data.record import Record
from loratune.data.records import read_records
from loratune.data.render import prompt_ids
from loratune.export.merge import merge_checkpoint
from loratune.infer.evaluate import ExactMatch
from loratune.lora.files import load_adapter
from loratune.lora.inject import activate
from loratune.runs.evaluation import answers, real_prompts
from loratune.runs.folder import RunResult
from loratune.runs.metrics import losses_of
from loratune.runs.run import run
from loratune.screen import progress
from loratune.screen.text import curve
from loratune.units import duration

TRAINING = TrainConfig(learning_rate=2e-3, max_steps=120, eval_every_steps=30, warmup_ratio=0.1)
TOKENS_PER_ROW = 512
SHOWN = 3  # prompts per task that are printed
PROOF_PROMPTS = 16  # prompts per task whose logits are compared

_SKILLS = {"dates": "a date in any spelling -> ISO 8601", "orders": "an order in a sentence -> JSON"}


@dataclass(frozen=True)
class _Bench:
    """The base in memory, with the held-out records."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    held_out: dict[str, list[Record]]
    console: Console


def demo(out: str | None, console: Console, *, overwrite: bool = False) -> dict[str, Any]:
    """Runs the demo and returns its figures.

    Args:
        out: folder for the adapters, plots, merged checkpoint and demo.json; None deletes them at the end.
        overwrite: replace an existing folder.

    Raises: OutputError: `out` exists or cannot be written.
    """
    if out is not None:
        folder = Path(out)
        atomic.check_new(folder, overwrite=overwrite)
        return _journey(folder, console, keep=True, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="loratune-demo-") as temporary:
        return _journey(Path(temporary), console, keep=False, overwrite=True)


def _journey(folder: Path, console: Console, *, keep: bool, overwrite: bool) -> dict[str, Any]:
    started = time.perf_counter()
    bench = _meet_the_base(console)
    scores = {"base": _ask_everything(bench)}
    for task in TASKS:
        _show_answers(console, {"base": scores["base"][task]})
    fingerprints = {"base": _fingerprint(bench)}
    runs = {}
    for task in TASKS:
        runs[task] = _train(task, folder, console, overwrite)
        load_adapter(bench.model, folder / task, name=task)
        activate(bench.model, task)
        scores[task] = _ask_everything(bench)
        fingerprints[task] = _fingerprint(bench)
        _show_answers(console, {task: scores[task][task]})
    _show_scores(bench, scores)
    identical = _switch(bench, fingerprints)
    difference = _merge(bench, folder, overwrite)
    figures = {
        "exact_match": {who: {task: s.share for task, s in found.items()} for who, found in scores.items()},
        "held_out_records": {task: len(records) for task, records in bench.held_out.items()},
        "switched_back_identical": identical,
        "merged_largest_logit_difference": difference,
        "training": {task: _training_figures(result) for task, result in runs.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
    }
    if keep:
        atomic.write_text(folder / "demo.json", json.dumps(figures, indent=2) + "\n")
    _farewell(folder, console, figures, keep)
    return figures


def _meet_the_base(console: Console) -> _Bench:
    model, tokenizer = load(POCKET, device="cpu"), load_tokenizer(POCKET)
    size = sum(p.numel() for p in model.parameters())
    _chapter(console, "The base model")
    console.print(
        f"{POCKET}: {size / 1e6:.1f} million parameters, a small chat model that comes with loratune.\n"
        "It was pretrained on everyday tasks, but never on these two:"
    )
    for task, skill in _SKILLS.items():
        console.print(Text.assemble("  ", (f"{task:<7}", "cyan"), f" {skill}"))
    held_out = {task: read_records([str(data_file(task, "heldout"))]) for task in TASKS}
    return _Bench(model, tokenizer, stop_ids(model, tokenizer), held_out, console)


def _ask_everything(bench: _Bench) -> dict[str, ExactMatch]:
    """Exact match of the active adapter or base on both held-out sets."""
    with bench.console.status("answering held-out prompts"):
        return {
            task: answers(bench.model, bench.tokenizer, records, bench.stop_ids)
            for task, records in bench.held_out.items()
        }


def _train(task: str, folder: Path, console: Console, overwrite: bool) -> RunResult:
    _chapter(console, f"Training the adapter “{task}”")
    config = RunConfig(
        model=POCKET,
        data=[str(data_file(task, "train"))],
        out=str(folder / task),
        device="cpu",
        overwrite=overwrite,
        lora=LoraConfig(r=16, lora_alpha=32),
        dataset=DataConfig(tokens_per_row=TOKENS_PER_ROW, eval_data=[str(data_file(task, "heldout"))]),
        training=TRAINING,
    )
    result = progress.watch(run(config), console)
    seconds, losses = duration(result.progress.seconds), losses_of(folder / task / "metrics.jsonl")
    console.print(
        Text.assemble(
            f"loss {losses[0]:.2f} ",
            (curve(list(map(math.log, losses)), 40), "blue"),
            f" {losses[-1]:.1g}  in {seconds}",
        )
    )
    return result


def _switch(bench: _Bench, fingerprints: dict[str, list[Tensor]]) -> bool:
    """Switches between base and adapters. Returns True if every logit equals its first value."""
    _chapter(bench.console, "Switching: one base, two adapters, nothing reloaded")
    identical = True
    prompts = {task: records[0] for task, records in bench.held_out.items()}
    for who in ("dates", "base", "orders", "dates", "base"):
        activate(bench.model, None if who == "base" else who)
        same = all(torch.equal(a, b) for a, b in zip(_fingerprint(bench), fingerprints[who], strict=True))
        identical &= same
        replies = [
            answers(bench.model, bench.tokenizer, [record], bench.stop_ids, 48).answers[0].answer
            for record in prompts.values()
        ]
        mark = Text("same to the bit", "green") if same else Text("DIFFERENT", "bold red")
        line = Text.assemble((f"{who:<7}", "bold"), " ", mark, "  ", (" | ".join(map(_short, replies)), "dim"))
        bench.console.print(line, no_wrap=True, overflow="ellipsis")
    return identical


def _merge(bench: _Bench, folder: Path, overwrite: bool) -> float:
    """Merges one adapter into a float32 checkpoint. Returns the largest difference of the logits."""
    _chapter(bench.console, "Merging “dates” into the weights, and proving it")
    with bench.console.status("writing, reloading and comparing"):
        merged = merge_checkpoint(
            bench.model,
            bench.tokenizer,
            "dates",
            folder / "dates-merged",
            prompts=real_prompts(bench.tokenizer, None, [str(data_file("dates", "heldout"))]),
            dtype=torch.float32,
            overwrite=overwrite,
        )
    largest = merged.verification.difference.largest
    bench.console.print(
        Text.assemble(
            "The merged checkpoint was loaded again and compared on held-out prompts:\n"
            "its logits differ from those of base + adapter by at most ",
            (f"{largest:.1e}", "green"),
            ".",
        )
    )
    return largest


def _fingerprint(bench: _Bench) -> list[Tensor]:
    """Logits of the active model on some prompts, for comparison to the bit."""
    with torch.inference_mode():
        return [bench.model(input_ids=torch.tensor([prompt])).logits.clone() for prompt in _proof_prompts(bench)]


def _proof_prompts(bench: _Bench) -> list[list[int]]:
    return [
        prompt_ids(record, bench.tokenizer)
        for records in bench.held_out.values()
        for record in records[:PROOF_PROMPTS]
    ]


def _show_answers(console: Console, answering: dict[str, ExactMatch]) -> None:
    """Shows the first prompts of a task with each model's answers, correct ones in green."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    table.add_column("asked", width=36, no_wrap=True, overflow="ellipsis")
    for who in answering:
        table.add_column(f"{who} says", width=36, no_wrap=True, overflow="ellipsis")
    for index in range(SHOWN):
        found = [exact.answers[index] for exact in answering.values()]
        replies = [Text(answer.answer, "green" if answer.ok else "red") for answer in found]
        table.add_row(found[0].prompt, *replies)
    console.print()
    console.print(table)


def _show_scores(bench: _Bench, scores: dict[str, dict[str, ExactMatch]]) -> None:
    _chapter(bench.console, "Held-out exact match")
    table = Table(box=None, pad_edge=False, padding=(0, 4), header_style="dim")
    table.add_column("")
    for task in TASKS:
        table.add_column(f"{task} ({len(bench.held_out[task])})", justify="right")
    for who, found in scores.items():
        cells = [Text(f"{found[task].share:.1%}", "bold green" if who == task else "dim") for task in TASKS]
        table.add_row(Text("base" if who == "base" else f"base + {who}", "bold"), *cells)
    bench.console.print(table)


def _farewell(folder: Path, console: Console, figures: dict[str, Any], keep: bool) -> None:
    _chapter(console, "Your turn")
    console.print(f"That took {duration(figures['seconds'])}. With your own model and data:")
    for command in (
        "loratune preview MODEL train.jsonl",
        "loratune train   MODEL train.jsonl --out my-adapter",
        "loratune chat    my-adapter",
    ):
        console.print(f"  {command}", style="cyan")
    if keep:
        console.print(f"Kept in {folder}: adapters, loss.png of each, the merged checkpoint, demo.json.")
    else:
        console.print(
            "Nothing was kept; `loratune demo --out DIR` keeps the adapters, plots and figures.", style="dim"
        )


def _training_figures(result: RunResult) -> dict[str, Any]:
    return {
        "steps": result.progress.step,
        "seconds": round(result.progress.seconds, 1),
        "trained_tokens": result.progress.trained_tokens,
        "tokens_per_second": round(result.tokens_per_second),
        "held_out_loss": result.progress.best_eval_loss,
    }


def _chapter(console: Console, title: str) -> None:
    console.print()
    console.print(Rule(Text(title, "bold"), align="left", style="dim"))


def _short(text: str) -> str:
    return text if len(text) <= 30 else text[:27] + "..."
