"""The identity of a run: its own id, and the base, tokenizer, template and data that it was made with.

Later commands may run in another directory, or after files have changed. A relative name then means another model,
and an adapter on another model answers nonsense without an error. So `identity.json` in a run's folder has absolute
paths and fingerprints, and `chat_template.jinja` has the template itself.

A fingerprint of weights must not cost a second read of 14 GB. Up to 64 MiB every byte counts. Above that, it covers
names, dtypes and shapes, all tensors of at most 16 KiB, and three blocks of 4 KiB of every other tensor: at the
start, in the middle and at the end. So it detects a base that was trained further, merged, cast or quantised. It does
not detect a few elements of a large tensor that were changed by hand. The files that hold the tensors do not matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedTokenizerBase

from loratune import atomic, foreign
from loratune.base.load import resolve
from loratune.config import RunConfig
from loratune.data.files import content_hash
from loratune.errors import AdapterError, LoratuneError, ModelError

IDENTITY_FILE, TEMPLATE_FILE = "identity.json", "chat_template.jinja"

_READ_WHOLE = 64 << 20
_SMALL_TENSOR, _BLOCK = 16 << 10, 4 << 10
_MAX_HEADER = 100_000_000
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_UNRELATED = ("transformers_version", "_name_or_path", "_commit_hash")  # in config.json


@dataclass(frozen=True)
class BaseIdentity:
    """A base model."""

    model: str
    """The user's name for it."""
    path: str | None
    """Absolute folder; None for a hub id or the bundled model."""
    weights: str | None
    """Fingerprint of weights and configuration; None if the files are not on this machine."""
    tokenizer: str | None
    """Hash of the tokenizer's files."""


@dataclass(frozen=True)
class RunIdentity:
    """The content of `identity.json`."""

    run: str
    """Id of the run, which its checkpoints repeat; empty if it began before there were ids."""
    base: BaseIdentity
    chat_template: str | None
    """Hash of the template, whose text is in `chat_template.jinja`; None if the tokenizer has none."""
    data: dict[str, dict[str, str]] = field(default_factory=dict)
    """Data file as named in run.toml -> its absolute "path" and the "sha256" of its content."""


def describe(model: str) -> BaseIdentity:
    """The identity of the base model `model`. Raises ModelError: it does not exist or cannot be read."""
    source = resolve(model)
    named = Path(model).expanduser()
    folder = Path(source) if Path(source).is_dir() else _downloaded(source)
    if folder is None:
        return BaseIdentity(model, None, None, None)
    try:
        path = source if named.exists() else None
        return BaseIdentity(model, path, _fingerprint(folder), _tokenizer_hash(folder))
    except OSError as error:
        raise ModelError(f"{model}: cannot be read: {error.strerror or error}") from error


def of_run(
    base: BaseIdentity, tokenizer: PreTrainedTokenizerBase, hashes: dict[str, str], known: RunIdentity | None = None
) -> RunIdentity:
    """The identity of a run.

    Args:
        hashes: data file -> SHA-256 of its content.
        known: of a run that continues. Its id is kept, and so is everything else unless the id is empty.
    """
    if known is not None and known.run:
        return known
    template = _template_of(tokenizer)
    files = {
        path: {"path": str(Path(path).resolve()), "sha256": h} for path, h in hashes.items() if Path(path).exists()
    }
    digest = None if template is None else hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
    return RunIdentity(uuid.uuid4().hex if known is None else known.run, base, digest, files)


