"""Tokens that end the model's turn: those of generation_config.json, of the tokenizer and of the chat template.

Chat models often end a turn with a token that is not their `eos_token` and is missing from generation_config.json.
loratune stops at it in `chat` and `eval`, and writes it where it writes a generation_config.json. Other programs stop
only at the tokens in that file, so a note names a missing one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from jinja2 import TemplateSyntaxError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loratune import foreign
from loratune.base.model_config import LIBRARY_FAULTS, refused
from loratune.data.prompting import PromptForm, without_template
from loratune.data.template import chat_text, decode
from loratune.errors import DataError, ModelError

FILE = "generation_config.json"

_MARKER = "loratune"  # an answer to find again in rendered text


def read(source: str) -> GenerationConfig | None:
    """The generation settings of a model's folder or hub id; None if it has none.

    Raises: ModelError: the file is damaged.
    """
    file = _file(source)
    if file is None:
        return None
    stops = foreign.read_json(file, ModelError).get("eos_token_id")
    if not all(type(stop) is int for stop in listed(stops)):
        raise ModelError(f"{file}: eos_token_id is {stops!r}; it must be a token id or a list of token ids")
    try:
        made: GenerationConfig = GenerationConfig.from_pretrained(file.parent)
    except LIBRARY_FAULTS as error:
        raise refused(str(file), "not usable", error) from error
    return made


def stop_ids(generation: object, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end the model's turn.

    Args:
        generation: a GenerationConfig, or a model's configuration in its place.
    """
    end = template_end(tokenizer)
    return declared(generation) | frozenset(listed(tokenizer.eos_token_id)) | frozenset(listed(end))


def declared(generation: object) -> frozenset[int]:
    """Token ids at which other programs stop."""
    return frozenset(listed(getattr(generation, "eos_token_id", None)))


def note(generation: object, tokenizer: PreTrainedTokenizerBase, forms: Sequence[PromptForm]) -> str | None:
    """A sentence about the token that ends an answer of these forms, if other programs do not stop at it."""
    ends = [] if without_template(forms) else listed(template_end(tokenizer))
    if any(form != "conversation" for form in forms):
        ends += listed(tokenizer.eos_token_id)
    known = declared(generation)
    missing = [f'"{decode(tokenizer, [token])}"' for token in dict.fromkeys(ends) if token not in known]
    if not missing:
        return None
    return (
        f"Answers end with {' or '.join(missing)}, which the model's {FILE} does not name as eos_token_id: other "
        f"programs would not stop there. chat and eval stop there, and merge writes the token into {FILE}."
    )


def template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token after an answer in the chat template; None without a template or such a token."""
    if not tokenizer.chat_template:
        return None
    text = render_turns(tokenizer, f"{tokenizer.name_or_path}: its chat template")
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    after = tokenizer(text.rpartition(_MARKER)[2], add_special_tokens=False)["input_ids"] if text else []
    return next((token for token in after if token in special), None)


def render_turns(tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """A question and the answer `_MARKER` through the chat template; "" if it refuses this conversation.

    Raises: ModelError: the template is not valid Jinja.
    """
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARKER}]
    try:
        text = chat_text(tokenizer, turns, None, source=where, answer_next=False)
    except ModelError as error:
        fault = error.__cause__
        if isinstance(fault, TemplateSyntaxError):
            raise ModelError(
                f"{where}:{fault.lineno}: the chat template is not valid Jinja: {fault.message}"
            ) from error
        raise ModelError(f"{where}: {error}") from error
    except DataError:  # it may still accept the data's conversations
        return ""
    return text if _MARKER in text else ""


def listed(value: Any) -> list[Any]:
    """An `eos_token_id` as a list: it may be one id, several, or None."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _file(source: str) -> Path | None:
    if Path(source).is_dir():
        file = Path(source) / FILE
        return file if file.exists() or file.is_symlink() else None
    try:
        return Path(hf_hub_download(source, FILE))
    except EntryNotFoundError:  # a model need not have one
        return None
    except LIBRARY_FAULTS as error:
        raise refused(source, f"{FILE} cannot be read", error) from error
