"""The model's own chat template and tokenizer, called in the two ways that data needs.

loratune has no templates of its own. The tokenizer's Jinja template renders conversations, as it does in inference.
Templated text is tokenised without adding special tokens, because the template prints them; adding them again would
give two BOS tokens. Text without a template gets the special tokens that the tokenizer puts before a plain prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from loratune.data.record import Message
from loratune.errors import ConfigError, DataError, ModelError

TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


def read_template(path: str) -> str:
    """Reads a Jinja chat template from a file, for a tokenizer with no template or a wrong one.

    Raises: ConfigError: the file is missing, unreadable or empty.
    """
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: {path} cannot be read: {error}") from error
    if not template.strip():
        raise ConfigError(f"chat_template: {path} is empty")
    return template


def require_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Raises ModelError if there is no chat template to render conversations with."""
    if chat_template is None and not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, and the data holds "
            "conversations; name one with --chat-template FILE, or use prompt/completion or raw text data"
        )


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    *,
    source: str,
    chat_template: str | None = None,
    answer_next: bool,
) -> str:
    """Renders a conversation to text.

    Args:
        messages: checked messages; their "weight" is removed before the template sees them.
        source: file:line, for errors.
        chat_template: Jinja text used in place of the tokenizer's own.
        answer_next: end with the header of an answer, after which the model generates.
    Raises:
        DataError: the template rejects the conversation; the message quotes it.
        ModelError: the template has a syntax error.
    """
    shown = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            shown,
            tools=list(tools) if tools else None,
            chat_template=chat_template,
            add_generation_prompt=answer_next,
            tokenize=False,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is broken at line {error.lineno}: {error.message}") from error
    except TEMPLATE_FAULTS as error:
        raise DataError(f"{source}: the chat template refuses this conversation: {error}") from error
    assert isinstance(text, str)  # tokenize=False with one conversation
    return text


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    """Tokenises each distinct text once, without added special tokens. Returns text -> token ids."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    encoded = tokenizer(
        distinct,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about long texts: `render` checks lengths
    )
    return dict(zip(distinct, encoded["input_ids"], strict=True))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, specials: bool = True) -> str:
    """The text of token ids, with or without special tokens, and without clean-up of spaces."""
    text = tokenizer.decode(list(ids), skip_special_tokens=not specials, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # one sequence gives one text
    return text


def plain_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before plain text, such as BOS."""
    framed: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next((at for at in range(len(framed)) if framed[at : at + len(bare)] == bare), 0)
    return framed[:start]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends plain text.

    Raises: ModelError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no end-of-text token (eos_token), which "
            "prompt/completion and raw text data need"
        )
    return int(tokenizer.eos_token_id)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special and added tokens."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
