"""A merged checkpoint that is verified to be base + adapter: written, loaded again, compared, and then renamed.

A base that is quantised in memory is written dense, each weight with the value that its codes represent, because the
adapter was trained on those values. The original weights, before quantisation, are a different base.

Merging is one addition, but a checkpoint can still be wrong: a tied weight saved twice, a key renamed, a module
omitted, an update lost below the resolution of bfloat16. So the folder is loaded again as any user would load it,
and its logits on real prompts are compared with the logits of base + adapter from before the merge.

How large may the difference be? A tolerance from a table would be too strict for a deep model and far too loose for
a shallow one. Instead the effect of rounding is measured on the checkpoint itself. Every weight that was rounded (the
merged weights, and all that a narrower dtype changed) is moved by an error like that of rounding: -1, 0 or +1 unit in
the last place with probability 1/24, 11/12, 1/24, which has the variance of a rounding error, 1/12 unit². The
resulting change of the logits is the effect of rounding. A correct merge differs from base + adapter by one such
error and by the arithmetic of two forwards, and the moved checkpoint differs from the unmoved one by the same. So the
ratio of their root mean squares is near one. It also depends on the order of summation, W x + s B (A x) against
(W + s B A) x: 0.7 to 1.7 over the fourteen small architectures of the tests, in float32, bfloat16, and float32
rounded to bfloat16 and float16. `SLACK` allows 4. In float32 files, activations round as coarsely as weights, and the
ratio reaches 5 (Gemma 2, transformers 5.17), so `FLOAT32_SLACK` allows 16, which is still 1e-6 of the weights. Single
logits scatter more, so for the largest difference, which would show a fault in a few tokens only, it is squared.

A correct mixture of experts may be refused, if rounding sends a token to another expert in one of the two forwards
and not in the other (one of 112 merges in that survey).
"""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from loratune import atomic
from loratune.data import prompting
from loratune.data.prompting import PromptForm
from loratune.errors import DataError, ModelError, OutputError
from loratune.export.dtypes import FileDtypes, check_written, dtypes_of_files, record_dtype
from loratune.export.generation import generation_set_aside, record_generation
from loratune.lora.inject import activate, active, merge, unmerge
from loratune.lora.state import require
from loratune.precision.finite import fault_of, overflow
from loratune.precision.linear import count_parameters, dense_state_dict, quantised_layers
from loratune.units import size

SLACK = 4.0
"""Largest allowed ratio of the difference to the measured effect of rounding, as root mean squares; see above."""

FLOAT32_SLACK = 16.0
"""`SLACK` for files in float32."""

_MAX_LOGITS = 1 << 26
"""Number of logits compared: 256 MiB in float32, 440 positions of a vocabulary of 152,000."""

_CHUNK = 1 << 22  # weights moved at once

_FLOAT32_EPS = 2.0**-23  # transformers computes norms and rotations in float32, also of a float64 model


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of two sets of logits."""

    largest: float
    rms: float


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of the comparison of the reloaded checkpoint with base + adapter."""

    difference: Difference
    """Difference between the merged checkpoint and base + adapter."""
    rounding: Difference
    """Difference caused by moving the rounded weights by a rounding error."""
    adapter_effect: Difference
    """Difference between base + adapter and the bare base, which the merge must preserve."""
    largest_logit: float
    top1_agreement: float
    """Share of positions at which both models have the same most likely token."""
    positions: int
    slack: float = SLACK
    """Allowed ratio of the root mean squares of `difference` and `rounding`."""

    @property
    def allowed(self) -> Difference:
        """Largest difference that rounding explains."""
        floor = _FLOAT32_EPS * self.largest_logit
        return Difference(self.slack**2 * self.rounding.largest + floor, self.slack * self.rounding.rms + floor)

    @property
    def passed(self) -> bool:
        """True if rounding explains the difference. False for a difference that is not a number."""
        return self.difference.largest <= self.allowed.largest and self.difference.rms <= self.allowed.rms

    @property
    def adapter_survives(self) -> bool:
        """True if the adapter changes the logits more than rounding does. If not, the merge may lose it."""
        return self.adapter_effect.rms > self.rounding.rms


@dataclass(frozen=True, slots=True)
class Merged:
    """A verified checkpoint; `print` it."""

    path: Path
    dtype: str
    file_bytes: int
    verification: Verification
    dequantised: int = 0
    """Number of layers that are quantised in memory, and dense with the same values in the checkpoint."""

    def __str__(self) -> str:
        v = self.verification
        rows = {
            "merged and unmerged": v.difference,
            "rounding explains": v.allowed,
            "the adapter's effect": v.adapter_effect,
        }
        lines = [
            f"{self.path}: merged checkpoint, {size(self.file_bytes)} in {self.dtype}, loaded again and verified",
            f"  {'difference in logits':<22}{'largest':>9}{'rms':>10}",
            *(f"  {name:<22}{row.largest:>9.2g}{row.rms:>10.2g}" for name, row in rows.items()),
            f"  same most likely token at {v.top1_agreement:.2%} of {v.positions:,} positions",
        ]
        if self.dequantised:
            lines.append(
                f"  {self.dequantised} quantised layers of the base are dense, with equal values, in the checkpoint"
            )
        if not v.adapter_survives:
            lines.append(f"  note: rounding to {self.dtype} changes more than the adapter does; merge in float32")
        return "\n".join(lines)


