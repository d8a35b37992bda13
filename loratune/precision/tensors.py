"""Reads the tensors of a safetensors checkpoint one at a time, so that at most one of them is in host memory.

With mapped files, the usual way, every page that was read counts as this process's memory until the file is closed:
13.5 GB for a model of 7 billion parameters. Here several threads read a tensor at its offset in the file into memory
from which a GPU copies at full speed. It is freed after use.

Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, then the bytes of all tensors).
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loratune import foreign
from loratune.errors import ModelError
from loratune.ops.frozen import FrozenWeight

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_PART = 8 << 20  # bytes that one thread reads at a time
_THREADS = min(8, os.cpu_count() or 1)


def set_frozen_form(dense: Tensor, frozen: FrozenWeight) -> None:
    """Attaches to a dense tensor the quantised weight it was made from, so that a loader can use that weight."""
    dense.frozen_form = frozen  # type: ignore[attr-defined]


def frozen_form(dense: Tensor) -> FrozenWeight | None:
    """The attached quantised weight, or None. Tensors that transformers merges, splits or permutes have none."""
    return getattr(dense, "frozen_form", None)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet. transformers' loader reads it with `stored[...]`."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    pinned: bool
    """True to read into page-locked memory, from which a GPU copies faster."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * math.prod(self.shape)

    def __getitem__(self, everything: object) -> Tensor:
        """The tensor, in CPU memory."""
        return self.read()

    def read(self) -> Tensor:
        """The tensor, in CPU memory. Raises: ModelError: the file ends before it."""
        count = self.nbytes
        data = torch.empty(count, dtype=torch.uint8, pin_memory=self.pinned)
        bytes_of = memoryview(data.numpy())  # type: ignore[arg-type]
        file = os.open(self.file, os.O_RDONLY)
        try:
            if count <= _PART:
                self._fill(file, bytes_of, 0)
            else:
                with ThreadPoolExecutor(_THREADS) as threads:
                    starts = range(0, count, _PART)
                    list(threads.map(lambda at: self._fill(file, bytes_of[at : at + _PART], at), starts))
        finally:
            os.close(file)
        return data.view(self.dtype).view(self.shape)

    def _fill(self, file: int, part: memoryview, at: int) -> None:
        while part:
            got = os.preadv(file, [part], self.start + at)
            if not got:
                raise ModelError(f"{self.file}: ends in the middle of {self.name}; is the download complete?")
            part, at = part[got:], at + got


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model's folder."""

    folder: Path
    pinned: bool = False

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name. Raises: ModelError: a file is missing or not safetensors."""
        return {stored.name: stored for file in self.files for stored in _header(file, self.pinned)}

    @property
    def files(self) -> list[Path]:
        """The single file, or else the files of the index in its order, as transformers chooses."""
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if single.exists():
            check_regular(single)
            return [single]
        if not index.exists():
            raise ModelError(f"{self.folder}: neither model.safetensors nor model.safetensors.index.json is here")
        names = _names_in(index)
        for name in names:
            check_regular(self.folder / name, f"{index} names it")
        return [self.folder / name for name in names]


def _names_in(index: Path) -> list[str]:
    """The files that a weight index names, in its order. Raises ModelError: one is not a file beside the index."""
    named = foreign.read_json(index, ModelError).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(f"{index}: weight_map must be an object of tensor names and file names")
    for tensor, name in named.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index}: {tensor} is in {name!r}; a weight file is a .safetensors file in the same folder"
            )
    return list(dict.fromkeys(named.values()))


def check_regular(file: Path, why: str = "") -> None:
    """Raises ModelError if `file` is missing, or is a folder, a pipe or a device.

    Args:
        why: reason to expect the file, for the message; for example, that an index names it.
    """
    try:
        kind = file.stat().st_mode
    except (OSError, ValueError) as error:
        because = f", but {why}" if why else ""
        raise ModelError(f"{file}: missing{because}; is the download complete?") from error
    if not stat.S_ISREG(kind):
        raise ModelError(f"{file}: is not a regular file")


def _header(file: Path, pinned: bool) -> Iterator[StoredTensor]:
    """The tensors of one file. safetensors itself checks the header first: offsets without gaps, overlaps or ends
    beyond the file, sizes that follow from shapes, and a limit on the header's length."""
    check_regular(file)
    try:
        with safe_open(file, framework="pt"), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = foreign.parse_json(stream.read(length).decode("utf-8"), f"{file}: its header", ModelError)
        for name, entry in header.items():
            if name != "__metadata__":
                start = 8 + length + int(entry["data_offsets"][0])
                yield StoredTensor(file, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start, pinned)
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: cannot be read as safetensors: {error}; is the download complete?") from error
    except KeyError as error:
        raise ModelError(f"{file}: holds tensors of the type {error}, which is not read here") from error
