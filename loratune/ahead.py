"""Reads a model's files into the system's cache while Python is still importing.

Importing PyTorch and transformers takes seconds of one core. Reading weights from a disk for the first time since the
machine started takes more seconds, and the two can overlap. `posix_fadvise` announces the files to the kernel, which
cuts each request to one window of read-ahead. So the files are announced in pieces. Each call may wait for the disk,
so a background thread makes them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

_PIECE = 8 << 20  # bytes


def read_ahead(model: str) -> threading.Thread | None:
    """Starts reading the weights of `model` into the system's cache, and returns at once.

    Args:
        model: the user's name of the model. Anything but a folder with weights is ignored; loading reports the error.

    Returns: the thread. None if `model` is no folder with weights, if the system is not Linux, or if the files exceed
        half of the machine's memory, because they would evict each other from the cache.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    files = sorted(
        Path(model).expanduser().glob("model*.safetensors")
    )  # one file, or shards with transformers' names
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not files or sum(file.stat().st_size for file in files) > memory // 2:
        return None
    thread = threading.Thread(target=_announce, args=(files,), name="read ahead", daemon=True)
    thread.start()
    return thread


def _announce(files: list[Path]) -> None:
    with contextlib.suppress(OSError):  # loading the file reports the error
        for file in files:
            with file.open("rb") as stream:
                for at in range(0, file.stat().st_size, _PIECE):
                    os.posix_fadvise(stream.fileno(), at, _PIECE, os.POSIX_FADV_WILLNEED)
