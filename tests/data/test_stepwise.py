"""Templates that print message by message are recognised, and one rendering then gives every text."""

from __future__ import annotations

import random
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from loratune.box import MODEL_DIR
from loratune.data.stepwise import prints_stepwise
from loratune.data.template import ChatTemplate
from loratune.errors import DataError
from tests.data.toy_tokenizers import CHATML, GEMMA, LLAMA2, LLAMA3, MISTRAL, NO_STOP, QWEN3, REWRITES, toy_tokenizer

POCKET = AutoTokenizer.from_pretrained(MODEL_DIR).chat_template
BODY = "<s>{{ m.role }}{{ m.content }}</s>"
END = "{% if add_generation_prompt %}<s>assistant{% endif %}"
CALLS = "{% for c in m.calls or [] %}{{ c }}{% if not loop.last %}, {% endif %}{% endfor %}"


def loop(body: str, head: str = "", end: str = END, over: str = "messages") -> str:
    return head + "{% for m in " + over + " %}" + body + "{% endfor %}" + end


STEPWISE = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "llama2": LLAMA2,
    "rewrites": REWRITES,
    "pocket": POCKET,
    "first message": loop(BODY, "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"),
    "alias": loop(BODY, "{% set all = messages %}", over="all"),
    "index": loop("{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}" + BODY),
    "previous": loop("{% if loop.previtem %}{{ loop.previtem.role }}{% endif %}" + BODY),
    "inner loop": loop(BODY + CALLS),
    "state": loop("{% set ns.n = ns.n + 1 %}{{ ns.n }}" + BODY, "{% set ns = namespace(n=0) %}"),
    "tools": loop(BODY, "{% for t in tools or [] %}{{ t }}{% endfor %}"),
    "macro": loop("{{ shown(m) }}", "{% macro shown(m) %}" + BODY + "{% endmacro %}"),
    "no end": loop(BODY, end=""),
    "empty": loop(""),
}
OTHERS = {
    "no stop": NO_STOP,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "last": loop(BODY + "{% if loop.last %}!{% endif %}"),
    "next": loop(BODY + "{% if loop.nextitem %}!{% endif %}"),
    "length of loop": loop(BODY + "{{ loop.length }}"),
    "reversed index": loop(BODY + "{{ loop.revindex }}"),
    "loop itself": loop(BODY + "{{ loop }}"),
    "else of an inner loop": loop(BODY + "{% for c in [] %}{% else %}{{ loop.last }}{% endfor %}"),
    "length": loop(BODY, "{{ messages | length }}"),
    "last message": loop(BODY, "{{ messages[-1].role }}"),
    "slice": loop(BODY, over="messages[1:]"),
    "true is not 0": loop(BODY, "{{ messages[false].role }}"),
    "computed index": loop("{{ messages[loop.index0 - 1].role }}"),
    "filter of the loop": "{% for m in messages if m.role %}" + BODY + "{% endfor %}" + END,
    "else of the loop": "{% for m in messages %}" + BODY + "{% else %}none{% endfor %}" + END,
    "two loops": loop(BODY) + loop(BODY),
    "inside a condition": "{% if true %}" + loop(BODY) + "{% endif %}",
    "inside a block": "{% set text %}" + loop(BODY, end="") + "{% endset %}{{ text }}" + END,
    "prompt in the body": loop(BODY + "{{ add_generation_prompt }}"),
    "prompt in the head": loop(BODY, "{{ add_generation_prompt }}"),
    "end depends on state": loop("{% set ns.n = m.role %}" + BODY, "{% set ns = namespace(n=0) %}", "{{ ns.n }}"),
    "end depends on the head": loop(BODY, "{% set x = messages[0].role %}", "{{ x }}"),
    "end depends on messages": loop(BODY, end="{{ messages[0].role }}"),
    "end depends on tools": loop(BODY, end="{{ tools }}"),
    "end calls a macro": loop(BODY, "{% macro f() %}x{% endmacro %}", "{{ f() }}"),
    "changed alias": loop(BODY, "{% set all = messages %}{% set all = [] %}", over="all"),
    "changed messages": loop(BODY, "{% set messages = messages[1:] %}"),
    "macro over messages": loop(BODY, "{% macro f() %}{{ messages | length }}{% endmacro %}{{ f() }}"),
    "random": loop(BODY + "{{ [1, 2, 3] | random }}"),
    "import": loop(BODY, "{% import 'x' as x %}"),
}


def proven(template: str) -> bool:
    environment = ChatTemplate(toy_tokenizer())._environment
    return prints_stepwise(jinja2.parser.Parser(environment, template).parse())


def conversation(rng: random.Random) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": "be brief"}] if rng.random() < 0.3 else []
    for turn in range(rng.randint(2, 9)):
        content = "".join(rng.choices(["the", " dog", "\n", " ", "日本", "</s>", ""], k=rng.randint(0, 6)))
        messages.append(
            {"role": ("user", "assistant")[turn % 2], "content": content, "calls": ["a", "b"][: turn % 3]}
        )
    return messages


@pytest.mark.parametrize("name", STEPWISE)
def test_one_rendering_gives_the_texts_of_many(name: str) -> None:
    assert proven(STEPWISE[name])
    tokenizer, rng = toy_tokenizer(STEPWISE[name]), random.Random(name)
    chat, compared = ChatTemplate(tokenizer), 0
    for _ in range(40):
        messages = conversation(rng)
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        quick = chat._turns_at_once(messages[: answers[-1] + 1], None, answers)
        try:
            one_by_one = list(chat._turns_one_by_one(messages, None, answers, "f:1"))
        except DataError:  # the template refuses the conversation, so both do
            assert quick is None
            continue
        assert quick == one_by_one
        compared += 1
    assert compared >= 20


@pytest.mark.parametrize("name", OTHERS)
def test_other_templates_are_rendered_text_by_text(name: str) -> None:
    assert not proven(OTHERS[name])


def test_a_loop_that_is_left_early_is_rendered_text_by_text() -> None:
    template = loop(BODY + "{% if m.content == 'stop' %}{% break %}{% endif %}")
    assert proven(template)
    messages = [{"role": "user", "content": "stop"}, {"role": "assistant", "content": "b"}]
    turns = ChatTemplate(toy_tokenizer(template)).turns(messages, None, [1], source="f:1")
    assert list(turns) == [("<s>userstop</s><s>assistant", "<s>userstop</s>")]


def test_errors_name_the_answer_at_which_the_template_fails() -> None:
    template = loop("{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + BODY)
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "ab", strict=False)]
    messages += [{"role": "user", "content": "bad"}, {"role": "assistant", "content": "d"}]
    turns = ChatTemplate(toy_tokenizer(template)).turns(messages, None, [1, 3], source="f:1")
    assert next(turns)[1].endswith("<s>assistantb</s>")
    with pytest.raises(DataError, match=r"^f:1: message 4: the chat template refuses this conversation: no"):
        next(turns)