def write(folder: Path, identity: RunIdentity, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes both files; `identity.json` first, because it marks a folder as a run's."""
    atomic.write_text(folder / IDENTITY_FILE, atomic.to_json(asdict(identity)))
    template = _template_of(tokenizer)
    if template is not None:
        atomic.write_bytes(folder / TEMPLATE_FILE, template.encode("utf-8", "surrogatepass"))


def read(folder: Path) -> RunIdentity | None:
    """The identity in `folder`, or None if another program made the adapter. Raises AdapterError: it is damaged."""
    file = folder / IDENTITY_FILE
    try:
        found = json.loads(foreign.regular(file).read_bytes())
        identity = RunIdentity(**found | {"base": BaseIdentity(**found["base"])})
        _check_types(identity)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise AdapterError(
            f"{file}: is damaged or cannot be read ({type(error).__name__}); restore it from a copy, or delete it to "
            "use the adapter without checking its base"
        ) from error
    return identity


def template_file(folder: Path, identity: RunIdentity | None) -> str | None:
    """The stored chat template. Raises AdapterError: it is missing or has changed."""
    if identity is None or identity.chat_template is None:
        return None
    file = folder / TEMPLATE_FILE
    try:
        known = hashlib.sha256(foreign.regular(file).read_bytes()).hexdigest() == identity.chat_template
    except OSError:
        raise AdapterError(
            f"{file}: the chat template of this adapter is missing; name its file with --chat-template"
        ) from None
    if not known:
        raise AdapterError(f"{file}: has changed since the adapter was trained; name a file with --chat-template")
    return str(file)


def difference(known: BaseIdentity, now: BaseIdentity) -> str | None:
    """One line on how a base differs from the one that an adapter was trained on, or None."""
    where = now.path or now.model
    trained = known.path or known.model
    if known.weights is not None and now.weights is not None and known.weights != now.weights:
        changed = (
            "has changed since the training" if where == trained else f"is not the base of the training, {trained}"
        )
        return f"the base model {where} {changed} (its weights or configuration differ)"
    if known.tokenizer is not None and now.tokenizer is not None and known.tokenizer != now.tokenizer:
        return f"the tokenizer of {where} has changed since the training"
    return None


def located(run: RunConfig, identity: RunIdentity | None, folder: Path) -> RunConfig:
    """The settings with names that mean the same files in any directory.

    A data file is found at its absolute path, or under its name if it has the same content. If neither exists, the
    absolute path is named in the error that follows.
    """
    if identity is None:
        return run
    template = run.dataset.chat_template
    if template is not None and not Path(template).is_file() and (folder / TEMPLATE_FILE).is_file():
        template = str((folder / TEMPLATE_FILE).resolve())
    data = [_located(path, identity) for path in run.data]
    held_out = [_located(path, identity) for path in run.dataset.eval_data]
    model = base_name(identity.base)
    return replace(
        run, model=model, data=data, dataset=replace(run.dataset, eval_data=held_out, chat_template=template)
    )


def base_name(known: BaseIdentity) -> str:
    """The recorded base under a name that is valid in this directory: its own name, or its absolute path."""
    same = known.path is None or str(Path(known.model).expanduser().resolve()) == known.path
    return known.model if same else str(known.path)


def _located(path: str, identity: RunIdentity) -> str:
    known = identity.data.get(path)
    if known is None or str(Path(path).resolve()) == known["path"]:
        return path
    if Path(known["path"]).exists() or not _has_content(path, known["sha256"]):
        return known["path"]
    return path


def _has_content(path: str, expected: str) -> bool:
    try:
        return Path(path).exists() and content_hash(path) == expected
    except LoratuneError:
        return False


def _check_types(identity: RunIdentity) -> None:
    """Raises ValueError for values of other types."""
    base, text = identity.base, (str, type(None))
    texts = (base.path, base.weights, base.tokenizer, identity.chat_template)
    named = all(
        isinstance(known["path"], str) and isinstance(known["sha256"], str) for known in identity.data.values()
    )
    if not (
        isinstance(identity.run, str) and isinstance(base.model, str) and all(isinstance(t, text) for t in texts)
    ):
        raise ValueError
    if not named:
        raise ValueError


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None


def _downloaded(model: str) -> Path | None:
    """The folder of a hub id's newest download."""
    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _tokenizer_hash(folder: Path) -> str | None:
    """Hash of the files that decide tokens. The template is not among them; a run stores it."""
    digest, any_file = hashlib.sha256(), False
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            any_file = True
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest() if any_file else None


def _fingerprint(folder: Path) -> str:
    """Hash of configuration and weights; see the top of this file."""
    digest = hashlib.sha256()
    config = foreign.read_json(folder / "config.json", ModelError)
    digest.update(json.dumps({k: v for k, v in config.items() if k not in _UNRELATED}, sort_keys=True).encode())
    stored = sorted(_stored(folder), key=lambda each: each.name)
    whole = sum(each.nbytes for each in stored) <= _READ_WHOLE
    for each in stored:
        digest.update(f"{each.name} {each.kind} {each.nbytes}".encode())
        for part in each.parts(whole):
            digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class _StoredBytes:
    """The bytes of one tensor in a file."""

    file: Path
    name: str
    kind: str
    start: int
    nbytes: int

    def parts(self, whole: bool) -> Iterator[bytes]:
        """The bytes that count for the fingerprint."""
        if whole or self.nbytes <= _SMALL_TENSOR:
            spans = [(at, min(1 << 20, self.nbytes - at)) for at in range(0, self.nbytes, 1 << 20)]
        else:
            spans = [(at, _BLOCK) for at in (0, (self.nbytes - _BLOCK) // 2, self.nbytes - _BLOCK)]
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            for at, count in spans:
                yield os.pread(descriptor, count, self.start + at)
        finally:
            os.close(descriptor)


def _stored(folder: Path) -> Iterator[_StoredBytes]:
    """All tensors of the folder's safetensors files. Raises ModelError: a file is not safetensors."""
    index = folder / "model.safetensors.index.json"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        shards = foreign.read_json(index, ModelError).get("weight_map")
        listed = set(map(str, shards.values())) if isinstance(shards, dict) else set()
        names = [name for name in names if name in listed] or names
    for name in names:
        file = folder / name
        header, start = _header(file)
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            try:
                begin, end = map(int, entry["data_offsets"])
                kind = f"{entry['dtype']} {list(map(int, entry['shape']))}"
            except (TypeError, KeyError, ValueError, OverflowError) as error:
                raise ModelError(f"{file}: not a safetensors file: the entry of {key} is damaged") from error
            if not 0 <= begin <= end <= file.stat().st_size - start:
                raise ModelError(f"{file}: ends in the middle of {key}; is the download complete?")
            yield _StoredBytes(file, key, kind, start + begin, end - begin)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and the offset of the bytes behind it."""
    with foreign.regular(file).open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > min(_MAX_HEADER, max(0, file.stat().st_size - 8)):
            raise ModelError(f"{file}: not a safetensors file, or its download is not complete")
        try:
            header = json.loads(content.read(length))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{file}: not a safetensors file: its header cannot be read") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file}: not a safetensors file: its header is no JSON object")
    return header, 8 + length
