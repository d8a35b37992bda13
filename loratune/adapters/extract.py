"""An adapter extracted from a fine-tuned checkpoint: the low-rank part of tuned - base, and the error of each rank.

Weights are read one at a time from both folders, so a model of any size needs the memory of one layer. No model is
loaded: the layers are found on an empty copy of the architecture. Changes outside of them (norms, embeddings, biases,
the head) cannot be in the adapter. They are measured and listed, since the adapter does not reproduce them.

The error of a rank r is ‖Δ - B A‖ / ‖Δ‖ in the Frobenius norm, for each layer and for all together. `lowrank`
explains how it is computed and why it holds for large layers too. Full fine-tuning changes every direction a little.
Expect large errors at small ranks. They often harm a model less than the norm suggests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loratune.adapters.lowrank import decompose
from loratune.adapters.updates import Update, check_out, check_rank, narrow_line, write_updates
from loratune.base.load import load_config, resolve
from loratune.base.model_config import without_data
from loratune.config import LoraConfig
from loratune.errors import AdapterError, ConfigError, ModelError
from loratune.lora import peft_config
from loratune.lora.paths import find_modules, shortest_names
from loratune.lora.select import select
from loratune.lora.target import Target
from loratune.precision.tensors import Checkpoint
from loratune.version import __version__

_MAX_LISTED = 6


@dataclass(frozen=True, slots=True)
class LayerError:
    """Errors of low ranks for one layer's difference."""

    norm: float
    """Frobenius norm of tuned - base."""
    relative: float
    """`norm` divided by the norm of the base weight: the relative distance that training moved the weight."""
    errors: dict[int, float]
    """Rank -> relative Frobenius error of the best update of that rank."""
    exact: bool
    """False if found by a randomised decomposition, whose errors are measured on the difference itself."""


@dataclass(frozen=True)
class Extracted:
    """Report of `extract`; `print` it."""

    path: Path
    rank: int
    layers: dict[str, LayerError]
    narrow: tuple[str, ...] = ()
    """Layers in which the rank adds nothing, because their smaller side is below it."""
    left_out: dict[str, float] = field(default_factory=dict)
    """Changed tensor that is not in the adapter -> relative size of its change."""

    @property
    def errors(self) -> dict[int, float]:
        """Rank -> relative Frobenius error of all layers together."""
        whole = math.hypot(*(layer.norm for layer in self.layers.values()))
        ranks = next(iter(self.layers.values())).errors
        return {
            rank: math.hypot(*(layer.errors[rank] * layer.norm for layer in self.layers.values())) / whole
            for rank in ranks
        }

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda path: self.layers[path].errors[self.rank])
        lines = [
            f"{self.path}: rank {self.rank}, {len(self.layers)} layers",
            "  rank   left out (relative Frobenius norm)",
            *(
                f"  {rank:>4}   {error:.2%}{'   <- written' if rank == self.rank else ''}"
                for rank, error in self.errors.items()
            ),
            f"  most is left out at {worst}: {self.layers[worst].errors[self.rank]:.2%}",
        ]
        lines += narrow_line(self.rank, self.narrow)
        if self.left_out:
            largest = sorted(self.left_out, key=lambda key: -self.left_out[key])
            named = ", ".join(f"{key} ({self.left_out[key]:.2%})" for key in largest[:_MAX_LISTED])
            more = f" and {len(largest) - _MAX_LISTED} more" if len(largest) > _MAX_LISTED else ""
            lines.append(f"  changed too, but not in the adapter: {named}{more}")
        return "\n".join(lines)


def extract(
    tuned: str,
    base: str,
    out: str | Path,
    *,
    rank: int,
    target_modules: str | list[str] = "all-linear",
    device: str | torch.device | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Extracted:
    """Writes the adapter of `rank` that is nearest to the difference of two checkpoints of one architecture.

    Args:
        tuned, base: folders or hub ids of transformers models in safetensors.
        target_modules: as in `LoraConfig`.
        out: folder for the adapter.
        device: device of the computation; by default the GPU if there is one.
        trust_remote_code: run Python code that belongs to the base, as in `load`.

    Raises:
        ConfigError: the rank is below 1 or above the smaller side of every layer.
        ModelError: a checkpoint is missing, incomplete or quantised, or the two do not fit
            each other. AdapterError: the layers do not differ. OutputError: `out` is taken or cannot be written.
    """
    if rank < 1:
        raise ConfigError(f"rank is {rank}; a rank is at least 1")
    target = check_out(out, [tuned, base], overwrite=overwrite)
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config_of_base = load_config(base, trust_remote_code=trust_remote_code)
    model = without_data(config_of_base, torch.float32, trust_remote_code=trust_remote_code)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules)
    targets = select(model, config, strict=False).targets
    narrow = check_rank(rank, {t.path: (t.features[1], t.features[0]) for t in targets})
    with ExitStack() as stack:
        before, after = (WeightReader(name, stack) for name in (base, tuned))
        updates, layers = _updates(before, after, targets, rank, on)
        left_out = dict(
            _left_out(before, after, {f"{path}.{t.kind.weight_name}" for t in targets for path in t.paths})
        )
    extracted = Extracted(target, rank, layers, tuple(narrow), left_out)
    write_updates(
        target, updates, _adapter_fields(model, config, targets, base), _report(extracted, tuned), overwrite=overwrite
    )
    return extracted


