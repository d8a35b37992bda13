"""Checkpoints: the complete state of a run, so that a resumed run equals the uninterrupted one to the bit. No pickle.

A checkpoint is a folder `checkpoints/step-000120/`. It holds the adapter in PEFT format, so it can be used directly,
AdamW's moments in `optimizer.safetensors`, and `progress.json`. The data need no state: an epoch's rows follow from
the seed, dropout from seed and step. Folders appear whole or not at all.

`manifest.json` has the run, the step and the hash of every file. A checkpoint is used only if all of them agree. So a
flipped bit, tensors of another run, or a folder with a wrong number is found before it is used. Three checkpoints are
kept: the newest, the one before it, and the best on held-out data. If the newest is damaged, the one before is used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from transformers import PreTrainedModel

from loratune import atomic, foreign, manifest
from loratune.errors import LoratuneError, TrainingError
from loratune.lora.files import WEIGHTS_FILE, save
from loratune.lora.peft_config import CONFIG_FILE

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments in an optimizer's state and in files."""

OPTIMIZER_FILE, PROGRESS_FILE = "optimizer.safetensors", "progress.json"
_FILES = (CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE, PROGRESS_FILE)


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
    skipped_in_a_row: int = 0
    """Consecutive skipped steps up to `step`."""


def write(
    folder: Path,
    model: PreTrainedModel,
    name: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    run_id: str = "",
) -> Path:
    """Saves a checkpoint as `folder/step-NNNNNN` and removes all others but the best and the one before.

    Raises: OutputError: the disk is full or read-only; earlier checkpoints are then unchanged.
    """
    moments = {
        f"{key}.{moment}": optimizer.state[parameter][moment]
        for key, parameter in parameters.items()
        for moment in MOMENTS
        if parameter in optimizer.state
    }
    return write_parts(folder, lambda place: save(model, place, name=name, overwrite=True), moments, progress, run_id)


