"""Files and folders that are written completely or not at all.

Content is written beside its destination under a temporary name, flushed to the disk, and renamed. Renaming is one
step for the operating system, so a crash, a full disk or Ctrl-C leaves the old content intact.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loratune.errors import OutputError


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raises OutputError if `path` exists and may not be replaced, or its parent cannot be written to."""
    if not overwrite and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise OutputError(f"{path}: exists already; choose another name or pass --overwrite")
    if path.is_file():
        raise OutputError(f"{path}: is a file, but a folder is to be written here; choose another name")
    parent = _existing_parent(path)
    try:  # permission bits are not enough: a read-only or virtual file system fails only on use
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}."))
    except OSError as error:
        raise OutputError(f"{path}: cannot write into {parent}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically. Raises OutputError."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically. Raises OutputError."""
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
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
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    os.rename(path, old / "content")
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old / "content", path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


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
