"""Reads the tensors of a safetensors checkpoint one at a time, so that at most one of them is in host memory.

With mapped files, the usual way, every page that was read counts as this process's memory until the file is closed:
13.5 GB for a model of 7 billion parameters. Here several threads read a tensor at its offset in the file into memory
from which a GPU copies at full speed. It is freed after use.

Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, then the bytes of all tensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.errors import ModelError
from loratune.ops.frozen import FrozenWeight

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes, as the format's own reader allows
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
            return [single]
        if not index.exists():
            raise ModelError(f"{self.folder}: neither model.safetensors nor model.safetensors.index.json is here")
        try:
            names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index}: cannot be read: {error}") from error
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            raise ModelError(
                f"{self.folder / missing[0]}: missing, but the index names it; is the download complete?"
            )
        return [self.folder / name for name in names]


def _header(file: Path, pinned: bool) -> Iterator[StoredTensor]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start = 8 + length + int(entry["data_offsets"][0])
                yield StoredTensor(file, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start, pinned)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not a readable safetensors file: {error!r}") from error
