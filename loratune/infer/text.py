"""Answers to texts and conversations: prompts are rendered and tokenised, answers decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune.base.load import stop_ids
from loratune.data.record import Message, quoted
from loratune.data.template import chat_text, decode, encode, plain_prefix, require_template
from loratune.errors import ArgumentError, DataError, expect
from loratune.infer import engine

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation as a list of messages, {"role": ..., "content": ...}."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    batch_size: int = engine.BATCH_SIZE,
    template: bool | None = None,
) -> str | list[str]:
    """Answers one prompt or many with the adapters in use.

    Args:
        prompts: a text; a conversation, which is a list of messages; or a list of texts or conversations.
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_p, top_k: sample only from the likeliest tokens; 1 and 0 allow all.
        seed: makes sampled answers repeatable.
        batch_size: prompts decoded together; lower it if memory runs out.
        template: True renders a text as the user's message with the chat template, as `loratune chat` does. False
            continues the text verbatim, as for prompt/completion data. By default True if there is a template.

    Returns: the answer, or a list of answers in the order of the prompts.
    Raises:
        ArgumentError: an argument has the wrong type.
        ConfigError: a sampling value is out of range.
        DataError: a conversation is malformed, or a prompt is empty or too long for the model.
        ModelError: the tokenizer has no chat template, and a conversation needs one.
    """
    call = "generate(model, tokenizer, prompts)"
    expect(model, PreTrainedModel, "model", call)
    expect(tokenizer, PreTrainedTokenizerBase, "tokenizer", call, "load_tokenizer() loads it.")
    single = isinstance(prompts, str) or _is_conversation(prompts)
    listed: Sequence[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]
    answers = engine.generate(
        model,
        [_tokens(tokenizer, prompt, f"prompt {number}", template) for number, prompt in enumerate(listed, 1)],
        stop_ids=stop_ids(model, tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        batch_size=batch_size,
    )
    texts = [decode(tokenizer, answer, specials=False) for answer in answers]
    return texts[0] if single else texts


def _is_conversation(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(turn, Mapping) for turn in prompt)


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: object, source: str, template: bool | None) -> list[int]:
    """Token ids of one prompt."""
    if isinstance(prompt, str):
        use_template = bool(tokenizer.chat_template) if template is None else template
        if not use_template:
            return plain_prefix(tokenizer) + encode(tokenizer, [prompt]).get(prompt, [])
        messages: Sequence[Message] = [{"role": "user", "content": prompt}]
    elif _is_conversation(prompt):
        assert isinstance(prompt, Sequence)
        messages = [dict(turn) for turn in prompt]
        for place, turn in enumerate(messages, 1):
            if not isinstance(turn.get("role"), str) or "content" not in turn:
                raise DataError(f'{source}: message {place} needs a "role" and a "content", but has {quoted(turn)}')
    else:
        raise ArgumentError(
            f"{source} is a {type(prompt).__name__}; a prompt is a text, or a list of messages such as "
            '{"role": "user", "content": "..."}. For token ids use loratune.infer.engine.generate'
        )
    require_template(tokenizer, None)
    text = chat_text(tokenizer, messages, None, source=source, answer_next=True)
    return encode(tokenizer, [text])[text]