def merge_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    out: str | Path,
    *,
    prompts: Sequence[Sequence[int]],
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    keep_adapter: bool = True,
    sources: Collection[Path] = (),
    card: Callable[[Verification], str] | None = None,
    forms: Sequence[PromptForm] = (),
) -> Merged:
    """Writes base + adapter `name` as an ordinary checkpoint with its tokenizer, and verifies it.

    Args:
        model: the base with the adapter attached; unchanged afterwards, unless keep_adapter is False.
        prompts: token ids of real prompts; a dozen is enough. The last positions of each are compared.
        dtype: dtype of the weights on disk; by default each tensor's dtype in the base's own files.
        keep_adapter: False merges irreversibly, which needs no second copy of the adapted layers while writing.
        sources: folders that must not be overwritten, such as the adapter's own; the base's folder is always one.
        card: makes README.md from the verification.
        forms: of the adapter's training data, stored for `chat`.

    Memory: the model, and in addition first the weights in `dtype` if it differs, then the reloaded model.
    Raises:
        OutputError: `out` exists, is an input, or cannot hold the checkpoint.
        AdapterError: the adapter is unknown or cannot be merged, for example because a head is tied.
        DataError: no prompts.
        ModelError: a tensor holds NaN or infinity, or overflows its dtype; the reloaded checkpoint differs by more
            than rounding explains. `out` is then not written.
    """
    folder = Path(out)
    _check_prompts(prompts)
    _check_destination(model, folder, overwrite, sources)
    adapter = require(model).get(name)
    dtypes = dtypes_of_files(model) if dtype is None else FileDtypes(dtype)
    dequantised = len(list(quantised_layers(model)))
    _check_space(model, folder, dtypes.main)
    reference, adapter_effect = _reference(model, name, prompts)
    rounded = {f"{path}.{weights.kind.weight_name}" for path, weights in adapter.layers.items()}
    with atomic.new_directory(folder, overwrite=overwrite) as temporary:
        merge(model, name, reversible=keep_adapter)
        try:
            rounded |= _write(model, tokenizer, temporary, dtypes)
        finally:
            if keep_adapter:
                unmerge(model)
        verification = _verify(model, temporary, prompts, reference, adapter_effect, rounded, dtypes)
        if not verification.passed:
            raise ModelError(_refusal(folder, verification))
        if card is not None:
            (temporary / "README.md").write_text(card(verification), encoding="utf-8")
        prompting.write(temporary, forms)
        file_bytes = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
    return Merged(folder, str(dtypes.main).removeprefix("torch."), file_bytes, verification, dequantised)


def _reference(
    model: PreTrainedModel, name: str, prompts: Sequence[Sequence[int]]
) -> tuple[list[Tensor], Difference]:
    """The logits of base + adapter, and their difference to the bare base's. The model is unchanged afterwards."""
    before = active(model)
    try:
        activate(model, name)
        reference = _logits(model, prompts)
        activate(model, None)
        return reference, _difference(_logits(model, prompts), reference)
    finally:
        activate(model, before)


def _verify(
    model: PreTrainedModel,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    reference: list[Tensor],
    adapter_effect: Difference,
    rounded: Collection[str],
    dtypes: FileDtypes,
) -> Verification:
    """Loads the folder in the precision of the reference, and compares."""
    merged = _reload(model, folder)
    logits = list(_logits(merged, prompts))
    same_first = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(logits, reference, strict=True))
    positions = sum(len(part) for part in reference)
    difference = _difference(logits, reference)
    _add_rounding_errors(merged, rounded, dtypes)
    return Verification(
        difference=difference,
        rounding=_difference(_logits(merged, prompts), logits),
        adapter_effect=adapter_effect,
        largest_logit=max(float(part.abs().max()) for part in reference),
        top1_agreement=same_first / positions,
        positions=positions,
        slack=FLOAT32_SLACK if dtypes.main == torch.float32 else SLACK,
    )


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtypes: FileDtypes) -> set[str]:
    """Writes checkpoint and tokenizer; returns the names of tensors that `dtypes` do not represent exactly."""
    tensors, inexact = _cast(dense_state_dict(model), model.dtype, dtypes)
    check_written(model, tensors, "the merged checkpoint")
    try:
        with generation_set_aside(model):
            model.save_pretrained(folder, state_dict=tensors)
        tokenizer.save_pretrained(folder)
        record_generation(folder, model, tokenizer)
    except SafetensorError as error:  # raised by its Rust code for a full disk
        raise OutputError(f"{folder}: the weights cannot be written: {error}") from error
    except ValueError as error:
        raise ModelError(f"{type(model).__name__} cannot be saved: {error}") from error
    record_dtype(folder, dtypes.main)
    return inexact


