"""Rendered examples on disk: one safetensors file per data set, named by the hash of all its inputs.

The hash covers the data's bytes, the tokenizer, its chat template, the settings and this package's code. A file is
written under a temporary name and renamed, so it is complete or absent. Its checksum detects damage, and a damaged
file is rendered again. Files hold arrays and JSON only, so a cache cannot run code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from loratune.config import DataConfig
from loratune.data.examples import Example
from loratune.data.prompting import PromptForm
from loratune.data.template import read_template
from loratune.errors import OutputError

HASHED_OTHERWISE = ("cache_dir", "num_proc", "tokens_per_row", "chat_template")
"""Settings left out of the hash: they do not change examples, or their content is hashed instead of their value."""

Content = tuple[list[Example], list[Example], list[str], tuple[PromptForm, ...]]


def key_of(
    hashes: Mapping[str, str],
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    max_tokens: int | None,
    stop_ids: frozenset[int],
    seed: int,
) -> str:
    """SHA-256 (hex) of all inputs of rendered examples.

    Args:
        hashes: path -> content hash of training and held-out data, in order.
        paths: the training files among them.
    """
    settings = dataclasses.asdict(config)
    for name in HASHED_OTHERWISE:
        del settings[name]
    template = read_template(config.chat_template) if config.chat_template else None
    parts = {
        "data": list(hashes.items()),
        "training": list(paths),
        "tokenizer": _tokenizer_identity(tokenizer),
        "chat_template": [template, tokenizer.chat_template],
        "settings": settings,
        "max_tokens": max_tokens,
        "stop_ids": sorted(stop_ids),
        "seed": seed,
        "code": _code_identity(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load(cache_dir: str, key: str) -> Content | None:
    """Returns (train, held-out, notes, forms) from the cache, or None if the file is missing or damaged."""
    path = Path(cache_dir) / f"{key}.safetensors"
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            checksum = (file.metadata() or {}).get("checksum")
    except (SafetensorError, OSError):
        return None
    if not arrays or checksum != _checksum(arrays):
        return None
    about = json.loads(arrays["about"].tobytes())
    examples = _unpacked(arrays, about["sources"])
    return examples[: about["n_train"]], examples[about["n_train"] :], about["notes"], tuple(about["forms"])


def store(
    cache_dir: str,
    key: str,
    train: Sequence[Example],
    held_out: Sequence[Example],
    notes: list[str],
    forms: Sequence[PromptForm],
) -> None:
    """Writes examples into the cache, atomically.

    Raises: OutputError: the folder cannot be written.
    """
    examples = [*train, *held_out]
    about = {"n_train": len(train), "notes": notes, "forms": forms, "sources": [e.source for e in examples]}
    arrays = {
        "token_ids": np.concatenate([example.token_ids for example in examples]),
        "weights": np.concatenate([example.weights for example in examples]),
        "lengths": np.array([len(example) for example in examples], dtype=np.int64),
        "about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
    }
    temporary: str | None = None
    try:
        os.makedirs(cache_dir, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache_dir, suffix=".partial")
        os.close(handle)
        save_file(arrays, temporary, {"checksum": _checksum(arrays)})
        os.replace(temporary, Path(cache_dir) / f"{key}.safetensors")
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(
            f'{cache_dir}: the data cache cannot be written: {error}; name another folder with --cache-dir, or "" '
            "for no cache"
        ) from error


def _unpacked(arrays: Mapping[str, NDArray[Any]], sources: Sequence[str]) -> list[Example]:
    """The examples, as views into the concatenated arrays."""
    ends = np.cumsum(arrays["lengths"]).tolist()
    starts = [0, *ends[:-1]]
    return [
        Example(arrays["token_ids"][start:end], arrays["weights"][start:end], source)
        for start, end, source in zip(starts, ends, sources, strict=True)
    ]


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the tokenizer's rules, vocabulary and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    specials = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256((type(tokenizer).__name__ + rules + specials).encode()).hexdigest()


def _code_identity() -> str:
    """Hash of this package's sources and the versions of the libraries that tokenise."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    for library in ("transformers", "tokenizers"):
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()
