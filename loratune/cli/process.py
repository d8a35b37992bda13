"""Settings of the process that only a command line may change: signals, imports, logging, the environment.

A library that is imported into another program must not change them.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from loratune.cli import help

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
"""Exit status after a signal, as shells have it for Ctrl-C: `train && merge` then does not merge."""
NOT_FOR_TEXT = ("librosa", "scipy", "sklearn", "soundfile", "torchaudio", "torchvision")
"""Packages that transformers imports if they are installed. It uses them for audio, images and assisted decoding."""


def console() -> Console:
    """The console for standard output."""
    from loratune.screen.console import PlainConsole

    return PlainConsole()


def print_notes(notes: Sequence[str]) -> None:
    """Prints "note: text" to standard error, one line each."""
    from rich.console import Console
    from rich.text import Text

    for note in notes:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("note: ", "dim"), note))


def print_error(message: str) -> None:
    """Prints "error: message" to standard error, without a traceback. On a terminal, lines break between words."""
    from rich.text import Text

    from loratune.screen.console import PlainConsole

    console = PlainConsole(stderr=True, soft_wrap=True)
    shown = message.encode("utf-8", "backslashreplace").decode()  # it may name files whose names are not UTF-8
    lines = f"error: {shown}".split("\n")
    if console.is_terminal:
        lines = [part for line in lines for part in help.wrap(line, console.width, hanging=2)]
    text = Text("\n".join(lines))
    text.stylize("bold red", 0, len("error:"))
    console.print(text)


def cache_dir(setting: str | None) -> str | None:
    """The folder for rendered data: the setting, else `loratune` in the user's cache folder.

    Args:
        setting: `DataConfig.cache_dir`; "" turns caching off.

    Returns: None if caching is off.
    """
    if setting is not None:
        return setting or None
    return str(_user_cache())


def grow_cuda_segments() -> None:
    """Lets PyTorch's CUDA allocator grow its segments in place, unless the user has configured it.

    Activations of many sizes then leave no unusable gaps. PyTorch reads the variable when it is imported.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def stop_on_signals(console: Console) -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a stop after the current step. A second Ctrl-C stops at once.

    Before the first step nothing needs saving, so the first signal stops at once, also while data are rendered.

    Yields: a function that returns True once a signal has arrived.
    """
    received: list[int] = []
    asked: list[bool] = []  # one entry once training asks

    def stopped() -> bool:
        asked[:] = [True]
        return bool(received)

    def handle(number: int, _: object) -> None:
        if not asked or (received and number == signal.SIGINT):
            raise KeyboardInterrupt
        received.append(number)
        console.print("stopping after this step and saving; Ctrl-C again to stop without saving", style="yellow")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Limits PyTorch to one CPU thread, for models so small that a second one gains little.

    If another program occupies a core, threads that wait for each other took up to eight times as long.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def library_imports() -> Iterator[None]:
    """Surrounds the heavy imports of a verb: silences the libraries and speeds up the imports.

    Importing creates 600,000 objects that live as long as the process. Repeated garbage collections over them took a
    fifth of the import time, so collection is off, and `gc.freeze` then exempts them for the rest of the run.
    transformers imports every optional package it finds. A quarter of all modules is useless for text, so their
    packages are hidden during the imports.
    """
    gc.disable()
    try:
        with _hidden(() if "transformers" in sys.modules else NOT_FOR_TEXT):
            _silence_libraries()
            _cache_flash_kernels()
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    """Makes packages look uninstalled: Python treats a None in `sys.modules` that way."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    absent = [name for name in names if name not in modules]
    modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for name in absent:
            modules.pop(name, None)


def _silence_libraries() -> None:
    """Turns off the progress bars, advice and warnings of the libraries below."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _cache_flash_kernels() -> None:
    """Makes flash-attn-4 store compiled kernels on disk, unless the user has configured this.

    It reads the variable when it is imported.
    """
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(_user_cache() / "flash_attention"))


def _user_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "loratune"
