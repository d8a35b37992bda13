"""Files and folders that are written completely or not at all.

Content is written beside its destination under a temporary name, flushed to the disk, and renamed. Renaming is one
step for the operating system, so a crash, a full disk or Ctrl-C leaves the old content intact. Temporary names
contain host and process, so that the next process recognises and removes the leftovers of a killed one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loratune import foreign
from loratune.errors import OutputError

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)\.(?P<old>old\.)?\w+", re.DOTALL)
LOCK_FILE = ".lock"
"""Marks a folder that a process writes into; see `loratune.lock`."""


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raises OutputError if `path` exists and may not be replaced, or its parent cannot be written to.

    A link that leads nowhere cannot be written to, and neither can any place behind it.
    """
    foreign.check_name(str(path), OutputError)
    for place in (path, *path.absolute().parents):
        if place.is_symlink() and not place.exists():
            raise OutputError(f"{place}: is a link to a missing place; remove it, or choose another folder")
    if not overwrite and (path.is_file() or (path.is_dir() and holds_files(path))):
        raise OutputError(f"{path}: exists already; choose another name or pass --overwrite")
    if path.is_file():
        raise OutputError(f"{path}: is a file, but a folder is to be written here; choose another name")
    parent = _existing_parent(path)
    try:  # permission bits are not enough: a read-only or virtual file system fails only on use
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=temporary_prefix(path.name)))
    except OSError as error:
        raise OutputError(f"{path}: cannot write into {parent}: {error.strerror}") from error


def holds_files(folder: Path) -> bool:
    """True if a folder holds anything but a lock and temporary files."""
    return any(entry.name != LOCK_FILE and not _TEMPORARY.fullmatch(entry.name) for entry in folder.iterdir())


def to_json(content: Any) -> str:
    """JSON text of plain values, indented, for a file. Infinite numbers and NaN, which JSON has not, become null."""
    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def finite(content: Any) -> Any:
    """Plain values with None in place of infinite numbers and NaN."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically. Raises OutputError."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically. Raises OutputError."""
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path.name))
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `path` when the block ends without an error.

    Raises: OutputError: `path` exists and `overwrite` is False, or the disk is full or read-only.
    """
    check_new(path, overwrite=overwrite)
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=temporary_prefix(path.name)))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o666 & ~_umask())  # some libraries create private files
                    _flush(file)
            temporary.chmod(0o777 & ~_umask())
            _replace_directory(temporary, path)
        except OutputError as error:  # name the folder as the user does
            raise OutputError(str(error).replace(str(temporary), str(path))) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(new: Path, path: Path) -> None:
    """Renames `new` to `path`. An old folder is moved aside first and deleted last."""
    if not path.exists():
        os.rename(new, path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=temporary_prefix(path.name) + "old."))
    os.rename(path, old / "content")
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old / "content", path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with its content; nothing if there is none. Raises OutputError."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed: {error.strerror or error}") from error


def temporary_prefix(name: str) -> str:
    """Start of the temporary names, beside a file or folder `name`, of this process."""
    return f".{name}.{_host()}-{os.getpid()}."


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes temporary files and folders of dead processes of this host from `folder`, as far as possible.

    A folder that was moved aside, and never replaced, gets its name back.

    Args:
        name: only beside this file or folder.
    """
    for path in folder.glob(f".{glob.escape(name or '')}*") if folder.is_dir() else ():
        found = _TEMPORARY.fullmatch(path.name)
        if (
            found is None
            or name not in (None, found["name"])
            or found["host"] != _host()
            or _lives(int(found["pid"]))
        ):
            continue
        moved, place = path / "content", folder / found["name"]
        with suppress(OSError):
            if found["old"] and moved.exists() and not os.path.lexists(place):
                os.rename(moved, place)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _existing_parent(path: Path) -> Path:
    for parent in (path, *path.absolute().parents):
        if parent.exists():
            return parent
    return Path("/")


def _umask() -> int:
    """The file mode mask of the process. The system can only return it while setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
