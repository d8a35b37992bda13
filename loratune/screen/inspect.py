"""`loratune inspect`: an adapter's base, its shape, the size of its updates, and its training.

Any folder in PEFT's format works; run.toml and metrics.jsonl are read if they are in it. The size of an update is the
Frobenius norm of scaling · B A. It needs two r x r products and never the full matrix, because
‖B A‖² = sum((BᵀB) ∘ (A Aᵀ)). Drawn over the depth of the model, it shows the layers that learned most.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from safetensors import safe_open
from torch import Tensor

from loratune.adapters.updates import pair_of, read_report
from loratune.config import LoraConfig, RunConfig, from_dict, read_toml
from loratune.lora.expressions import fits_end
from loratune.lora.files import WEIGHTS_FILE, AdapterInfo, read_info
from loratune.lora.layer import PLAIN
from loratune.lora.layers import KINDS
from loratune.lora.variants import variant_of
from loratune.runs import metrics
from loratune.screen.text import curve
from loratune.units import duration, size

_PREFIX = "base_model.model."
_CURVE_WIDTH = 24


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted layer."""

    path: str
    r: int
    d_in: int
    d_out: int
    scaling: float
    norm: float
    """Frobenius norm of scaling · B A. The update of a variant that is not a low-rank sum has another norm."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """All facts about an adapter in its folder."""

    info: AdapterInfo
    layers: tuple[Layer, ...]
    in_full: tuple[str, ...]
    """Names of tensors that belong to no adapted layer: modules_to_save and biases."""
    run: dict[str, Any]
    """Content of run.toml; empty if there is none."""
    settings: RunConfig | None
    """The same as checked settings."""
    history: list[dict[str, Any]]
    """Lines of metrics.jsonl; empty if there is none."""
    damaged: int
    """Lines of metrics.jsonl that cannot be read."""
    made: dict[str, Any]
    """Content of provenance.json, beside an adapter that was computed from others; else empty."""


def inspect(directory: str | Path) -> Inspected:
    """Reads all facts about the adapter in a folder.

    Raises:
        OutputError: metrics.jsonl is not a file.
        AdapterError: it holds no LoRA adapter, or provenance.json is damaged.
        ConfigError: its run.toml is damaged.
    """
    info = read_info(directory)
    layers, in_full = _read_layers(info)
    run_file = info.folder / "run.toml"
    run = read_toml(str(run_file)) if os.path.lexists(run_file) else {}
    settings = from_dict(RunConfig, run, str(run_file)) if run else None
    history, damaged = metrics.read_all(info.folder / "metrics.jsonl")
    return Inspected(info, layers, in_full, run, settings, history, damaged, read_report(info.folder))


def as_json(found: Inspected) -> dict[str, Any]:
    """The facts as plain values, for programs."""
    info = found.info
    return {
        "folder": str(info.folder),
        "base_model": info.base_model,
        "task_type": info.task_type,
        "parameters": info.parameters,
        "bytes": info.size_bytes,
        "dtypes": list(info.dtypes),
        "layers": {
            layer.path: {
                "r": layer.r,
                "shape": [layer.d_out, layer.d_in],
                "scaling": layer.scaling,
                "norm": layer.norm,
            }
            for layer in found.layers
        },
        "in_full": list(found.in_full),
        "run": found.run,
        "damaged_lines": found.damaged,
        "made": found.made,
    }


def draw(found: Inspected, console: Console) -> None:
    """Draws the facts."""
    console.print(Text(found.info.folder.resolve().name, style="bold"), soft_wrap=True)
    console.print(Padding(_facts(_adapter_facts(found)), (1, 0, 0, 2)))
    console.print(Padding(_layer_table(found.layers, console), (0, 0, 0, 1)))
    if found.run or found.history or found.damaged:
        console.print(Padding(_facts(_training_facts(found, console)), (0, 0, 1, 2)))
    elif not found.made:
        console.print(Text("  no run.toml here: the training is not recorded\n", style="dim"))


def _adapter_facts(found: Inspected) -> dict[str, str]:
    info, config = found.info, found.info.config
    ranks = sorted({layer.r for layer in found.layers})
    scalings = sorted({layer.scaling for layer in found.layers})
    kind = "alpha / sqrt r" if config.use_rslora else "alpha / r"
    variant = variant_of(config)
    norms = "" if variant.low_rank_sum else ", not a low-rank sum; the table shows scaling · B A"
    return {
        "base": info.base_model or "not recorded",
        "variant": "" if variant is PLAIN else type(variant).__name__ + norms,
        "rank": ", ".join(map(str, ranks)),
        "scaling": ", ".join(f"{s:.4g}" for s in scalings) + f"  ({kind}, alpha {config.lora_alpha:g})",
        "size": f"{info.parameters:,} parameters, {size(info.size_bytes)} in {', '.join(info.dtypes)}",
        "targets": _words(config.target_modules),
        "experts": _experts(config.target_parameters),
        "dropout": f"{config.lora_dropout:g}" if config.lora_dropout else "",
        "in full": _words(list(found.in_full)),
        "made by": _made_by(found.made),
    }


def _experts(parameters: str | Sequence[str] | None) -> str:
    """The adapted expert weights, and the programs that apply them."""
    if not parameters:
        return ""
    return f"{_words(parameters)}; PEFT applies them, vLLM and SGLang may drop or refuse them: merge for these"


def _made_by(made: Mapping[str, Any]) -> str:
    if not made:
        return ""
    sources = " + ".join(f"{weight:g} x {Path(folder).name}" for folder, weight in made.get("sources", {}).items())
    method = f", {made['recipe']['method']}" if "recipe" in made else ""
    error = made.get("relative_error")
    lost = f"; leaves out {error:.2%} (Frobenius norm)" if error is not None else ""
    return f"{made.get('made_by', '')} from {sources}{method}{lost}"


def _training_facts(found: Inspected, console: Console) -> dict[str, str]:
    run, steps = found.settings, [line for line in found.history if line.get("loss") is not None]
    losses = [float(line["loss"]) for line in steps if not line.get("skipped")]
    held_out = [(float(m["eval_loss"]), m["step"]) for m in found.history if m.get("eval_loss") is not None]
    facts = {"trained on": _words([Path(path).name for path in run.data]) if run else ""}
    if steps:
        last = steps[-1]
        seconds = math.fsum(m.get("tokens", 0) / m["tokens_per_second"] for m in steps if m.get("tokens_per_second"))
        took = f" in {duration(seconds)}" if seconds else ""
        facts["steps"] = f"{last['step']:,}{took}, {last.get('trained_tokens', 0):,} trained tokens"
    if losses:
        facts["loss"] = f"{losses[0]:.4f} {_curve(losses, console)} {losses[-1]:.4f}"
    if held_out:
        best, step = min(held_out)
        facts["held-out"] = (
            f"{held_out[0][0]:.4f} {_curve([loss for loss, _ in held_out], console)} {held_out[-1][0]:.4f}"
        )
        facts["best"] = f"{best:.4f} held-out, at step {step:,}"
    if run is not None:
        training = run.training
        rate = "not chosen" if training.learning_rate is None else f"{training.learning_rate}"
        facts["learning rate"] = f"{rate}, {training.lr_scheduler_type}, warm-up {training.warmup_ratio:.0%}"
        rows, row = training.gradient_accumulation_steps, run.dataset.tokens_per_row
        if rows and row:
            facts["batch"] = f"{rows} x {row:,} tokens"
        facts["seed"] = str(training.seed)
    if found.damaged:
        facts["left out"] = f"{found.damaged:,} damaged lines of metrics.jsonl"
    return facts


def _facts(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=13)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _layer_table(layers: Sequence[Layer], console: Console) -> Table:
    """One row per kind of layer, with the norm of its update over the depth of the model."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column("layer", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("update", justify="right", no_wrap=True)
    table.add_column("first to last", no_wrap=True)
    strongest = max((layer.norm for layer in layers), default=0.0)
    for kind, members in _kinds(layers).items():
        norms = [layer.norm for layer in members]
        shapes = {f"{layer.d_in} > {layer.d_out}" for layer in members}
        table.add_row(
            kind,
            str(len(members)),
            ", ".join(sorted(shapes)),
            f"{math.fsum(norms) / len(norms):.3g}",
            Text(_curve(norms, console, strongest), style="cyan"),
        )
    return table


