"""What can be done while Python is still importing: reading a model's files.

Importing PyTorch and transformers takes seconds of one core. From a disk that has not been read since the machine
started, the weights take seconds more, and the two need not wait for each other: the kernel is told which files will
be wanted, and reads them into its cache. It cuts what it is told at once down to one window of read-ahead, so it is
told in pieces, which may wait for the disk, and so from a thread of its own that nobody waits for.
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
        model: as the user named it; anything but a folder with weights is left to who loads it, errors as well.

    Returns: the thread, or None if there is nothing to do: no folder, no such system call (it is Linux's), or files
        of more than half of the machine's memory, which would push each other out.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    files = sorted(
        Path(model).expanduser().glob("model*.safetensors")
    )  # whole, or in shards as transformers names them
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not files or sum(file.stat().st_size for file in files) > memory // 2:
        return None
    thread = threading.Thread(target=_announce, args=(files,), name="read ahead", daemon=True)
    thread.start()
    return thread


def _announce(files: list[Path]) -> None:
    with contextlib.suppress(OSError):  # whoever loads the file says what is wrong with it
        for file in files:
            with file.open("rb") as stream:
                for at in range(0, file.stat().st_size, _PIECE):
                    os.posix_fadvise(stream.fileno(), at, _PIECE, os.POSIX_FADV_WILLNEED)
