"""Raw objects to records: the five layouts that fine-tuning data comes in, recognised from their fields.

| format            | fields                                                          | becomes            |
|-------------------|-----------------------------------------------------------------|--------------------|
| messages          | messages (or conversations) of role/content; tools              | messages           |
| sharegpt          | conversations (or messages) of from/value; system; tools        | messages           |
| alpaca            | instruction, output; input, system, history                     | messages           |
| prompt_completion | prompt, completion: two texts, or two lists of messages; tools  | the pair, verbatim |
| text              | text                                                            | raw text           |

If an object has the fields of several, the first in this order counts: data sets often keep a rendered "text" or
a "prompt" beside the real thing. All objects of one file have one format. Every record is checked before anything
is rendered, and what is wrong is said with `file:line` and the nearest fix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from loratune.config import DataFormat
from loratune.data.files import Raw, read_objects
from loratune.data.messages import Message, check_messages, check_tools, from_sharegpt, misspelt
from loratune.errors import ConfigError, DataError, nearest

ERRORS_SHOWN = 3
FORMATS = {  # format -> fields that it needs, for people
    "messages": '"messages"',
    "sharegpt": '"conversations"',
    "alpaca": '"instruction" and "output"',
    "prompt_completion": '"prompt" and "completion"',
    "text": '"text"',
}
USED_FIELDS = {
    "messages": {"messages", "conversations", "tools"},
    "sharegpt": {"messages", "conversations", "tools", "system"},
    "alpaca": {"instruction", "input", "output", "system", "history"},
    "prompt_completion": {"prompt", "completion", "tools"},
    "text": {"text"},
}


@dataclass(frozen=True, slots=True)
class Record:
    """One training example as the user wrote it. Exactly one of messages, (prompt, completion), text is set."""

    source: str
    """Where it stands: "train.jsonl:218"."""
    messages: tuple[Message, ...] | None = None
    """A conversation in OpenAI's shape, for the model's chat template."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may call."""
    prompt: str | None = None
    """Text before the completion, used verbatim, without a template."""
    completion: str | None = None
    text: str | None = None
    """A document of which every token is trained."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The records of some files, and what a person should know about how they were read."""

    records: list[Record]
    notes: list[str] = field(default_factory=list)


def read_records(paths: Sequence[str], format: DataFormat = "auto") -> list[Record]:
    """Reads and checks every record of the files, in order.

    Args:
        paths: data files or hub data set ids, see `files.read_objects`.
        format: layout of all of them; "auto" recognises it from the fields of each file's first object.
    Raises: DataError: something cannot be read or used; says the first few faults and counts the others.
    """
    return read(paths, format).records


def read(paths: Sequence[str], format: DataFormat = "auto") -> Reading:
    """Like `read_records`, with the notes: fields that are not used, how plain text was divided."""
    if not paths:
        raise DataError("no data files were given")
    if format not in get_args(DataFormat):
        raise ConfigError(
            f'format is "{format}"; formats are {", ".join(get_args(DataFormat))}.{nearest(format, FORMATS)}'
        )
    reading = Reading([])
    faults: list[DataError] = []
    for path in paths:
        _read_file(path, format, reading, faults)
    raise_all(faults)
    return reading


def raise_all(faults: Sequence[DataError]) -> None:
    """Raises one DataError that shows the first few faults and counts the rest; returns if there are none."""
    if not faults:
        return
    lines = [str(fault) for fault in faults[:ERRORS_SHOWN]]
    if len(faults) > ERRORS_SHOWN:
        lines.append(f"and {len(faults) - ERRORS_SHOWN} more")
    raise DataError("\n".join(lines)) from faults[0]


def _read_file(path: str, format: DataFormat, reading: Reading, faults: list[DataError]) -> None:
    name: str = format
    unused: Counter[str] = Counter()
    before = len(reading.records)
    for found in read_objects(path):
        if isinstance(found, DataError):
            faults.append(found)
            continue
        raw = Raw(found.source, {key: value for key, value in found.fields.items() if value is not None})
        try:
            recognised = name if format != "auto" else _recognise(raw)
            if name == "auto":
                name = recognised
            elif recognised != name:
                raise DataError(
                    f"{raw.source}: has the fields of {recognised}, but this file began with {name}; put each "
                    "format into a file of its own"
                )
            reading.records.append(CONVERTERS[name](raw))
            unused.update(raw.fields.keys() - USED_FIELDS[name])
        except DataError as fault:
            faults.append(fault)
    if unused:
        reading.notes.append(f"{path}: the fields {_quoted(sorted(unused))} are not used by the format {name}")
    if path.lower().endswith((".txt", ".text", ".md")):
        documents = len(reading.records) - before
        reading.notes.append(f"{path}: {documents:,} documents, separated by blank lines")


