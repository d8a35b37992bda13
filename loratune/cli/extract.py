"""`loratune extract`: an adapter from the difference of two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from loratune.cli import process
from loratune.cli.common import Folder, module_names, parse


@dataclass(kw_only=True)
class ExtractArguments:
    """Make an adapter from the difference of two checkpoints, and report the error at several ranks."""

    tuned: Annotated[Positional[str], tyro.conf.arg(metavar="TUNED")]
    """The fine-tuned model: a local folder or a hub id."""
    base: str
    """The model before fine-tuning."""
    out: Folder
    """Folder for the new adapter."""
    rank: int = 32
    """Rank of the new adapter."""
    target_modules: str | list[str] = "all-linear"
    """Layers to extract, as in train."""
    device: str | None = None
    """Torch device to compute on; by default the GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that belongs to the model. It can do anything on this machine."""
    overwrite: bool = False
    """Replace an existing folder."""


def run(words: list[str]) -> None:
    """Extracts the adapter and prints the error of each rank."""
    given = parse(ExtractArguments, words, "extract")
    with process.library_imports():
        from loratune.adapters.extract import extract

    extracted = extract(
        given.tuned,
        given.base,
        given.out,
        rank=given.rank,
        target_modules=module_names(given.target_modules) or "all-linear",
        device=given.device,
        overwrite=given.overwrite,
        trust_remote_code=given.trust_remote_code,
    )
    process.console().print(str(extracted), markup=False, soft_wrap=True)
