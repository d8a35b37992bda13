"""Writes docs/models.md from the results of the sweep."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.campaigns import other_models
from tests.campaigns.architecture_checks import COLUMNS

_SHOWN = COLUMNS[1:]
_MARK = {"": "✓"}

_EXPLAINED = {
    "inkling2_text": "PEFT renames the keys of weight_proj while it reads the file; attaching says so",
    **dict.fromkeys(("zamba", "zamba2"), "two layers share the weight, and each has an adapter of its own"),
    "musicgen": "AutoModelForCausalLM does not build it",
    "musicgen_melody": "AutoModelForCausalLM does not build it",
}
"""Causes that were found by hand, added to the measured reason."""

_HEAD = """# Models

{passing} of the {total} causal-LM types of transformers {transformers} pass every column below, and {others} of
{most} classes of other kinds. [The sweep](../tests/campaigns/architectures.py) makes this page:

    python -m tests.campaigns.architectures --again --write

Each type is a small random model in float32 on a CPU (PyTorch {torch}, PEFT {peft}), made from the type's default
configuration. Windows, chunks and top-k are 16 tokens. The packed row holds documents of 3, 40, 1, 17 and 9 tokens.

| column | property |
|---|---|
| attach | "all-linear" adapts the model; the share is of weights with 2 or 3 dimensions, without embeddings, head |
| packed | log-probabilities of a row and of its documents alone agree within 1e-4, gradients within 1e-3 |
| loss | 15 steps of AdamW on one row lower the loss |
| files | a saved adapter, loaded into the base again, gives the same logits |
| peft | PEFT reads the saved adapter and computes the same logits within 1e-5 |
| merge | the merged checkpoint, loaded again, passes the check of `loratune merge` |
| generate | 16 tokens with a cache are each the likeliest after the whole text |
| path | how a row runs; see below |
| GPU | what replaces the modules in half precision: whole decoder layers, or norms and gated MLPs |

| path | a row is | types |
|---|---|---|
{paths}

A column that fails has the number of its reason.

## Causal language models

| type | {columns} | share | path | GPU |
|---|{rule}|---|---|---|
"""
_MEANING = {
    "packed": "one call; our attention reads the documents' boundaries",
    "position mask": "one call; the model's attention, with the mask that transformers derives from positions",
    "document mask": "one call; the model's attention, with our mask",
    "padded batches": "batches of documents of similar length, padded on the right",
    "per document": "one call for each document",
}


def write(results: Path, page: Path, kinds: Sequence[str]) -> None:
    """Writes the page from one JSON file per type."""
    rows = {kind: json.loads((results / f"{kind}.json").read_text()) for kind in kinds}
    causal = {kind: row for kind, row in rows.items() if kind not in _others()}
    notes: dict[str, int] = {}
    lines = [_line(kind, row, notes) for kind, row in causal.items()]
    paths = Counter(row["facts"].get("path") for row in causal.values())
    head = _HEAD.format(
        passing=sum(_passes(row, COLUMNS) for row in causal.values()),
        total=len(causal),
        others=sum(_passes(rows[name], other_models.COLUMNS) for name in _others()),
        most=len(_others()),
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        peft=peft.__version__,
        columns=" | ".join(_SHOWN),
        rule="|".join("---" for _ in _SHOWN),
        paths="\n".join(f"| {path} | {meaning} | {paths[path]} |" for path, meaning in _MEANING.items()),
    )
    text = head + "\n".join(lines) + _other_tables(rows, notes) + "\n## Reasons\n\n"
    text += "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    page.write_text(text + "\n", encoding="utf-8")


def _others() -> list[str]:
    return [name for names in other_models.GROUPS.values() for name in names]


def _passes(row: dict[str, Any], columns: Sequence[str]) -> bool:
    return all(row["columns"].get(column) == "" for column in columns)


def _line(kind: str, row: dict[str, Any], notes: dict[str, int]) -> str:
    facts = row["facts"]
    if row["columns"].get("builds"):
        reason = _reason(row["columns"]["builds"], kind)
        return f"| {kind} | {_mark(reason, notes)} {'| ' * (len(_SHOWN) + 3)}".rstrip() + "|"
    cells = [_mark(_reason(row["columns"].get(column, "not run"), kind), notes) for column in _SHOWN]
    share = f"{facts['share']:.0%}" if "share" in facts else ""
    return f"| {kind} | {' | '.join(cells)} | {share} | {facts.get('path', '')} | {facts.get('fused', '')} |"


def _other_tables(rows: dict[str, Any], notes: dict[str, int]) -> str:
    text = """

## Other models, through the Python API

Vision-language models run on text tokens here, so their vision layers get no gradient. The column peft includes the
norm of the gradients; merge includes the exact weights after `unmerge`.
"""
    for group, names in other_models.GROUPS.items():
        columns = other_models.COLUMNS
        text += f"\n### {group[0].upper()}{group[1:]}\n\n| class | {' | '.join(columns)} | adapted linears |\n"
        text += f"|---|{'|'.join('---' for _ in columns)}|---|\n"
        for name in names:
            row, facts = rows[name], rows[name]["facts"]
            cells = " | ".join(_mark(_reason(row["columns"].get(column, "not run")), notes) for column in columns)
            text += f"| {name} | {cells} | {facts.get('adapted', '')} of {facts.get('linears', '')} |\n"
    return text


def _reason(text: str, kind: str = "") -> str:
    """A fault in one line of Markdown, without the folder that held the merged checkpoint."""
    line = text.replace("|", "/").partition(" (requirement")[0].strip()
    more = f" ({_EXPLAINED[kind]})" if line and kind in _EXPLAINED else ""
    return line[:240] + more


def _mark(reason: str, notes: dict[str, int]) -> str:
    if not reason:
        return "✓"
    return f"[{notes.setdefault(reason, len(notes) + 1)}](#reasons)"
