"""`loratune merge`: a checkpoint with the adapter merged in, verified against the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loratune.cli import process
from loratune.cli.common import AdapterFolder, Folder, parse
from loratune.config import DensePrecision
from loratune.errors import ConfigError


@dataclass(kw_only=True)
class MergeArguments:
    """Write a checkpoint with the adapter merged into the weights, and verify that it equals base + adapter."""

    adapter: AdapterFolder
    """Folder of the adapter."""
    out: Folder
    """Folder for the merged checkpoint."""
    model: str | None = None
    """Base model, if it is not at the place that the adapter records."""
    chat_template: str | None = None
    """File with a Jinja chat template, instead of the one stored with the adapter."""
    data: list[str] = field(default_factory=list)
    """Files whose prompts are used for the comparison; by default the run's own data, if they still exist."""
    precision: DensePrecision = "auto"
    """Number format of the merged weights; auto is the format of the base's files."""
    trust_remote_code: bool = False
    """Run Python code that belongs to the model. It can do anything on this machine."""
    overwrite: bool = False
    """Replace an existing folder."""


def run(words: list[str]) -> None:
    """Merges, writes, reloads and compares, and prints the largest difference of the logits."""
    given = parse(MergeArguments, words, "merge")
    with process.library_imports():
        from loratune.base.load import DTYPES
        from loratune.export.merge import merge_checkpoint
        from loratune.infer.opened import open_folders
        from loratune.lora.files import read_config
        from loratune.runs.card import render_merged_card
        from loratune.runs.evaluation import real_prompts

    opened = open_folders(
        [given.adapter],
        model=given.model,
        chat_template=given.chat_template,
        trust_remote_code=given.trust_remote_code,
    )
    process.print_notes(opened.notes)
    if not opened.adapters:
        raise ConfigError(f"{given.adapter}: this is a base model; give the folder of an adapter")
    ((name, folder),) = opened.adapters.items()
    console = process.console()
    with console.status("merging, writing, reloading and comparing"):
        merged = merge_checkpoint(
            opened.model,
            opened.tokenizer,
            name,
            given.out,
            prompts=real_prompts(opened.tokenizer, opened.run, given.data),
            dtype=DTYPES.get(given.precision),
            overwrite=given.overwrite,
            keep_adapter=False,
            sources=[folder],
            forms=opened.forms.get(name, ()),
            card=lambda checked: render_merged_card(
                Path(given.out).name, opened.base, read_config(folder), opened.run, checked.difference.largest
            ),
        )
    console.print(str(merged), markup=False, soft_wrap=True)
