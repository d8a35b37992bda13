"""`loratune quantise`: a 4-bit checkpoint of a model."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.cli import process
from loratune.cli.common import Folder, ModelName, parse


@dataclass(kw_only=True)
class QuantiseArguments:
    """Write a model with its linear layers in 4 bits (NF4, in bitsandbytes' format), with its tokenizer."""

    model: ModelName
    """Base model: a local folder or a hub id."""
    out: Folder
    """Folder for the 4-bit checkpoint."""
    device: str | None = None
    """Torch device to quantise on; by default the GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that belongs to the model. It can do anything on this machine."""
    overwrite: bool = False
    """Replace an existing folder."""


def run(words: list[str]) -> None:
    """Quantises the model and prints the size of the files."""
    given = parse(QuantiseArguments, words, "quantise")
    with process.library_imports():
        from loratune.base.load import load, load_tokenizer
        from loratune.export.quantised import save_quantised

    tokenizer = load_tokenizer(given.model, trust_remote_code=given.trust_remote_code)
    model = load(given.model, "nf4", given.device, trust_remote_code=given.trust_remote_code)
    saved = save_quantised(model, given.out, tokenizer, overwrite=given.overwrite)
    process.console().print(str(saved), markup=False, soft_wrap=True)
