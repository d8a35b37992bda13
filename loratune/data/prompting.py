"""The form of the prompts that a run trained on, stored beside its adapter.

An adapter answers well only if it is asked as in training. Conversations are shown to the model through the chat
template; a prompt with its completion, and raw text, are shown as they stand. `train` writes the form, and `chat`,
`eval`, `merge` and the model card read it here. An adapter made by another program has no such file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from loratune import atomic, foreign
from loratune.data.record import Record
from loratune.errors import AdapterError

PromptForm = Literal["conversation", "completion", "text"]
FILE = "prompting.json"
_WORDS: dict[PromptForm, str] = {
    "conversation": "conversations in the chat template",
    "completion": "prompts and completions without a template",
    "text": "raw text",
}


def form_of(record: Record) -> PromptForm:
    """The form in which the model sees a record."""
    if record.messages is not None:
        return "conversation"
    return "completion" if record.text is None else "text"


def forms_of(records: Iterable[Record]) -> tuple[PromptForm, ...]:
    """All forms among the records, sorted."""
    return tuple(sorted({form_of(record) for record in records}))


def write(folder: Path, forms: Sequence[PromptForm]) -> None:
    """Stores the forms in an adapter's folder or a merged checkpoint; writes nothing if they are unknown."""
    if forms:
        atomic.write_text(folder / FILE, as_text(forms))


def as_text(forms: Sequence[PromptForm]) -> str:
    """Content of the file."""
    return json.dumps({"forms": list(forms)}) + "\n"


def read(folder: str | Path) -> tuple[PromptForm, ...]:
    """The forms that were stored in a folder; empty if there is no file.

    Raises: AdapterError: the file is damaged.
    """
    file = Path(folder) / FILE
    if not os.path.lexists(file):
        return ()
    try:
        forms = json.loads(foreign.regular(file).read_bytes())["forms"]
        if isinstance(forms, list) and all(form in get_args(PromptForm) for form in forms):
            return tuple(forms)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise AdapterError(f"{file}: damaged; it lists the forms of the training data, such as {as_text(['completion'])}")


def common(folders: Iterable[str | Path]) -> tuple[PromptForm, ...]:
    """The forms of several adapters if they are the same; otherwise empty."""
    forms = {read(folder) for folder in folders}
    return forms.pop() if len(forms) == 1 else ()


def without_template(forms: Sequence[PromptForm]) -> bool:
    """True if the run saw no chat template, so prompts must not have one."""
    return bool(forms) and "conversation" not in forms


def difference(trained: Sequence[PromptForm], asked: Sequence[PromptForm]) -> str | None:
    """A note if records have a form in which the adapter was not trained; None if all agree or nothing is known."""
    new = [form for form in asked if form not in trained]
    if not trained or not new:
        return None
    return f"the adapter was trained on {in_words(trained)}, but these records are {in_words(new)}"


def in_words(forms: Sequence[PromptForm]) -> str:
    """The forms in words."""
    return " and ".join(_WORDS[form] for form in forms)
