"""Fuzzed data files of all formats: read, checked and rendered, and compared with an independent reading.

    python -m tests.campaigns.fuzzed_data [--count 10000] [--first 0]

A seed makes one file: valid records of one kind in one file format, then up to four mutations of its values or of its
bytes. Right is an error that names the file, or the records of a plain, separate parse (Python's json and csv, a
split at blank lines), rendered to the tokens of `apply_chat_template`. A file without mutations must be accepted.
The script prints counts and faults, and exits with 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import io
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from loratune.base.load import POCKET, load_tokenizer, stop_ids
from loratune.config import DataConfig
from loratune.data.record import Record
from loratune.data.records import read
from loratune.data.render import render
from loratune.errors import LoratuneError
from tests.campaigns.workers import Wrong, run

WORDS = (
    "Paris", "is", "the", "capital", "of", "France", "naïve", "日本", "😀", "12", "3.5", "a\tb", '"quoted"', "[INST]",
    "<|end|>", "{{ x }}", "x,y", "it's", "\u200b", "\u2028", "e\u0301", "\ufeff", "\\n", "line\nbreak", "\x1b[31m",
    "&amp;",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 1e300, 2**70, "", " ", "\n", "x", [], {}, [[]], [{}], {"a": 1}, ["x", 1],
    "null",
    "[]", "{}", "\x00", "\ud83d", "assistant", "user", [None], {"role": "user"}, {"content": "x"}, "a" * 5000,
)  # fmt: skip
FRAGMENTS = (
    b"\xef\xbb\xbf", b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\n", b"\r", b"\r\n", b"\n\n", b'"', b"'", b",",
    b"{", b"}", b"[", b"]", b":", b"\\", b"\\u", b"\\ud83d", b"NaN", b"-Infinity", b"1e999", b"null", b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000, b'{"text": 1, "text": 2}', b"\xe2\x80\xa8", b"\x1a", b"\t", b" ", b"\xff\xfe", b"\xfe\xff", b"=",
    b";",
)  # fmt: skip
KINDS = ("messages", "sharegpt", "alpaca", "completion", "text")
FORMATS = ("jsonl", "ndjson", "json", "data.json", "csv", "tsv", "txt", "md", "parquet")


def make(seed: int) -> tuple[str, bytes, bool]:
    """(name of the file, its bytes, True if it is mutated)."""
    rng = random.Random(seed)
    form = FORMATS[seed % len(FORMATS)]
    kind = rng.choice(KINDS if form not in ("csv", "tsv") else ("alpaca", "completion", "text"))
    records = [_record(kind, rng) for _ in range(rng.choice((1, 1, 2, 3, 8)))]
    changes = rng.choice((0, 1, 1, 1, 2, 2, 3, 4))
    on_values = form not in ("txt", "md") and rng.random() < 0.5
    if on_values:
        for _ in range(changes):
            _change_value(rng.choice(records), rng)
    content = _encoded(form, records, rng)
    if not on_values:
        for _ in range(changes):
            content = _change_bytes(content, rng)
    return f"seed{seed}.{form}", content, changes > 0


def _text(rng: random.Random) -> str:
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))
    return text if text.strip() else "x"


def _record(kind: str, rng: random.Random) -> dict[str, Any]:
    if kind == "text":
        return {"text": _text(rng)}
    if kind == "completion":
        return {"prompt": _text(rng), "completion": _text(rng)}
    if kind == "alpaca":
        return {"instruction": _text(rng), "input": rng.choice(("", _text(rng))), "output": _text(rng)}
    turns = [("user", "assistant")[at % 2] for at in range(2 * rng.randint(1, 3))]
    if kind == "messages":
        return {"messages": [{"role": role, "content": _text(rng)} for role in turns]}
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[role], "value": _text(rng)} for role in turns]}


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside nested dicts and lists."""
    found: list[tuple[Any, Any]] = []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        found += [(value, key), *_places(inner)]
    return found


def _change_value(record: dict[str, Any], rng: random.Random) -> None:
    places = _places(record)
    if not places:
        return
    holder, key = rng.choice(places)
    match rng.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[
                rng.choice(("extra", "role", "text", "weight", "train", "tool_calls", "tools", "prompt", "name"))
            ] = copy.deepcopy(rng.choice(ODD_VALUES))
        case 2 if isinstance(holder, dict):
            holder[str(key) + rng.choice(("s", "_", " ", "\u200b"))] = holder.pop(key)
        case _:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))


def _change_bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((1, 1, 2, 7, 40)))
    match rng.randrange(8):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + content[end:]
        case 2:
            return content[:at] + content[at:end] * 2 + content[end:]
        case 3 if content:
            at = min(at, len(content) - 1)
            return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        case 4:
            return content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"")))
        case 5:
            return content + content
        case _:
            return content[:at] + rng.choice(FRAGMENTS) + content[at:]


def _encoded(form: str, records: list[dict[str, Any]], rng: random.Random) -> bytes:
    ascii_only = rng.random() < 0.5
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    if form in ("jsonl", "ndjson"):
        text = "\n".join(lines) + rng.choice(("", "\n"))
    elif form == "json":
        text = json.dumps(records, ensure_ascii=ascii_only, indent=rng.choice((None, 2)))
    elif form == "data.json":
        text = json.dumps({"data": records, "version": [1]}, ensure_ascii=ascii_only, indent=rng.choice((None, 2)))
    elif form in ("csv", "tsv"):
        return _csv(records, "," if form == "csv" else "\t").encode("utf-8", "surrogatepass")
    elif form == "parquet":
        return _parquet(records)
    else:
        text = "\n\n".join(_text(rng) for _ in records)
    return text.encode("utf-8", "surrogatepass")


