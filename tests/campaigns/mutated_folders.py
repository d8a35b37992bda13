"""Mutated adapters, models and run folders: opened, and compared with PEFT, transformers and the original.

    python -m tests.campaigns.mutated_folders [--count 5000] [--first 0]

A seed copies one folder, changes one or two of its files (a value of JSON or TOML, bytes, length, the file's kind),
and opens it. Right is an error, or a result that an independent reader of the same files gives: an adapter has the
logits of PEFT, a model those of transformers, and a run folder those of the adapter before the change. The script
prints counts and faults, and exits with 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from loratune.base.load import load, load_tokenizer, stop_ids
from loratune.box import data_file
from loratune.config import LoraConfig
from loratune.infer.opened import open_folders
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import attach, trainable_parameters
from loratune.screen.console import PlainConsole
from loratune.screen.inspect import as_json, draw, inspect
from tests.campaigns.workers import Wrong, run
from tests.cli_lab import loratune, small_model

PROMPT = torch.tensor([[7, 300, 21, 4000, 5, 99]])
FILES = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "model": (
        "config.json", "generation_config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    ),
    "run": ("run.toml", "metrics.jsonl", "prompting.json", "adapter_config.json", "run.toml", "metrics.jsonl"),
}  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.5, 1e300, 2**70, 10**400, "", " ", "x", "nan", "1", [], {}, [[]],
    [None],
    [1, 2], ["x"], {"a": 1}, {"": None}, "\x00", "../x", "/etc/passwd", "(a+)+$", "a" * 100_000, float("inf"),
    float("nan"), "lora_A", "q_proj", "float16", "relu", 10**6, 10**9,
)  # fmt: skip


@functools.cache
def _templates() -> Path:
    """Folders to mutate: base, an adapter for it, a sharded model, and the folder of a short run."""
    root = Path(tempfile.mkdtemp(prefix="mutants."))
    base = small_model(root / "base")
    model = load(str(base), device="cpu")
    attach(
        model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 2})
    )
    with torch.no_grad():
        for tensor in trainable_parameters(model).values():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    save(model, root / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base)
    shutil.copytree(base, root / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    plain.save_pretrained(root / "model", max_shard_size="300KB")
    done = loratune(
        *("train", str(base), str(data_file("orders", "heldout")), "--out", str(root / "run"), "--cache-dir", ""),
        *("--max-steps", "3", "--r", "2", "--tokens-per-row", "96"),
    )
    assert done.status == 0, done.err
    return root


def make(seed: int, folder: Path) -> str:
    """Puts the mutated folder of a seed into `folder`; returns its kind."""
    rng = random.Random(seed)
    kind = tuple(FILES)[seed % len(FILES)]
    shutil.copytree(_templates() / kind, folder, ignore=shutil.ignore_patterns("checkpoints", "*.png"))
    for _ in range(rng.choice((1, 1, 1, 2))):
        _mutate(folder / rng.choice(FILES[kind]), rng)
    return kind


def _mutate(file: Path, rng: random.Random) -> None:
    if not file.is_file() or file.is_symlink():
        return
    content, way = file.read_bytes(), rng.randrange(20)
    if way == 0:
        _replace(file, rng)
    elif way < 13 and file.suffix == ".json" and len(content) < 100_000:
        with contextlib.suppress(ValueError):
            file.write_text(_change_json(json.loads(content), rng))
    elif way < 13 and file.suffix in (".toml", ".jsonl") and content:
        file.write_bytes(_change_line(content, rng))
    else:
        file.write_bytes(_change_bytes(content, rng, header=file.suffix == ".safetensors"))


def _replace(file: Path, rng: random.Random) -> None:
    """Removes the file, or puts something else into its place."""
    file.unlink()
    match rng.randrange(5):
        case 0:
            file.mkdir()
        case 1:
            file.symlink_to(file.parent / "nowhere")
        case 2:
            os.mkfifo(file)
        case 3:
            file.write_bytes(b"")


def _change_json(value: Any, rng: random.Random) -> str:
    places = _places(value)
    if places:
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(key) + "_"] = holder.pop(key)
            case 2 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = holder[key] * rng.choice((2, -1, 0.5, 1000))
            case _:
                holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    text = _dumps(value)
    if rng.random() < 0.05:
        text = text.replace("{", '{"r": 1, "r": 2, ', 1)
    return text


def _dumps(value: Any) -> str:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value, indent=2)
    finally:
        sys.set_int_max_str_digits(limit)


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        found += [(value, key), *_places(inner)]
    return found


def _change_line(content: bytes, rng: random.Random) -> bytes:
    """Changes the value, the name or the place of one line of TOML or JSON Lines."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    name, mark, _ = lines[at].partition(b" = ")
    odd = rng.choice(
        (b"nan", b"inf", b"-1", b"0", b"1e400", b"9" * 400, b"true", b'""', b'"x"', b"[]", b"{}", b"[[[1]]]",
         b"1979-05-27", b"null", b'"\\u0000"', b'"' + b"a" * 9999 + b'"', b"0x10", b"'''x'''", b"[" * 500, b"3",
         b"0.5", b"\xff", b"{a = 1}")
    )  # fmt: skip
    match rng.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(rng.randrange(len(lines)), lines[at])
        case 2:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        case _:
            lines[at] = name + mark + odd if mark else odd
    return b"\n".join(lines)


