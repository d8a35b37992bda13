"""`loratune chat`: a conversation with a model and its adapters."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.cli import process
from loratune.cli.common import AdapterFolders, parse
from loratune.config import Precision
from loratune.errors import ConfigError


@dataclass(kw_only=True)
class ChatArguments:
    """Talk to a model with one or several adapters; type /help for the other commands."""

    adapters: AdapterFolders
    """Folders of adapters over one base, or a base model alone."""
    model: str | None = None
    """Base model, if it is not at the place that the adapters record."""
    chat_template: str | None = None
    """File with a Jinja chat template, instead of the one stored with the adapter."""
    temperature: float = 0.0
    """0 takes the most likely token; higher values are more varied."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    max_new_tokens: int = 512
    """Largest number of tokens in an answer."""
    seed: int | None = None
    """Seed of sampling; makes answers repeatable."""
    precision: Precision = "auto"
    """Number format of the base, as in train."""
    device: str | None = None
    """Torch device; by default the GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that belongs to the model. It can do anything on this machine."""

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ConfigError("no adapter or base model given; name at least one folder")


def run(words: list[str]) -> None:
    """Opens the folders and reads prompts until the input ends."""
    given = parse(ChatArguments, words, "chat")
    with process.library_imports():
        from loratune.infer.engine import Sampling
        from loratune.infer.opened import open_folders
        from loratune.screen.chat import chat

    sampling = Sampling(
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=0,
        seed=given.seed,
    )
    opened = open_folders(
        given.adapters,
        model=given.model,
        precision=given.precision,
        device=given.device,
        trust_remote_code=given.trust_remote_code,
        chat_template=given.chat_template,
    )
    process.print_notes(opened.notes)
    chat(
        opened.model,
        opened.tokenizer,
        base=opened.base,
        stop_ids=opened.stop_ids,
        console=process.console(),
        sampling=sampling,
        forms=opened.forms,
    )