def _csv(records: list[dict[str, Any]], delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    names = list(dict.fromkeys(name for record in records for name in record))
    writer.writerow(names)
    writer.writerows([[record.get(name, "") for name in names] for record in records])
    return out.getvalue()


def _parquet(records: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(records)
        pyarrow.parquet.write_table(table, out)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, ValueError):  # values of several types
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}]), out)
    return out.getvalue()


# the independent reading


def naive(name: str, content: bytes, path: Path) -> list[dict[str, Any]]:
    """The objects of a file, read without loratune. Raises ValueError if this plain reader cannot read it."""
    if name.endswith(".parquet"):
        return [_no_nulls(row) for row in pyarrow.parquet.read_table(path).to_pylist()]
    text = content.decode("utf-8-sig")
    if name.endswith((".txt", ".md")):
        plain = re.sub("(?m)^\ufeff", "", text if "\n" in text else text.replace("\r", "\n"))
        parts = re.split(r"\n(?:[^\S\n]*\n)+", plain.replace("\r\n", "\n"))
        return [{"text": part.strip("\n")} for part in parts if part.strip()]
    if name.endswith((".csv", ".tsv")):
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="," if name.endswith(".csv") else "\t")
        plain_rows = [{str(key).strip(): value for key, value in row.items()} for row in rows]
        return [row for row in plain_rows if len(row) > 1 or str(next(iter(row.values()))).strip(" \t")]
    if name.endswith(".json"):
        try:
            whole = json.loads(text)
            return whole if isinstance(whole, list) else whole.get("data", [whole])
        except ValueError:
            pass
    lines = text.split("\n") if "\n" in text else text.split("\r")
    return [json.loads(line.removeprefix("\ufeff")) for line in lines if line.removeprefix("\ufeff").strip()]


def _no_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _no_nulls(item) for key, item in value.items() if item is not None}
    return [_no_nulls(item) for item in value] if isinstance(value, list) else value


def texts_of(record: dict[str, Any]) -> list[str]:
    """The texts that a record contributes, in order, by its fields alone."""
    turns = record.get("messages") or record.get("conversations")
    if isinstance(turns, list):
        found = [turn.get("content", turn.get("value")) for turn in turns]
        head = [record["system"]] if "from" in turns[0] and record.get("system") else []
        return [*head, *("".join(p["text"] for p in c) if isinstance(c, list) else c or "" for c in found)]
    if "instruction" in record:
        asked = record["instruction"] + (f"\n\n{record['input']}" if record.get("input") else "")
        return [asked, record["output"]]
    if "prompt" in record and "completion" in record:
        return [record["prompt"], record["completion"]]
    return [record["text"]]


def contents(record: Record) -> list[str]:
    """The same texts, of a record as loratune read it."""
    if record.messages is not None:
        return [str(message.get("content", "")) for message in record.messages]
    return [record.text] if record.text is not None else [record.prompt or "", record.completion or ""]


@functools.cache
def _tokenizer() -> Any:
    return load_tokenizer(POCKET)


def check(seed: int) -> str:
    """Reads and renders the file of a seed; see the top of this file."""
    name, content, mutated = make(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            records = read([str(path)]).records
            stops = stop_ids(POCKET, _tokenizer())
            rendered = render(records, _tokenizer(), DataConfig(num_proc=1), max_tokens=None, stop_ids=stops)
        except LoratuneError as error:
            if not mutated and not _may_be_refused(content):
                raise Wrong(f"a valid file is refused: {error}") from error
            if name not in str(error):
                raise Wrong(f"the error does not name the file: {error}") from error
            raise
        expected = [texts_of(each) for each in naive(name, content, path)]
    found = [contents(record) for record in records]
    if [[_same(text) for text in each] for each in expected] != [[_same(text) for text in each] for each in found]:
        raise Wrong(f"records differ: {expected!r:.150} read as {found!r:.150}")
    examples = iter(rendered.examples)
    for record, count in zip(records, rendered.examples_per_record, strict=True):
        _check_tokens(record, [next(examples) for _ in range(count)])
    return "accepted"


def _same(text: str) -> str:
    """Line ends of a text are those of the file; the plain reader of CSV keeps them, that of text may not."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")


def _may_be_refused(content: bytes) -> bool:
    """True for words that a chat template or the answer's end make unusable on purpose."""
    return b"<|end|>" in content


def _check_tokens(record: Record, examples: list[Any]) -> None:
    """The tokens must be those of `apply_chat_template`, or of the plain text."""
    tokenizer = _tokenizer()
    if record.messages is None or len(examples) != 1 or record.messages[-1]["role"] != "assistant":
        return
    plain = [{k: v for k, v in message.items() if k != "weight"} for message in record.messages]
    wanted = tokenizer.apply_chat_template(plain, tools=record.tools, tokenize=False)
    ids = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    got = examples[0].token_ids.tolist()
    if got != ids[: len(got)] or tokenizer.decode(ids[len(got) :]).strip():
        raise Wrong(f"tokens differ: {tokenizer.decode(got)!r:.200} for {wanted!r:.200}")


def main(arguments: list[str], tell: Callable[[str], None] = print) -> int:
    """Runs the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args(arguments)
    _tokenizer()
    campaign = run(check, range(given.first, given.first + given.count), tell=tell)
    tell(str(campaign))
    return 1 if campaign.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
