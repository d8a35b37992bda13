"""Templates give transformers' text, within limits of time and size, and their faults are one error."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loratune.box import MODEL_DIR
from loratune.data.sandbox import TemplateEnvironment
from loratune.data.template import ChatTemplate, read_template
from loratune.errors import DataError, LoratuneError, ModelError
from tests.data.toy_tokenizers import TEMPLATES, toy_tokenizer

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
NAMESPACE = "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}"
DAY = datetime(2026, 1, 2)

HANGING = [
    "{{ 10 ** (10 ** 10) }}",
    "{% set n = 10 %}{{ n ** (n ** n) }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in messages * 3000 %}{% for b in messages * 3000 %}{{ b.role }}{% endfor %}{% endfor %}",
    "{{ messages | tojson(indent=100000000) }}",
    "{{ strftime_now('%A' * 1000000) }}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ 'x' | center(999999999) }}",
    "{{ 'x'.ljust(999999999) }}",
    "{{ ('x' * 20000) | indent(1000000) }}",
    "{{ 'x' | replace('', 'y' * 1000000) | replace('', 'y' * 1000000) }}",
    "{{ ' '.join(['a' * 1000000] * 1000000) }}",
    "{{ 1.5 | round(1000000000, 'ceil') }}",
    NAMESPACE + "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    NAMESPACE + "{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    NAMESPACE + "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    NAMESPACE + "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "{% set x %}{% for i in range(100000) %}{{ 'y' * 1000000 }}{% endfor %}{% endset %}",
    "{{ range(100000) | map('center', 100000) | join }}",
    "{{ [[1] * 1000000] * 1000000 }}",
]


EVERYTHING = """{% set ns = namespace(t='') %}
{% for m in messages if m.role != 'x' %}{{ loop.index ~ loop.length ~ loop.last }}
{% set ns.t = ns.t + m.role * 2 ~ 1 ~ none ~ x %}{{ loop.previtem.role if not loop.first }}{{ '%s!' % m.content }}
{% generation %}{{ m.content | upper | indent(2) }}{% endgeneration %}{% else %}none{% endfor %}{{ ns.t }}
{% for k, v in messages[0].items() %}{{ k }}{{ v }}{% if loop.first %}{% continue %}{% endif %}{% endfor %}
{% macro f(a, b=2) %}<{{ a + b }}>{{ caller() if caller }}{% endmacro %}{{ f(1) }}{% call f(2) %}in{% endcall %}
{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}{{ 7 ** 2 % 5 * 3 }}
{{ messages | map(attribute='role') | list }}{{ messages | tojson(indent=1) }}{{ range(3) | sum }}{{ {} or none }}"""


def text(template: str, answer_next: bool = False) -> str:
    chat = ChatTemplate(toy_tokenizer(template), date=DAY)
    return chat.render(chat.shown(CHAT), None, source="f:1", answer_next=answer_next)


@pytest.mark.parametrize("template", HANGING)
def test_a_template_that_would_hang_is_refused_within_a_second(template: str) -> None:
    started = time.process_time()
    with pytest.raises(ModelError, match="the chat template"):
        text(template)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% set n = 0 %}{{ 1 // n }}", DataError),
        ("{% set n = 0 %}{{ 1 % n }}", DataError),
        ("{% set n = 10.0 %}{{ n ** 999999 }}", DataError),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DataError),
        ("{{ {}.pop('x') }}", DataError),
        ("{{ [].index(3) }}", DataError),
        ("{{ 'a'.encode('no such codec') }}", DataError),
        ("{{ messages[0].content.x.y }}", DataError),
        ("{% include 'x' %}", DataError),
        ("{{ raise_exception('no') }}", DataError),
        ("{{ ''.__class__.__mro__ }}", DataError),
        ("{{ x | nofilter }}", ModelError),
        ("{% for %}", ModelError),
        ("".join(f"{{% for a{i} in [1] %}}" for i in range(30)) + "{% endfor %}" * 30, ModelError),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", ModelError),
    ],
)
def test_faults_of_templates_are_errors_for_users(template: str, error: type[LoratuneError]) -> None:
    with pytest.raises(error, match="the chat template"):
        text(template)


@pytest.mark.parametrize("name", [*TEMPLATES, "pocket", "all"])
def test_the_text_is_that_of_transformers(name: str) -> None:
    tokenizer = toy_tokenizer(TEMPLATES.get(name, EVERYTHING))
    if name == "pocket":
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    for n in range(1, 6):
        for answer_next in (False, True):
            expected = tokenizer.apply_chat_template(CHAT[:n], tokenize=False, add_generation_prompt=answer_next)
            chat = ChatTemplate(tokenizer)
            assert chat.render(chat.shown(CHAT[:n]), None, source="f", answer_next=answer_next) == expected


def test_the_clock_of_a_template_stands_still() -> None:
    assert text("{{ strftime_now('%d %b %Y %H:%M') }}") == "02 Jan 2026 00:00"
    assert TemplateEnvironment(DAY).from_string("{{ strftime_now('') }}").render() == ""


def test_a_byte_order_mark_before_a_template_is_not_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes("\ufeff{{ messages[0].role }}".encode())
    assert read_template(str(tmp_path / "a.jinja")) == "{{ messages[0].role }}"
    assert text("\ufeff{{ messages[0].role }}") == "user"  # a tokenizer's own