def _kinds(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers by the last two names of their paths that are not numbers, in the order of the model."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        names = [name for name in layer.path.split(".") if not name.isdigit()]
        kinds.setdefault(".".join(names[-2:]), []).append(layer)
    return kinds


def _read_layers(info: AdapterInfo) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """The adapted layers, in the model's order, and the names of tensors that belong to none of them."""
    layers, taken = [], set[str]()
    variant, kinds = variant_of(info.config), {kind.keys: kind for kind in KINDS}
    with safe_open(info.folder / WEIGHTS_FILE, framework="pt") as file:
        for key in info.shapes:
            pair = pair_of(key)
            other = key.removesuffix(pair[0]) + pair[1] if pair else ""
            if pair is None or other not in info.shapes:
                continue
            stem = key.removesuffix(pair[0])
            path = stem.removeprefix(_PREFIX).removesuffix(".")
            tensors = file.get_tensor(key), file.get_tensor(other)
            expert = _expert_parameter(path, info)
            if expert is not None:
                layers.append(_expert_layer(expert, *tensors, info.config))
                taken |= {key, other}
                continue
            layer = _layer(path, *tensors, info.config)
            specs = variant.tensors(kinds[pair], layer.d_in, layer.d_out, layer.r).values()
            taken |= {stem + spec.key for spec in specs}
            layers.append(layer)
    rest = [key.removeprefix(_PREFIX).replace(".base_layer.", ".") for key in info.shapes if key not in taken]
    return tuple(sorted(layers, key=_depth)), tuple(rest)


def _expert_parameter(path: str, info: AdapterInfo) -> str | None:
    """Path of the expert weights that the tensors at `path` adapt, or None for those of a layer.

    Keys do not name the weights: with two, the first is under `base_layer`, and `down_proj` is always the last.
    """
    owner = path.removesuffix(".base_layer")
    given = info.config.target_parameters
    names = [given] if isinstance(given, str) else given or []
    leaves = sorted({name.rpartition(".")[2] for name in names}, key=lambda leaf: (leaf == "down_proj", leaf))
    is_nested = f"{_PREFIX}{owner}.base_layer.lora_A.weight" in info.shapes
    last = owner.rpartition(".")[2]
    if not leaves or not (is_nested or last == "experts"):
        return None
    here = [leaf for leaf in leaves if any(f"{owner}.{leaf}".endswith(name) for name in names if name.endswith(leaf))]
    if not here:
        return None
    return f"{owner}.{here[0] if path != owner else here[-1]}"


def _expert_layer(path: str, lora_A: Tensor, lora_B: Tensor, config: LoraConfig) -> Layer:
    """Facts of the pairs of all experts: the rank of one, and the norm of all updates together."""
    ranks, alphas = config.rank_pattern.items(), config.alpha_pattern.items()
    r = next((value for key, value in ranks if fits_end("rank_pattern", key, path)), config.r)
    alpha = next((value for key, value in alphas if fits_end("alpha_pattern", key, path)), config.lora_alpha)
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    A = lora_A.double().view(-1, r, lora_A.shape[1])
    B = lora_B.double().view(lora_B.shape[0], r, -1).permute(2, 0, 1)
    square = float(((B.mT @ B) * (A @ A.mT)).sum())
    return Layer(path, r, A.shape[2], B.shape[1], scaling, abs(scaling) * math.sqrt(max(0.0, square)))


def _layer(path: str, lora_A: Tensor, lora_B: Tensor, config: LoraConfig) -> Layer:
    """Facts of one layer. Matrices with more than two dimensions (convolutions) are flattened."""
    A, B = lora_A.flatten(1).double(), lora_B.flatten(1).double()
    r = A.shape[0]
    alpha = next(
        (a for key, a in config.alpha_pattern.items() if fits_end("alpha_pattern", key, path)), config.lora_alpha
    )
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    square = float(((B.T @ B) * (A @ A.T)).sum())
    return Layer(path, r, A.shape[1], B.shape[0], scaling, abs(scaling) * math.sqrt(max(0.0, square)))


def _depth(layer: Layer) -> list[tuple[int, str]]:
    """Sort key that puts "layers.10" after "layers.9"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in layer.path.split(".")]


def _curve(values: Sequence[float], console: Console, top: float | None = None) -> str:
    return curve(values, _CURVE_WIDTH, top=top, ascii_only=console.options.ascii_only)


def _words(value: str | Sequence[str]) -> str:
    if isinstance(value, str):
        return value
    listed = list(value[:12])
    return ", ".join(listed) + (f" and {len(value) - 12} more" if len(value) > 12 else "")