def _change_bytes(content: bytes, rng: random.Random, *, header: bool) -> bytes:
    most = min(len(content), 2000) if header and rng.random() < 0.7 else len(content)
    at = rng.randrange(most + 1)
    match rng.randrange(6):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + content[at + rng.choice((1, 4, 64)) :]
        case 2:
            return (
                content[:at]
                + rng.choice((b"\x00", b"\xff", b"{", b'"', b"[" * 2000, b"\xef\xbb\xbf", b"\n"))
                + content[at:]
            )
        case 3:
            return content + rng.choice((b"\x00", b"{}", content))
        case _ if content:
            at = min(at, len(content) - 1)
            return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    return content


# the comparisons


@functools.cache
def _base() -> PreTrainedModel:
    return load(str(_templates() / "base"), device="cpu")


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=PROMPT).logits[0].float()
    return logits


@functools.cache
def _run_logits() -> torch.Tensor:
    return _logits(open_folders([str(_templates() / "run")], device="cpu").model)


def _compare(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise Wrong(f"logits differ from {what} by {float((ours - theirs).abs().max()):.3g}")


def _theirs(make: Callable[[], Any]) -> torch.Tensor | str:
    """Logits of the independent reader, or the error with which it refuses the folder."""
    try:
        return _logits(make())
    except Exception as error:  # noqa: BLE001 (any refusal of another library)
        return f"{type(error).__name__} {str(error)[:100]}"


def check(seed: int) -> str:
    """Opens the folder of a seed; see the top of this file."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "x"
        kind = make(seed, folder)
        if kind == "adapter":
            model = copy.deepcopy(_base())
            load_adapter(model, folder)
            theirs = _theirs(lambda: peft.PeftModel.from_pretrained(copy.deepcopy(_base()), folder).eval())
        elif kind == "model":
            tokenizer = load_tokenizer(str(folder))
            model = load(str(folder), device="cpu")
            stop_ids(model, tokenizer)
            theirs = _theirs(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
            _compare_tokens(tokenizer, folder)
        else:
            found = inspect(folder)
            draw(found, PlainConsole(file=io.StringIO()))
            json.dumps(as_json(found), allow_nan=False)
            model, theirs = open_folders([str(folder)], device="cpu").model, _run_logits()
        if isinstance(theirs, str):
            return f"accepted, but not by {'PEFT' if kind == 'adapter' else 'transformers'}: {theirs}"
        _compare(_logits(model), theirs, {"adapter": "PEFT", "model": "transformers", "run": "the original"}[kind])
    return "accepted"


def _compare_tokens(tokenizer: Any, folder: Path) -> None:
    text = "The answer is 42.\nnaïve 日本"
    if tokenizer(text)["input_ids"] != AutoTokenizer.from_pretrained(folder)(text)["input_ids"]:
        raise Wrong("tokens differ from transformers'")


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Makes the folders to mutate, reads what every seed is compared with, and removes the folders at the end."""
    try:
        _run_logits()
        yield
    finally:
        shutil.rmtree(_templates())
        for made in (_templates, _base, _run_logits):
            made.cache_clear()


def main(arguments: list[str], tell: Callable[[str], None] = print) -> int:
    """Runs the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with prepared():
        campaign = run(check, range(given.first, given.first + given.count), tell=tell)
    tell(str(campaign))
    return 1 if campaign.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
