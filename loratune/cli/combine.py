"""`loratune combine`: one adapter from several, by arithmetic on their files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loratune.cli import process
from loratune.cli.common import AdapterFolders, Folder, parse
from loratune.config import CombineMethod, MajoritySign


@dataclass(kw_only=True)
class CombineArguments:
    """Make one adapter from several: a weighted sum (exact, or of a lower rank), TIES, DARE or pruning.

    Reads adapter files only; the base model is not needed.
    """

    adapters: AdapterFolders
    """Folders of adapters of one base, in PEFT's format."""
    out: Folder
    """Folder for the new adapter."""
    weights: list[float] = field(default_factory=list)
    """One weight per adapter; by default 1 each."""
    method: CombineMethod = "cat"
    """cat: the exact sum; its rank is the sum of the ranks. svd: the best approximation of a given rank.
    The others are PEFT's methods: on A and B separately or, with _svd, on the whole updates."""
    rank: int | None = None
    """Rank of the result of svd and ..._svd; by default the largest rank of the adapters."""
    density: float | None = None
    """Share of the values that ties, dare and magnitude_prune retain; by default 0.5."""
    majority_sign: MajoritySign = "total"
    """Rule by which ties elects a sign: the sum of the values, or the number of positive and negative values."""
    seed: int = 0
    """Seed of dare's random draws."""
    model: str | None = None
    """Name of the base model, if the adapters record different names for it."""
    overwrite: bool = False
    """Replace an existing folder."""


def run(words: list[str]) -> None:
    """Combines the adapters and prints the new adapter's rank and error."""
    given = parse(CombineArguments, words, "combine")
    with process.library_imports():
        from loratune.adapters.combine import combine
        from loratune.data import prompting

    combined = combine(
        given.adapters,
        given.out,
        weights=given.weights or None,
        method=given.method,
        rank=given.rank,
        density=given.density,
        majority_sign=given.majority_sign,
        seed=given.seed,
        model=given.model,
        overwrite=given.overwrite,
    )
    prompting.write(Path(given.out), prompting.common(given.adapters))
    process.console().print(str(combined), markup=False, soft_wrap=True)
