"""A lock on an output folder, so that two processes cannot write into it at the same time.

The lock belongs to an open file and ends with its process. So a process that was killed leaves a file, never a lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loratune.atomic import LOCK_FILE
from loratune.errors import OutputError

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which is created and, if nothing was written into it, removed again.

    File systems without locks are not protected.

    Raises: OutputError: another process holds the lock, or `folder` cannot be written to.
    """
    made = _missing_parents(folder)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(folder)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            (folder / LOCK_FILE).unlink(missing_ok=True)  # while it is held, so that it is nobody else's
            os.close(descriptor)
    finally:
        for each in made:
            _remove_if_empty(each)


def _acquire(folder: Path) -> int:
    """The descriptor of the locked file. A file that its owner has removed in the meantime does not count."""
    file = folder / LOCK_FILE
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            who = f" ({owner})" if owner else ""
            message = f"{folder}: another process{who} is writing here; wait for it, or choose another --out"
            raise OutputError(message) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
        if _is_same(descriptor, file):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _missing_parents(folder: Path) -> list[Path]:
    """The folders that do not exist yet, innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # something was written into it, or it was never made
        return
