"""Several adapters combined into one ordinary adapter, and one adapter resized to another rank. Files in, files out.

The methods have the names and results of PEFT's `add_weighted_adapter`. With u = weight · scaling of an adapter:

- "cat" is the weighted sum itself, Σ u B A, exact: ranks add up. "svd" is the nearest update of a given rank to it.
- "linear" adds A and B separately, (Σ √u B)(Σ √u A). That is cheap. It also contains products B_i A_j of different
  adapters, which nobody trained, so it makes sense for adapters that started from the same weights.
- "magnitude_prune" keeps the largest share `density` of the values, "dare_linear" a random share, rescaled; then both
  proceed as "linear". "ties" keeps the largest share, elects a sign for each value, and averages the adapters with
  that sign; "dare_ties" does the same with a random share.
- With "_svd" at the end the same is done to the full update of each adapter, B A, instead of to A and B, and the
  result is cut to a rank. This forms (d_out, d_in) for one layer at a time; no other method does.

The methods that treat A and B separately need equal ranks in a layer; the others do not. An adapter without a layer
has a zero update there. rsLoRA and patterns are part of the scaling. PEFT 0.21 gets this wrong for results of rsLoRA
adapters: they come out √r too large.

Sources: Ilharco et al. 2022, arXiv:2212.04089 (weighted sums); Yadav et al. 2023, arXiv:2306.01708 (TIES); Yu et al.
2023, arXiv:2311.03099 (DARE); PEFT 0.21 for names, defaults and the order of random draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.adapters.lowrank import LowRank, decompose, decompose_product
from loratune.adapters.updates import (
    AdapterUpdates,
    Update,
    check_out,
    check_rank,
    narrow_line,
    read_updates,
    same_base,
    selection_fields,
    to_device,
    write_updates,
)
from loratune.config import CombineMethod, MajoritySign
from loratune.errors import AdapterError, ConfigError
from loratune.version import __version__

DENSITY = 0.5
"""Default share of the values that pruning keeps."""


@dataclass(frozen=True)
class CombineRecipe:
    """Method of combining, and its parameters."""

    method: CombineMethod = "cat"
    rank: int | None = None
    """Rank of the result of "svd" and "..._svd"; by default the largest rank of the adapters."""
    density: float | None = None
    """Share of the values kept by ties, dare and magnitude_prune; by default `DENSITY`."""
    majority_sign: MajoritySign = "total"
    """Rule by which ties elects a sign: the sum of the values, or the number of positive and negative values."""
    seed: int = 0
    """Seed of dare's random draws."""

    def __post_init__(self) -> None:
        if self.rank is not None and (self.rank < 1 or not self.cuts):
            hint = '"cat" adds the ranks up' if self.method == "cat" else "the others keep theirs"
            why = "a rank is at least 1" if self.cuts else f'it is for "svd" and "..._svd" only ({hint})'
            raise ConfigError(f'rank {self.rank} with method "{self.method}": {why}')
        if self.density is not None and not self.prunes:
            raise ConfigError(f'density is for ties, dare and magnitude_prune; method "{self.method}" prunes nothing')
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density is {self.density}; it is the share of values kept, 0 < density <= 1")

    @property
    def cuts(self) -> bool:
        """True if the result is cut to a rank."""
        return self.method.endswith("svd")

    @property
    def prunes(self) -> bool:
        """True if values are dropped."""
        return self.method.startswith(("ties", "dare", "magnitude"))


