"""Checkpoints: the complete state of a run, so that a resumed run equals the uninterrupted one to the bit. No pickle.

A checkpoint is a folder `checkpoints/step-000120/`. It holds the adapter in PEFT format, so it can be used directly,
AdamW's moments in `optimizer.safetensors`, and `progress.json`. The data need no state: an epoch's rows follow from
the seed, dropout from seed and step. Folders appear whole or not at all. The newest checkpoint and the best one on
held-out data are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from transformers import PreTrainedModel

from loratune import atomic
from loratune.errors import TrainingError
from loratune.lora.files import save

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments in an optimizer's state and in files."""


@dataclass
class Progress:
    """Counters of a run; `step` counts finished optimizer steps, including skipped ones."""

    step: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    best_step: int | None = None
    best_eval_loss: float | None = None
    evaluations_without_gain: int = 0
    optimizer_steps: int = 0


def write(
    folder: Path,
    model: PreTrainedModel,
    name: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> Path:
    """Saves a checkpoint as `folder/step-NNNNNN` and removes all others but the best.

    Raises: OutputError: the disk is full or read-only; earlier checkpoints are then unchanged.
    """
    moments = {
        f"{key}.{moment}": optimizer.state[parameter][moment]
        for key, parameter in parameters.items()
        for moment in MOMENTS
        if parameter in optimizer.state
    }
    return write_parts(folder, lambda place: save(model, place, name=name, overwrite=True), moments, progress)


def write_parts(
    folder: Path, save_adapter: Callable[[Path], None], moments: Mapping[str, torch.Tensor], progress: Progress
) -> Path:
    """`write` for an adapter that is not attached to the model, such as one in a bank.

    Args:
        save_adapter: writes the adapter into the given folder.
        moments: AdamW's moments as "PARAMETER.exp_avg" and "PARAMETER.exp_avg_sq".
    """
    path = at_step(folder, progress.step)
    with atomic.new_directory(path, overwrite=True) as temporary:
        save_adapter(temporary)
        contiguous = {key: moment.contiguous() for key, moment in moments.items()}
        atomic.write_bytes(temporary / "optimizer.safetensors", to_bytes(contiguous))
        atomic.write_text(temporary / "progress.json", json.dumps(asdict(progress), indent=2) + "\n")
    keep = {progress.step, progress.best_step}
    for step, old in _all(folder).items():
        if step not in keep:
            shutil.rmtree(old, ignore_errors=True)
    return path


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    found = _all(folder)
    return found[max(found)] if found else None


def at_step(folder: Path, step: int) -> Path:
    """The checkpoint folder of `step`."""
    return folder / f"step-{step:06d}"


def read_progress(checkpoint: Path) -> Progress:
    """Reads `progress.json`. Raises: TrainingError: the file is missing or damaged."""
    try:
        return Progress(**json.loads((checkpoint / "progress.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{checkpoint}: not a usable checkpoint: {error}") from error


def restore_optimizer(
    checkpoint: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Restores AdamW's moments. Raises: TrainingError: they belong to other parameters."""
    moments = read_moments(checkpoint, parameters, progress)
    for key, parameter in parameters.items():
        if f"{key}.{MOMENTS[0]}" not in moments:  # the model never called this layer, so it has no moments
            continue
        state: dict[str, torch.Tensor] = {
            moment: moments[f"{key}.{moment}"].to(parameter.device) for moment in MOMENTS
        }
        state["step"] = torch.tensor(float(progress.optimizer_steps), device=parameter.device)
        optimizer.state[parameter] = state


def read_moments(checkpoint: Path, parameters: Iterable[str], progress: Progress) -> dict[str, torch.Tensor]:
    """Reads AdamW's moments. Raises: TrainingError: they belong to other parameters."""
    try:
        moments = load_file(checkpoint / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{checkpoint}: cannot read the optimizer's state: {error}") from error
    odd = sorted(set(moments) - {f"{key}.{moment}" for key in parameters for moment in MOMENTS})
    if odd or (progress.optimizer_steps and not moments):
        fault = f'belongs to other parameters, for example "{odd[0]}"' if odd else "is empty"
        raise TrainingError(f"{checkpoint}: the optimizer's state {fault}")
    return moments


def _all(folder: Path) -> dict[int, Path]:
    """Complete checkpoints by step. A folder with a temporary name starts with a dot and does not count."""
    return {int(p.name.removeprefix("step-")): p for p in folder.glob("step-*") if (p / "progress.json").exists()}