def _cast(tensors: dict[str, Tensor], source: torch.dtype, dtypes: FileDtypes) -> tuple[dict[str, Tensor], set[str]]:
    """Casts tensors of dtype `source` to the dtypes of the files; others (deliberately float32, integers) stay.

    Tied entries stay tied: each storage is cast once. Returns the tensors, and the names of tensors that the cast
        changed.
    """
    cast: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
    result: dict[str, Tensor] = {}
    inexact: set[str] = set()
    for name, tensor in tensors.items():
        target = dtypes.of(name)
        if tensor.dtype != source or source == target:
            result[name] = tensor
            continue
        key = (tensor.data_ptr(), tensor.shape, target)
        if key not in cast:
            cast[key] = tensor.to(target)
            if fault_of(cast[key]) and not fault_of(tensor):
                raise ModelError(
                    f"{name}: a value of the merged weights is too large: {overflow(target)}. Nothing is written; "
                    "merge with --precision bfloat16 or float32"
                )
        result[name] = cast[key]
        if not torch.equal(cast[key].to(source), tensor):
            inexact.add(name)
    return result, inexact


def _reload(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Loads the checkpoint as a user would, in the precision and on the device of `model`."""
    try:
        loaded: Any = type(model).from_pretrained(
            folder,
            dtype=model.dtype,
            device_map={"": model.device},
            attn_implementation=_attention(model),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the merged checkpoint does not load again: {error}") from error
    merged, report = loaded
    lost = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind])
    if lost:
        raise ModelError(f"the merged checkpoint does not load again: {len(lost)} tensors differ, first {lost[0]}")
    result: PreTrainedModel = merged.requires_grad_(False).eval()
    return result


@torch.inference_mode()
def _attention(model: PreTrainedModel) -> dict[str, str | None]:
    """Attention of the model and of each of its parts, which may have only one of their own."""
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    return {"": model.config._attn_implementation} | {
        name: part._attn_implementation for name, part in parts.items() if isinstance(part, PreTrainedConfig)
    }


@torch.no_grad()
def _logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each prompt's last positions, (positions, V), on the CPU, in float32, or float64 if the model is."""
    keep = max(1, _MAX_LOGITS // (len(prompts) * int(model.config.get_text_config().vocab_size)))
    only_last = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    accurate = torch.float64 if model.dtype == torch.float64 else torch.float32
    parts = []
    for prompt in prompts:
        tokens = torch.tensor([list(prompt)], device=model.device)
        logits = model(input_ids=tokens, use_cache=False, **only_last).logits[0, -keep:]
        parts.append(logits.to("cpu", accurate))
    return parts


def _difference(some: Iterable[Tensor], others: Iterable[Tensor]) -> Difference:
    largest, squares, count = 0.0, 0.0, 0
    for a, b in zip(some, others, strict=True):
        gap = (a - b).abs()
        part = float(gap.max())
        largest = part if not part <= largest else largest  # so that NaN wins
        squares += float(gap.double().square().sum())
        count += gap.numel()
    return Difference(largest, math.sqrt(squares / count))


@torch.no_grad()
def _add_rounding_errors(model: PreTrainedModel, names: Collection[str], dtypes: FileDtypes) -> None:
    """Moves the named weights by random rounding errors; see the top of this file."""
    generator = torch.Generator(model.device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        eps = max(torch.finfo(dtypes.of(name)).eps, torch.finfo(parameter.dtype).eps)
        for part in parameter.data.view(-1).split(_CHUNK):
            mantissa, exponent = torch.frexp(part.double() if part.dtype == torch.float64 else part.float())
            unit = torch.ldexp(torch.full_like(mantissa, eps), exponent - 1)
            place = torch.rand(part.shape, generator=generator, device=part.device)
            steps = (place < 1 / 24).to(torch.int8) - (place >= 23 / 24).to(torch.int8)
            part.add_((unit * steps).to(part.dtype))


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    if not prompts or not all(prompts):
        raise DataError("a merge is verified on real prompts; give at least one, none of them empty")


def _check_destination(model: PreTrainedModel, folder: Path, overwrite: bool, sources: Collection[Path]) -> None:
    atomic.check_new(folder, overwrite=overwrite)
    inputs = [*sources, *([Path(model.name_or_path)] if model.name_or_path else [])]
    for source in inputs:
        if source.exists() and source.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{folder}: would overwrite {source}, which the merge reads; choose another place")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise OutputError(f"{folder}: holds files that are not a checkpoint; --overwrite replaces checkpoints only")


def _check_space(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    needed = count_parameters(model) * dtype.itemsize
    parent = next(p for p in folder.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(f"{folder}: the checkpoint needs {size(needed)}, but {size(free)} are free on that disk")


def _refusal(folder: Path, v: Verification) -> str:
    return (
        f"{folder}: not written. The merged checkpoint, loaded again, differs from base + adapter by "
        f"{v.difference.largest:.3g} in a logit (root mean square {v.difference.rms:.3g}); rounding explains "
        f"{v.allowed.largest:.3g} ({v.allowed.rms:.3g}). Please report this with the model's name; the adapter "
        "itself is unharmed and can be used unmerged"
    )
