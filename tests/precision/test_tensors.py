"""The reader of safetensors files refuses the files that safetensors refuses, and files outside the folder."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loratune.base.load import load
from loratune.errors import ModelError
from loratune.precision.tensors import Checkpoint
from tests.cli_lab import small_model

TWO = {"a": torch.arange(4.0), "b": torch.arange(4.0) + 4}


def written(folder: Path, entries: dict[str, object] | str, length: int | None = None) -> Path:
    """A file with any header."""
    header = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    header += b" " * (-len(header) % 8)
    file = folder / "model.safetensors"
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + bytes(32))
    return file


def entry(start: int, end: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_good_file_is_read_as_safetensors_reads_it(tmp_path):
    save_file(TWO, tmp_path / "model.safetensors")
    ours = {name: stored.read() for name, stored in Checkpoint(tmp_path).tensors.items()}
    assert all(torch.equal(ours[name], TWO[name]) for name in TWO)


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 16), "b": entry(0, 16)},  # the same bytes twice
        {"a": entry(0, 16), "b": entry(8, 24)},  # overlap
        {"a": entry(0, 12), "b": entry(12, 28)},  # too short for its shape
        {"a": entry(-16, 0), "b": entry(0, 16)},
        {"a": entry(16, 0), "b": entry(16, 32)},
        {"a": entry(0, 16), "b": entry(17, 33)},  # a gap
        {"a": entry(0, 16), "b": entry(16, 1 << 62)},
        {"a": entry(0, 16)},  # bytes that belong to nothing
        {"a": entry(0, 16, (-4,)), "b": entry(16, 32)},
        {"a": entry(0, 16, (1 << 40, 1 << 40)), "b": entry(16, 32)},
        {"a": entry(0, 16, dtype="F33"), "b": entry(16, 32)},
        {"a": {"dtype": "F32"}, "b": entry(16, 32)},
        {"a": None},
        "[]",
        "{",
        "[" * 100_000,
    ],
    ids=str,
)
def test_headers_that_safetensors_refuses(tmp_path, header):
    file = written(tmp_path, header)
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read as safetensors"):
        _ = Checkpoint(tmp_path).tensors


@pytest.mark.parametrize("length", [0, 1, 1 << 62, (1 << 64) - 1, 101_000_000])
def test_header_lengths(tmp_path, length):
    written(tmp_path, {"a": entry(0, 16), "b": entry(16, 32)}, length=length)
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        _ = Checkpoint(tmp_path).tensors


def test_one_name_with_two_places_is_ambiguous(tmp_path):
    one, other = json.dumps(entry(0, 16)), json.dumps(entry(16, 32))
    written(tmp_path, f'{{"a": {one}, "a": {other}}}')
    with pytest.raises(ModelError, match=r"given twice|cannot be read"):
        _ = Checkpoint(tmp_path).tensors


def indexed(folder: Path, name: object) -> Path:
    """A model whose weight index names one file."""
    base = small_model(folder / "model")
    names = load_file(base / "model.safetensors")
    shutil.move(base / "model.safetensors", folder / "outside.safetensors")
    shutil.copy(folder / "outside.safetensors", base / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base


def test_an_index_that_names_a_file_of_the_folder_is_read(tmp_path):
    assert load(str(indexed(tmp_path, "part.safetensors")), device="cpu").config.hidden_size == 32


@pytest.mark.parametrize("precision", ["auto", "nf4"])
@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "part.bin", "sub/part.safetensors", None, 3, ["a"]]
)
def test_an_index_names_only_files_of_its_folder(tmp_path, name, precision):
    folder = indexed(tmp_path, name)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: .*same folder"):
        load(str(folder), precision, "cpu")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_an_index_without_a_map(tmp_path, weight_map):
    folder = indexed(tmp_path, "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="weight_map must be an object"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["part.safetensors", "model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, name):
    folder = indexed(tmp_path, "part.safetensors")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    found: list[BaseException] = []

    def attempt() -> None:
        try:
            from loratune.base.load import load_tokenizer

            load_tokenizer(str(folder))
            load(str(folder), device="cpu")
        except ModelError as error:
            found.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert "is not a regular file" in str(found[0])