class WeightReader:
    """The tensors of a transformers folder, read one by one; files stay open until `stack` closes."""

    def __init__(self, model: str, stack: ExitStack) -> None:
        self.name = model
        folder = Path(resolve(model))
        if not folder.is_dir():
            folder = Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))
        self._files: dict[str, Any] = {}
        for path in Checkpoint(folder).files:
            self._open(path, stack)

    def _open(self, path: Path, stack: ExitStack) -> None:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: is damaged or not a safetensors file ({error})") from error
        self._files |= dict.fromkeys(file.keys(), file)

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def read(self, key: str) -> Tensor:
        """One tensor. Raises ModelError: it is missing, or not in floating point."""
        found = next((name for name in _names(key) if name in self._files), None)
        if found is None:
            raise ModelError(f"{self.name}: has no tensor {key}")
        tensor: Tensor = self._files[found].get_tensor(found)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(f"{self.name}: {found} is quantised ({tensor.dtype}); a difference needs real numbers")
        return tensor


def _names(key: str) -> Iterator[str]:
    """A tensor's name, and its names in checkpoints saved with or without the head."""
    yield key
    yield from (key.removeprefix(prefix) for prefix in ("model.", "transformer.") if key.startswith(prefix))
    yield f"model.{key}"


def _updates(
    before: WeightReader, after: WeightReader, targets: Sequence[Target], rank: int, device: torch.device
) -> tuple[dict[str, Update], dict[str, LayerError]]:
    updates, layers = {}, {}
    ranks = _ranks(rank)
    for target in targets:
        name, refusal = f"{target.path}.{target.kind.weight_name}", target.kind.merge_refusal(target.base)
        if refusal is not None:
            raise AdapterError(f"{name} has no equivalent low-rank update: {refusal}; leave it out of target_modules")
        weights = [checkpoint.read(name) for checkpoint in (before, after)]
        if weights[0].shape != weights[1].shape:
            raise ModelError(
                f"{after.name}: {name} is {tuple(weights[1].shape)}, but {tuple(weights[0].shape)} in "
                f"{before.name}; they are not of one architecture"
            )
        old, new = (weight.to(device, torch.float32) for weight in weights)
        delta = ((new - old).T if target.kind.transposed else (new - old).flatten(1)) / target.kind.scaling_factor
        if not bool(delta.isfinite().all()):
            raise ModelError(f"{name}: the difference of {after.name} and {before.name} is not finite")
        found = decompose(delta, max(ranks))
        lora_A, lora_B = found.factors(rank)
        path, shape = target.kind.path_in_files(target.path), target.shapes_in_files().get("lora_A", ())
        updates[path] = Update(lora_A.cpu(), lora_B.cpu(), keys=target.kind.keys, kernel=shape[2:])
        norm = found.norm
        errors = {r: found.error(r) / norm if norm else 0.0 for r in ranks}
        layers[target.path] = LayerError(norm, norm / max(float(old.norm()), 1e-30), errors, found.exact)
    if not any(layer.norm for layer in layers.values()):
        raise AdapterError(f"{after.name} and {before.name} do not differ in any of the {len(layers)} layers")
    return updates, layers


def _ranks(rank: int) -> list[int]:
    """The written rank, and powers of two up to four times that, for comparison."""
    return sorted({rank, *(2**i for i in range(16) if 2**i <= 4 * rank)})


def _left_out(before: WeightReader, after: WeightReader, adapted: set[str]) -> Iterator[tuple[str, float]]:
    """Tensors that differ and are not adapted, with the relative size of the change; infinite for another shape."""
    for key in sorted((before.keys() & after.keys()) - {name for path in adapted for name in _names(path)}):
        old, new = before.read(key).float(), after.read(key).float()
        if old.shape != new.shape:
            yield key, math.inf
        elif not torch.equal(old, new):
            yield key, float((new - old).norm()) / max(float(old.norm()), 1e-30)


def _adapter_fields(model: nn.Module, config: LoraConfig, targets: Sequence[Target], base: str) -> dict[str, Any]:
    every = [path for entry in find_modules(model) for path in entry.paths]
    adapted = [path for target in targets if not target.kind.is_part for path in target.paths]
    return (
        peft_config.UNUSED
        | {f.name: getattr(config, f.name) for f in fields(config)}
        | {
            "peft_type": "LORA",
            "task_type": peft_config.task_type(model),
            "base_model_name_or_path": base,
            "fan_in_fan_out": any(target.kind.fan_in_fan_out for target in targets),
            "inference_mode": True,
            "target_modules": shortest_names(adapted, every),
        }
    )


def _report(extracted: Extracted, tuned: str) -> Mapping[str, Any]:
    return {
        "made_by": "loratune extract",
        "version": __version__,
        "sources": {tuned: 1.0},
        "rank": extracted.rank,
        "relative_error": extracted.errors[extracted.rank],
        "relative_errors_by_rank": extracted.errors,
        "layers": {
            path: {
                "norm": layer.norm,
                "relative_to_weight": layer.relative,
                "errors": layer.errors,
                "exact": layer.exact,
            }
            for path, layer in extracted.layers.items()
        },
        "not_in_the_adapter": {key: change for key, change in extracted.left_out.items() if math.isfinite(change)},
    }