def _recognise(raw: Raw) -> str:
    fields = raw.fields
    for name in ("messages", "conversations"):
        if name in fields:
            turns = fields[name]
            first = turns[0] if isinstance(turns, list) and turns else {}
            speaks = isinstance(first, dict) and "role" not in first and ("from" in first or "value" in first)
            return "sharegpt" if speaks else "messages"
    for format, marks in (
        ("alpaca", ("instruction",)),
        ("prompt_completion", ("prompt", "completion")),
        ("text", ("text",)),
    ):
        if any(mark in fields for mark in marks):
            return format
    known = "; ".join(f"{format}: {needs}" for format, needs in FORMATS.items())
    used = set().union(*USED_FIELDS.values())
    near = next((hint for key in fields if (hint := nearest(key, used, limit=1))), "")
    raise DataError(
        f"{raw.source}: cannot tell the format from the fields {_quoted(list(fields)) or 'of an empty object'}. "
        f"Known formats: {known}.{near}"
    )


def _chat(raw: Raw) -> Record:
    value = _need(raw, "messages", "conversations")
    return Record(raw.source, check_messages(raw.source, value), check_tools(raw.source, raw.fields.get("tools")))


def _sharegpt(raw: Raw) -> Record:
    messages = from_sharegpt(raw.source, _need(raw, "conversations", "messages"))
    system = _optional(raw, "system")
    if system:
        messages.insert(0, {"role": "system", "content": system})
    tools = check_tools(raw.source, raw.fields.get("tools"))
    return Record(raw.source, check_messages(raw.source, messages), tools)


def _alpaca(raw: Raw) -> Record:
    instruction, output = _string(raw, "instruction"), _string(raw, "output")
    question = "\n\n".join(part for part in (instruction, _optional(raw, "input")) if part)
    messages: list[Message] = []
    system = _optional(raw, "system")
    if system:
        messages.append({"role": "system", "content": system})
    for number, pair in enumerate(raw.fields.get("history", []), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f'{raw.source}: "history" entry {number} must be a list [instruction, output]')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    if not output.strip():
        raise DataError(f'{raw.source}: "output" is empty, so there is nothing to train on')
    return Record(raw.source, check_messages(raw.source, messages))


def _prompt_completion(raw: Raw) -> Record:
    prompt, completion = _need(raw, "prompt"), _need(raw, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        context = [_as_context(message) for message in prompt]
        messages = check_messages(raw.source, context + completion)
        return Record(raw.source, messages, check_tools(raw.source, raw.fields.get("tools")))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError(f'{raw.source}: "prompt" and "completion" must both be texts, or both lists of messages')
    if "tools" in raw.fields:
        raise DataError(f'{raw.source}: "tools" need a chat template, so "prompt" must be a list of messages')
    prompt, completion = _string(raw, "prompt"), _string(raw, "completion")
    if not completion:
        raise DataError(f'{raw.source}: "completion" is empty, so there is nothing to train on')
    return Record(raw.source, prompt=prompt, completion=completion)


def _as_context(message: Any) -> Any:
    if isinstance(message, dict) and message.get("role") == "assistant":
        return message | {"weight": 0}
    return message


def _raw_text(raw: Raw) -> Record:
    text = _string(raw, "text")
    if not text.strip():
        raise DataError(f'{raw.source}: "text" is empty, so there is nothing to train on')
    return Record(raw.source, text=text)


def _need(raw: Raw, *names: str) -> Any:
    for name in names:
        if name in raw.fields:
            return raw.fields[name]
    hint = misspelt(names[0], raw.fields)
    raise DataError(f'{raw.source}: has no "{names[0]}", but {_quoted(list(raw.fields))}.{hint}')


def _string(raw: Raw, name: str) -> str:
    value = _need(raw, name)
    if isinstance(value, float) and value != value:
        raise DataError(f'{raw.source}: "{name}" is NaN, a missing value; fill it in or leave the record out')
    if not isinstance(value, str):
        raise DataError(f'{raw.source}: "{name}" must be a string, not {type(value).__name__}')
    return value


def _optional(raw: Raw, name: str) -> str:
    return _string(raw, name) if name in raw.fields else ""


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


CONVERTERS: dict[str, Callable[[Raw], Record]] = {
    "messages": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _raw_text,
}