@dataclass(frozen=True)
class Combined:
    """Report of `combine` or `resize`; `print` it."""

    path: Path
    sources: dict[str, float]
    """Folder -> weight."""
    recipe: CombineRecipe
    rank: int
    layers: int
    error: float | None = None
    """Relative Frobenius error of all layers together; None for methods that do not cut to a rank."""
    errors: dict[str, float] = field(default_factory=dict)
    """Path of a layer -> its relative Frobenius error."""
    narrow: tuple[str, ...] = ()
    """Layers in which the rank adds nothing, because their smaller side is below it."""

    def __str__(self) -> str:
        parts = " + ".join(f"{weight:g} x {Path(folder).name}" for folder, weight in self.sources.items())
        lines = [f"{self.path}: {parts}, {self.recipe.method}: rank {self.rank}, {self.layers} layers"]
        if self.error is not None:
            worst = max(self.errors, key=lambda path: self.errors[path])
            lines.append(
                f"  rank {self.rank} leaves out {self.error:.2%} of it (Frobenius norm); most at {worst}, "
                f"{self.errors[worst]:.2%}"
            )
        return "\n".join(lines + narrow_line(self.rank, self.narrow))


def combine(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: CombineMethod = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
    seed: int = 0,
    model: str | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> Combined:
    """Combines the adapters in `folders` into one and writes it to `out`, in PEFT's format.

    Args:
        weights: one for each folder, any sign; by default 1 each, the plain sum of the updates.
        rank, density, majority_sign, seed: as in `CombineRecipe`.
        model: the base model of all, if they record different names for it.
        device: device of the computation.

    Raises:
        ConfigError: a value is out of range or does not go with the method.
        AdapterError: a folder holds no adapter; adapters of different models; ranks that the method cannot mix;
            modules trained in full, which cannot be summed.
        OutputError: `out` is taken or cannot be written.
    """
    recipe = CombineRecipe(method, rank, density, majority_sign, seed)
    named = _weights(folders, weights)
    target = check_out(out, folders, overwrite=overwrite)
    sources = [read_updates(folder) for folder in folders]
    for source in sources:
        if source.others:
            raise AdapterError(
                f"{source.folder}: has modules or biases trained in full ({next(iter(source.others))}); only "
                "low-rank updates can be combined"
            )
    base = same_base(sources, model)
    on = torch.device(device)
    shapes = {path: update.shape for source in sources for path, update in source.layers.items()}
    narrow = check_rank(rank, shapes) if rank is not None else []
    parts = [({path: to_device(u, on) for path, u in source.layers.items()}, w) for source, w in _zip(sources, named)]
    layers, errors, error = combine_layers(parts, recipe)
    fields = sources[0].fields | selection_fields(sources, layers) | {"base_model_name_or_path": base}
    report = _report("combine", named, error, errors) | {"recipe": vars(recipe)}
    written = write_updates(target, layers, fields, report, overwrite=overwrite)
    return Combined(target, named, recipe, written, len(layers), error, errors, tuple(narrow))


def resize(
    folder: str | Path, out: str | Path, rank: int, *, device: str | torch.device = "cpu", overwrite: bool = False
) -> Combined:
    """Writes the adapter in `folder` with another rank to `out`: the nearest update of that rank, layer by layer.

    A larger rank is the same update up to rounding. The additional rows of A are random and the additional columns
    of B zero, as in a new adapter, so that they can be trained. Modules and biases trained in full are copied.

    Raises: ConfigError: the rank is below 1 or above the smaller side of every layer. AdapterError: no adapter.
        OutputError: `out` is taken or cannot be written.
    """
    target = check_out(out, [folder], overwrite=overwrite)
    source = read_updates(folder)
    narrow = check_rank(rank, {path: update.shape for path, update in source.layers.items()})
    generator = torch.Generator().manual_seed(0)
    layers, missed, norms = {}, {}, {}
    for path, update in source.layers.items():
        here = to_device(update, torch.device(device))
        found = decompose_product(here.lora_A, here.lora_B * here.scaling)
        lora_A, lora_B = found.factors(rank)
        _make_trainable(lora_A, lora_B, found.significant, generator)
        layers[path] = replace(update, lora_A=lora_A, lora_B=lora_B, scaling=1.0)
        missed[path], norms[path] = found.error(rank), found.norm
    errors, error = _relative(missed, norms)
    report = _report("resize", {str(folder): 1.0}, error, errors) | {"rank": rank}
    write_updates(target, layers, source.fields, report, others=source.others, overwrite=overwrite)
    recipe, sources = CombineRecipe("svd", rank), {str(folder): 1.0}
    return Combined(target, sources, recipe, rank, len(layers), error, errors, tuple(narrow))


def _make_trainable(lora_A: Tensor, lora_B: Tensor, used: int, generator: torch.Generator) -> None:
    """Re-initialises the ranks after the first `used`: A random, B zero. Both zero could never learn."""
    fresh = 2 * torch.rand(lora_A[used:].shape, generator=generator) - 1
    lora_A[used:] = (fresh / math.sqrt(lora_A.shape[1])).to(lora_A)
    lora_B[:, used:] = 0


def combine_layers(
    parts: Sequence[tuple[Mapping[str, Update], float]], recipe: CombineRecipe
) -> tuple[dict[str, Update], dict[str, float], float | None]:
    """Combines updates in memory. Layers draw random numbers in the order of the first adapter that has them.

    Args:
        parts: the layers of each adapter, and its weight.

    Returns: the layers; if the method cuts to a rank, the relative Frobenius error of each, and of all together.
    Raises: AdapterError: as `combine`.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    paths = list(dict.fromkeys(path for layers, _ in parts for path in layers))
    rank = recipe.rank or max(update.r for layers, _ in parts for update in layers.values())
    combined, missed, norms = {}, {}, {}
    for path in paths:
        members = [(layers[path], weight) for layers, weight in parts if path in layers]
        _check_layer(path, [update for update, _ in members], recipe)
        if recipe.method == "cat":
            lora_A, lora_B = _concatenated(members)
        elif recipe.cuts:
            found = _decomposed(members, recipe, rank, generator)
            missed[path], norms[path] = found.error(rank), found.norm
            lora_A, lora_B = found.factors(rank)
        else:
            lora_A, lora_B = _merged_factors(members, recipe, generator)
        combined[path] = replace(members[0][0], lora_A=lora_A, lora_B=lora_B, scaling=1.0)
    errors, error = _relative(missed, norms)
    return combined, errors, error if recipe.cuts else None


def _check_layer(path: str, updates: Sequence[Update], recipe: CombineRecipe) -> None:
    shapes = sorted({update.shape for update in updates})
    if len(shapes) > 1:
        raise AdapterError(
            f'layer "{path}" is {shapes[0]} in one adapter and {shapes[1]} in another (d_out, d_in); they were made '
            "for different models"
        )
    ranks = sorted({update.r for update in updates})
    if len(ranks) > 1 and recipe.method != "cat" and not recipe.cuts:
        svd = "svd" if recipe.method == "linear" else f"{recipe.method}_svd"
        raise AdapterError(
            f'method "{recipe.method}" adds A and B separately and needs equal ranks, but layer "{path}" has '
            f'{" and ".join(map(str, ranks))}; use "{svd}", "cat", or loratune resize first'
        )


def _concatenated(members: Sequence[tuple[Update, float]]) -> tuple[Tensor, Tensor]:
    """A (sum of r, d_in) and B (d_out, sum of r) whose product is the weighted sum."""
    lora_A = torch.cat([update.lora_A * (weight * update.scaling) for update, weight in members])
    return lora_A, torch.cat([update.lora_B for update, _ in members], dim=1)


def _decomposed(
    members: Sequence[tuple[Update, float]], recipe: CombineRecipe, rank: int, generator: torch.Generator
) -> LowRank:
    """The combined full update of one layer. The weighted sum is decomposed from its factors."""
    if recipe.method == "svd":
        return decompose_product(*_concatenated(members))
    full = [(update.lora_B @ update.lora_A) * update.scaling for update, _ in members]
    transposed = members[0][0].transposed  # draw in the order of the stored weight, as PEFT does
    stored = [delta.T for delta in full] if transposed else full
    merged = _merged(stored, [weight for _, weight in members], recipe, generator)
    return decompose(merged.T if transposed else merged, rank)


def _merged_factors(
    members: Sequence[tuple[Update, float]], recipe: CombineRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A and B combined separately, each with the root of weight and scaling; a negative sign goes to A."""
    factors = [weight * update.scaling for update, weight in members]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    lora_A = _merged([update.lora_A for update, _ in members], signed, recipe, generator)
    return lora_A, _merged([update.lora_B for update, _ in members], roots, recipe, generator)


def _merged(
    tensors: Sequence[Tensor], factors: Sequence[float], recipe: CombineRecipe, generator: torch.Generator
) -> Tensor:
    """Several tensors of one shape pruned, weighted, and summed or averaged by elected sign."""
    density = recipe.density or DENSITY
    if recipe.method.startswith(("ties", "magnitude")):
        tensors = [_keep_largest(tensor, density) for tensor in tensors]
    elif recipe.method.startswith("dare"):
        tensors = [_keep_random(tensor, density, generator) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    weighted = stacked * torch.tensor(factors).to(stacked).view(-1, *[1] * tensors[0].dim())
    if "ties" not in recipe.method:
        return weighted.sum(dim=0)
    agrees = _has_majority_sign(stacked, recipe.majority_sign)
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def _keep_largest(tensor: Tensor, density: float) -> Tensor:
    """The largest share of the values by magnitude, zeros elsewhere (TIES: trim)."""
    if density >= 1:
        return tensor
    values = tensor.flatten()
    kept = values.abs().topk(int(density * values.numel())).indices
    return torch.zeros_like(values).index_copy_(0, kept, values[kept]).view_as(tensor)


def _keep_random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """A random share of the values, divided by `density`; zeros elsewhere (DARE: drop and rescale)."""
    if density >= 1:
        return tensor
    kept = torch.bernoulli(torch.full(tensor.shape, density), generator=generator)
    return tensor * kept.to(tensor) / density


def _has_majority_sign(stacked: Tensor, method: MajoritySign) -> Tensor:
    """True where a stacked value has the sign elected for its place (TIES: elect); a tie elects plus."""
    signs = stacked.sign()
    votes = (stacked if method == "total" else signs).sum(dim=0)
    return signs == torch.where(votes >= 0, 1, -1)


def _weights(folders: Sequence[str | Path], weights: Sequence[float] | None) -> dict[str, float]:
    if not folders:
        raise ConfigError("no adapters given to combine")
    given = [1.0] * len(folders) if weights is None else list(weights)
    if len(given) != len(folders):
        raise ConfigError(f"{len(given)} weights for {len(folders)} adapters; give one for each")
    if not all(map(math.isfinite, given)):
        raise ConfigError(f"weights {given}: they must be finite")
    named = {str(folder): weight for folder, weight in zip(folders, given, strict=True)}
    if len(named) < len(folders):
        raise ConfigError("an adapter is given twice; give it once with the sum of the weights")
    return named


def _zip(sources: Sequence[AdapterUpdates], named: Mapping[str, float]) -> list[tuple[AdapterUpdates, float]]:
    return list(zip(sources, named.values(), strict=True))


def _relative(missed: Mapping[str, float], norms: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Frobenius error over norm, for each layer and for all together."""
    errors = {path: missed[path] / norms[path] if norms[path] else 0.0 for path in missed}
    norm = math.hypot(*norms.values())
    return errors, math.hypot(*missed.values()) / norm if norm else 0.0


def _report(
    verb: str, sources: Mapping[str, float], error: float | None, errors: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "made_by": f"loratune {verb}",
        "version": __version__,
        "sources": dict(sources),
        "relative_error": error,
        "relative_errors": dict(errors),
    }
