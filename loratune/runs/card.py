"""The model card of an output folder: README.md with the front matter that the hub and PEFT read.

`render_card` is a pure function from facts to text, so tests can check every line. A card gives, in this order: a
description, use, results, data, training settings and versions. It contains measured facts only and leaves unknown
ones out.
Format: https://huggingface.co/docs/hub/model-cards (`base_model`, `library_name: peft`, `base_model_relation`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.base.load import POCKET
from loratune.config import LoraConfig, Precision, RunConfig
from loratune.precision.contract import weight_format
from loratune.tables import PRECISIONS
from loratune.units import command, duration, path_word, size

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values accepted by --max-lora-rank
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True)
class DataFacts:
    """One file or data set for training or evaluation."""

    name: str
    """File name or hub id, never a local path."""
    records: int | None
    sha256: str | None
    """Hash of the content, which identifies the data; None if there is no single file."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All facts of a card. A field that is None or empty is left out of the card."""

    name: str
    """Name of the adapter's folder."""
    base_model: str
    precision: Precision = "auto"
    """Precision of the base during training; the card mentions it if the base was quantised."""
    lora: LoraConfig
    train_data: tuple[DataFacts, ...]
    """Training data; empty for an adapter made by another program."""
    trainable_parameters: int = 0
    file_bytes: int = 0
    """Size of the adapter's tensors."""
    without_template: bool = False
    """The training data had no chat template, so prompts must not have one."""
    eval_data: tuple[DataFacts, ...] = ()
    license: str | None = None
    """SPDX identifier. It depends on base and data, so only the user can give it."""
    merged_difference: float | None = None
    """Largest absolute difference in logits between a merged checkpoint and base + adapter; None for an adapter."""
    results: Mapping[str, str] = field(default_factory=dict)
    """Measurement -> value as text with unit: {"held-out loss": "0.0312 nats per token"}."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The main training settings, name -> text: {"learning rate": "0.0002, cosine"}."""
    steps: int | None = None
    trained_tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def render_card(facts: CardFacts) -> str:
    """The text of README.md; ends with a newline."""
    sections = [
        _front_matter(facts),
        f"# {facts.name}\n\n{_description(facts)}",
        f"## Use\n\n{_use(facts)}",
        _table("## Results", "measured", facts.results),
        _data(facts),
        _table("## Training", "setting", _training_rows(facts)),
        _table("## Versions", "package", facts.versions),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def render_merged_card(
    name: str, base_model: str, lora: LoraConfig, run: RunConfig | None, largest_difference: float
) -> str:
    """README.md of a merged checkpoint, from the facts in the adapter's folder.

    Args:
        run: settings of the run that trained the adapter; None if another program trained it.
        largest_difference: largest difference in a logit between the checkpoint and base + adapter.
    """
    data = tuple(DataFacts(Path(path).name, None, None) for path in (run.data if run else ()))
    return render_card(
        CardFacts(
            name=name,
            base_model=base_model,
            precision=run.precision if run else "auto",
            lora=lora,
            train_data=data,
            merged_difference=largest_difference,
        )
    )


def _front_matter(facts: CardFacts) -> str:
    """YAML front matter. Values are written as JSON, a subset of YAML, which needs no escaping rules."""
    merged = facts.merged_difference is not None
    values: dict[str, Any] = {}
    if _HUB_ID.fullmatch(facts.base_model) and facts.base_model != POCKET:  # the hub rejects unknown ids
        values["base_model"] = facts.base_model
        values["base_model_relation"] = "finetune" if merged else "adapter"
    values["library_name"] = "transformers" if merged else "peft"
    if facts.license:
        values["license"] = facts.license
    values["pipeline_tag"] = "text-generation"
    values["tags"] = ["lora", "loratune"]
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
    return "\n".join(["---", *lines, "---"])


def _form(facts: CardFacts) -> str | None:
    """Quantised format of the base during training; None for floating point."""
    return weight_format(facts.precision).label if facts.precision in PRECISIONS else None


def _dequantised(facts: CardFacts) -> str:
    form = _form(facts)
    return f" The adapter was trained over weights in {form}. It is added here to their dense form." if form else ""


def _description(facts: CardFacts) -> str:
    learned = ", ".join(f"`{data.name}`" for data in facts.train_data) or "data not named in its folder"
    if facts.merged_difference is not None:
        return (
            f"`{facts.base_model}` with a LoRA adapter trained on {learned} merged into its weights by loratune. "
            "The checkpoint was loaded again and compared with base + adapter: the largest "
            f"difference in a logit is {facts.merged_difference:.2g}.{_dequantised(facts)}"
        )
    rank = _ranks(facts.lora)
    return (
        f"A LoRA adapter of rank {rank} for `{facts.base_model}`, trained with loratune on {learned}: "
        f"{facts.trainable_parameters:,} parameters, {size(facts.file_bytes)}. The base model is not in this "
        "folder and was not changed."
    )


def _use(facts: CardFacts) -> str:
    name, folder = json.dumps(facts.name), path_word(facts.name)
    if facts.merged_difference is not None:
        commands = f"{command('loratune', 'chat', folder)}\n{command('vllm', 'serve', folder)}"
        return f"An ordinary checkpoint; run these beside the folder:\n\n```sh\n{commands}\n```"
    chat = command("loratune", "chat", folder)
    merge = command("loratune", "merge", folder, "--out", f"{folder}-merged")
    return f"""Run these beside the folder.

```sh
{chat:<{len(merge)}}    # {"continues a line, as in training" if facts.without_template else "talk to it"}
{merge}    # one checkpoint, verified
```

```python
import loratune as lt

model = lt.load({json.dumps(facts.base_model)}{_load_words(facts)})
lt.load_adapter(model, {name}, name={name})
lt.activate(model, {name})    # None switches back to the base
```

{_peft(facts)}

{_vllm(facts)}"""


def _peft(facts: CardFacts) -> str:
    imports, base = "from transformers import AutoModelForCausalLM", json.dumps(facts.base_model)
    if facts.base_model == POCKET:
        imports, base = f"{imports}\n\nfrom loratune.box import MODEL_DIR", "MODEL_DIR"
    return f"""With PEFT:

```python
from peft import PeftModel
{imports}

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {json.dumps(facts.name)})
```"""


def _vllm(facts: CardFacts) -> str:
    lora = facts.lora
    if lora.modules_to_save or lora.bias != "none" or lora.rank_pattern or lora.alpha_pattern:
        return (
            "vLLM supports plain low-rank matrices with one scaling. This adapter has more (see the settings): merge "
            "it and serve the checkpoint."
        )
    rank = next((r for r in _VLLM_RANKS if r >= lora.r), lora.r)
    base = "$(python -c 'from loratune.box import MODEL_DIR; print(MODEL_DIR)')"
    base = base if facts.base_model == POCKET else command(path_word(facts.base_model))
    return (
        "With vLLM:\n\n"
        f"```sh\nvllm serve {base} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {command(f'{facts.name}={facts.name}')}\n```"
    )


def _data(facts: CardFacts) -> str:
    if not facts.train_data:
        return ""
    rows = ["## Data\n", "| | records | SHA-256 |", "|---|---:|---|"]
    for kind, part in (("trained on", facts.train_data), ("held out", facts.eval_data)):
        for data in part:
            digest = f"`{data.sha256}`" if data.sha256 else ""
            count = f"{data.records:,}" if data.records is not None else ""
            rows.append(f"| {kind} `{data.name}` | {count} | {digest} |")
    return "\n".join(rows)


def _load_words(facts: CardFacts) -> str:
    return f', precision="{facts.precision}"' if facts.precision in PRECISIONS else ""


def _training_rows(facts: CardFacts) -> dict[str, str]:
    lora = facts.lora
    scaling = f"{lora.lora_alpha:g}, {'rank-stabilised' if lora.use_rslora else 'over the rank'}"
    rows = {
        "rank `r`": _ranks(lora),
        "`lora_alpha`": scaling + (f", patterns {lora.alpha_pattern}" if lora.alpha_pattern else ""),
        "`lora_dropout`": f"{lora.lora_dropout:g}",
        "`target_modules`": _names(lora.target_modules),
        "`target_parameters`": _names(lora.target_parameters),
        "`modules_to_save`": ", ".join(lora.modules_to_save or []),
        "`bias`": "" if lora.bias == "none" else lora.bias,
        "base weights": _form(facts) or "",
        **facts.settings,
    }
    rows |= dict(_run_rows(facts))
    return {key: value for key, value in rows.items() if value}


def _names(value: str | list[str] | None) -> str:
    return value if isinstance(value, str) else ", ".join(value or [])


def _run_rows(facts: CardFacts) -> Iterator[tuple[str, str]]:
    if facts.steps is not None:
        yield "optimizer steps", f"{facts.steps:,}"
    if facts.trained_tokens is not None:
        yield "trained tokens", f"{facts.trained_tokens:,}"
    if facts.seconds is not None:
        yield "time", duration(facts.seconds)
    if facts.tokens_per_second is not None:
        yield "speed", f"{facts.tokens_per_second:,.0f} tokens per second"
    if facts.peak_memory_bytes is not None:
        yield "peak memory", size(facts.peak_memory_bytes)
    if facts.device is not None:
        yield "device", facts.device


def _ranks(lora: LoraConfig) -> str:
    special = ", ".join(f"{rank} for {pattern}" for pattern, rank in lora.rank_pattern.items())
    return f"{lora.r} ({special})" if special else str(lora.r)


def _table(heading: str, column: str, rows: Mapping[str, str]) -> str:
    """A two-column Markdown table; empty without rows. Pipes are escaped, since they would end a cell."""
    if not rows:
        return ""
    lines = [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join([heading, "", f"| {column} | |", "|---|---|", *lines])