def write_parts(
    folder: Path,
    save_adapter: Callable[[Path], None],
    moments: Mapping[str, torch.Tensor],
    progress: Progress,
    run_id: str = "",
) -> Path:
    """`write` for an adapter that is not attached to the model, such as one in a bank.

    Args:
        run_id: of the run, for the manifest.
        save_adapter: writes the adapter into the given folder.
        moments: AdamW's moments as "PARAMETER.exp_avg" and "PARAMETER.exp_avg_sq".
    """
    path = at_step(folder, progress.step)
    with atomic.new_directory(path, overwrite=True) as temporary:
        save_adapter(temporary)
        contiguous = {key: moment.contiguous() for key, moment in moments.items()}
        atomic.write_bytes(temporary / OPTIMIZER_FILE, to_bytes(contiguous))
        atomic.write_text(temporary / PROGRESS_FILE, atomic.to_json(asdict(progress)))
        _write_manifest(temporary, run_id, progress.step)
    found = all_in(folder)
    before = max((step for step in found if step < progress.step), default=None)
    for step, old in found.items():
        if step not in (progress.step, before, progress.best_step):
            shutil.rmtree(old, ignore_errors=True)
    return path


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """True if no value is infinite or NaN. Waits for the device."""
    checks = [tensor.isfinite().all() for tensor in tensors]
    return not checks or bool(torch.stack(checks).all())


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, intact or not, or None."""
    found = all_in(folder)
    return found[max(found)] if found else None


def newest_intact(folder: Path, run_id: str | None = None) -> tuple[Path | None, list[str]]:
    """The intact checkpoint with the most steps, and one line for each newer checkpoint that is not intact.

    Args:
        run_id: of the run that owns `folder`; None accepts any.
    """
    faults: list[str] = []
    for _, path in sorted(all_in(folder).items(), reverse=True):
        fault = fault_of(path, run_id)
        if fault is None:
            return path, faults
        faults.append(f"{path}: {fault}")
    return None, faults


def fault_of(checkpoint: Path, run_id: str | None = None) -> str | None:
    """The reason not to use a checkpoint; None if it is intact. Reads and hashes all its files."""
    try:
        found = manifest.read(checkpoint)
    except ValueError:
        return f"{manifest.FILE} is damaged"
    if found is None:
        return f"has no {manifest.FILE}, so it is not complete"
    if run_id is not None and found.run != run_id:
        return "belongs to another run"
    if found.step != _step_of(checkpoint):
        return f"is of step {found.step}, unlike its name"
    return found.fault_in(checkpoint, dict.fromkeys((*_FILES, *found.files)))


def adopt(folder: Path) -> bool:
    """Writes the manifests of checkpoints from before there were manifests, with an empty run id.

    A checkpoint gets one if its step is the one in its name and its tensors can be read.

    Returns: False if a manifest names a run, so that no checkpoint is changed.
    """
    found = all_in(folder)
    if any(_names_a_run(path) for path in found.values()):
        return False
    for step, path in found.items():
        try:
            readable = read_progress(path).step == step
            for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
                load_file(path / name)
        except (LoratuneError, OSError, SafetensorError):
            continue
        if readable and (path / CONFIG_FILE).is_file() and not (path / manifest.FILE).exists():
            _write_manifest(path, "", step)
    return True


def at_step(folder: Path, step: int) -> Path:
    """The checkpoint folder of `step`."""
    return folder / f"step-{step:06d}"


def read_progress(checkpoint: Path) -> Progress:
    """Reads `progress.json`. Raises: TrainingError: the file is missing or damaged."""
    try:
        return Progress(**json.loads(foreign.regular(checkpoint / PROGRESS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TrainingError(f"{checkpoint}: not a usable checkpoint: {error}") from error


def resumed_progress(checkpoint: Path, run_id: str | None = None) -> Progress:
    """`read_progress` without a best step whose own checkpoint is not intact: a later evaluation is then the best."""
    progress = read_progress(checkpoint)
    if lost_best(checkpoint, progress, run_id) is None:
        return progress
    return replace(progress, best_step=None, best_eval_loss=None)


def lost_best(checkpoint: Path, progress: Progress, run_id: str | None = None) -> str | None:
    """The fault of the best step's checkpoint beside `checkpoint`, or None."""
    if progress.best_step is None or progress.best_step == progress.step:
        return None
    best = at_step(checkpoint.parent, progress.best_step)
    fault = fault_of(best, run_id)
    return None if fault is None else f"{best}: {fault}"


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
        moments = load_file(checkpoint / OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{checkpoint}: cannot read the optimizer's state: {error}") from error
    odd = sorted(set(moments) - {f"{key}.{moment}" for key in parameters for moment in MOMENTS})
    if odd or (progress.optimizer_steps and not moments):
        fault = f'belongs to other parameters, for example "{odd[0]}"' if odd else "is empty"
        raise TrainingError(f"{checkpoint}: the optimizer's state {fault}")
    return moments


def all_in(folder: Path) -> dict[int, Path]:
    """Checkpoint folders by step, intact or not. Other names, such as copies and temporary folders, do not count."""
    found = {_step_of(path): path for path in folder.glob("step-*") if path.is_dir()}
    return {step: path for step, path in found.items() if step is not None}


def _write_manifest(checkpoint: Path, run_id: str, step: int) -> None:
    names = {file.name for file in checkpoint.iterdir() if file.is_file()} - {manifest.FILE}
    manifest.write(checkpoint, run_id, step, names)


def _names_a_run(checkpoint: Path) -> bool:
    """True if there is a manifest that is not `adopt`'s, also if it is damaged."""
    try:
        found = manifest.read(checkpoint)
    except ValueError:
        return True
    return found is not None and bool(found.run)


def _step_of(path: Path) -> int | None:
    """The step in a checkpoint's name, which `at_step` makes; None for any other name."""
    number = path.name.removeprefix("step-")
    known = re.fullmatch("[0-9]{6,18}", number) and path.name == at_step(path.parent, int(number)).name
    return int(number) if known else None
