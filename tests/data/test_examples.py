"""Training examples equal inference.

The prompt has the same tokens, and the loss counts exactly the tokens that the model would generate.
"""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from loratune.config import DataConfig, TrainOn
from loratune.data.messages import check_messages
from loratune.data.record import Record
from loratune.data.render import Example, Rendered, prompt_ids, reference, render
from loratune.errors import DataError, ModelError
from tests.data.toy_tokenizers import (
    CHATML,
    LLAMA2,
    LLAMA3,
    NO_STOP,
    QWEN3,
    REWRITES,
    STOPS,
    TEMPLATES,
    metaspace_tokenizer,
    space_prefix_tokenizer,
    stop_ids,
    toy_tokenizer,
)

WORDS = ["the", "quick", " brown", "\n", "  ", "date?", "é", "日本", "hello,", "<b>", "\t", "dog."]
TOKENIZER = toy_tokenizer()


def tokenizer_for(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = TOKENIZER
    tokenizer.chat_template = template
    return tokenizer


def rendered(
    records: list[Record],
    template: str | None = CHATML,
    *,
    train_on: TrainOn = "assistant",
    max_tokens: int | None = None,
    truncate: bool = False,
    stops: tuple[str, ...] = (),
) -> Rendered:
    tokenizer = tokenizer_for(template)
    config = DataConfig(train_on=train_on, truncate=truncate)
    return render(records, tokenizer, config, max_tokens=max_tokens, stop_ids=stop_ids(tokenizer, *stops))


def chat(*contents: str, system: str | None = None, **last: Any) -> Record:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for number, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    messages[-1] |= last
    return Record("f:1", check_messages("f:1", messages))


def random_chat(rng: random.Random, system: bool) -> Record:
    texts = ["x" + "".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(2 * rng.randint(1, 3))]
    return chat(*texts, system="be brief" if system else None)


def spans(example: Example) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.weights > 0, [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def trained_text(example: Example) -> list[str]:
    return [TOKENIZER.decode(example.token_ids[start:end]) for start, end in spans(example)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_before_each_answer_stands_what_the_model_sees_in_use(name: str) -> None:
    """For random conversations: the prompt token by token, the answer up to its stop token, nothing else trained."""
    rng = random.Random(name)
    tokenizer = tokenizer_for(TEMPLATES[name])
    (stop,) = stop_ids(tokenizer, STOPS[name])
    for _ in range(40):
        record = random_chat(rng, system=name not in ("gemma", "llama2") and rng.random() < 0.5)
        assert record.messages is not None
        result = rendered([record], TEMPLATES[name], stops=(STOPS[name],))
        found = [(example, span) for example in result.examples for span in spans(example)]
        answers = [at for at, message in enumerate(record.messages) if message["role"] == "assistant"]
        assert len(found) == len(answers)
        for (example, (start, end)), answer in zip(found, answers, strict=True):
            prompt = tokenizer.apply_chat_template(
                record.messages[:answer], add_generation_prompt=True, return_dict=False
            )
            assert example.token_ids[:start].tolist() == prompt
            assert example.token_ids[end - 1] == stop
            assert stop not in example.token_ids[start : end - 1]
            full = tokenizer.apply_chat_template(record.messages[: answer + 1], tokenize=False)
            text = tokenizer.decode(example.token_ids[:end])
            assert full.startswith(text)
            assert full[len(text) :].strip() == ""


def test_a_stable_template_gives_one_example_with_all_answers() -> None:
    result = rendered([chat("a", "b", "c", "d")])
    assert [trained_text(example) for example in result.examples] == [["b<|im_end|>", "d<|im_end|>"]]
    assert result.notes == []


def test_a_template_that_rewrites_the_past_gives_one_example_per_answer_and_says_so() -> None:
    answer = "<think>\nhm\n</think>\n\nb"
    result = rendered([chat("a", answer, "c", "d"), chat("a", answer)], QWEN3)
    assert [trained_text(example) for example in result.examples] == [
        [answer + "<|im_end|>"],
        ["<think>\n\n</think>\n\nd<|im_end|>"],
        [answer + "<|im_end|>"],
    ]
    assert "hm" not in TOKENIZER.decode(result.examples[1].token_ids)  # earlier answers lost their reasoning
    assert result.examples_per_record == [2, 1]
    assert len(result.notes) == 1
    assert "1 of 2 conversations became one example per answer" in result.notes[0]


def test_a_system_message_that_moves_to_the_last_question_gives_one_example_per_answer() -> None:
    assert len(rendered([chat("a", "b", "c", "d", system="s")], TEMPLATES["mistral"]).examples) == 2
    assert len(rendered([chat("a", "b", "c", "d")], TEMPLATES["mistral"]).examples) == 1


@pytest.mark.parametrize("template", [LLAMA2, LLAMA3])
def test_a_template_that_prints_bos_gives_one_bos(template: str) -> None:
    (example,) = rendered([chat("a", "b")], template).examples
    assert example.token_ids.tolist().count(TOKENIZER.bos_token_id) == 1


def test_plain_text_gets_the_tokenizers_bos_and_eos_once() -> None:
    bos, eos = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    records = [
        Record("f:1", text="the dog"),
        Record("f:2", text="<s>the dog</s>"),
        Record("f:3", prompt="the", completion=" dog"),
        Record("f:4", prompt="<s>the", completion=" dog</s>"),
    ]
    body = TOKENIZER("the dog", add_special_tokens=False)["input_ids"]
    examples = rendered(records).examples
    for example in examples:
        assert example.token_ids.tolist() == [bos, *body, eos]
    assert [trained_text(example) for example in examples] == [["the dog</s>"]] * 2 + [[" dog</s>"]] * 2


def test_no_token_spans_the_boundary_between_prompt_and_completion() -> None:
    """ "the" + " " + "dog" would be tokenised as "the", " dog"; in inference " " ends the prompt."""
    (example,) = rendered([Record("f:1", prompt="the ", completion="dog")]).examples
    prompt = TOKENIZER("the ")["input_ids"]
    assert example.token_ids[: len(prompt)].tolist() == prompt
    assert trained_text(example) == ["dog</s>"]


def test_an_answer_inside_a_word_gets_no_space_before_it() -> None:
    """Tokenised on its own, "re" would become " re"."""
    tokenizer = space_prefix_tokenizer()
    record = Record("f:1", prompt="the dog and the", completion="re")
    (example,) = render([record], tokenizer, DataConfig(), max_tokens=None, stop_ids=frozenset()).examples
    assert tokenizer.decode(example.token_ids) == "the dog and there</s>"


@pytest.mark.parametrize("tokenizer", [space_prefix_tokenizer(), *map(metaspace_tokenizer, ("first", "always"))])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the answer: ", "paris"),
        ("par", "is"),
        ("the", " dog"),
        ("the ", " dog"),
        ("a:", "\nb"),
        ("", "dog"),
        ("a\n", "b"),
    ],
)
def test_tokens_decode_to_prompt_and_completion(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> None:
    """For tokenizers that put a space before a text: no second space, no split word, and the prompt of inference."""
    record = Record("f:1", prompt=prompt, completion=completion)
    (example,) = render([record], tokenizer, DataConfig(), max_tokens=None, stop_ids=frozenset()).examples
    start = int(example.weights.argmax())
    whole = tokenizer("" + prompt + completion, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(example.token_ids[:-1]) == tokenizer.decode(whole)
    if prompt:
        assert example.token_ids[:start].tolist() == prompt_ids(record, tokenizer)


def test_which_answers_are_trained() -> None:
    assert trained_text(rendered([chat("a", "b", "c", "d")], train_on="last").examples[0]) == ["d<|im_end|>"]
    (example,) = rendered([chat("a", "b")], train_on="all").examples
    assert example.weights[0] == 0  # the first token has no predecessor
    assert example.weights[1:].all()
    assert rendered([Record("f:1", prompt="a", completion="b")], train_on="all").examples[0].weights[1:].all()
    assert trained_text(rendered([chat("a", "b", "c", "d", weight=0)]).examples[0]) == ["b<|im_end|>"]
    with pytest.raises(DataError, match=r'^f:1: the last answer has "weight": 0'):
        rendered([chat("a", "b", "c", "d", weight=0)], train_on="last")


def test_tools_and_calls_reach_the_template_and_may_not_get_lost() -> None:
    with_tools = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    )
    calls = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    messages = check_messages(
        "f:1", [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "tool_calls": calls}]
    )
    record = Record("f:1", messages, tools=[{"type": "function", "function": {"name": "add"}}])
    (example,) = rendered([record], with_tools).examples
    assert TOKENIZER.decode(example.token_ids).startswith("[add]")
    assert trained_text(example) == ['{"name": "add", "arguments": "{\\"a\\": 1}"}<|im_end|>']  # text stays text
    with pytest.raises(DataError, match='f:1: message 2: the chat template does not show the function "add"'):
        rendered([record], CHATML)


def test_templates_that_cannot_be_trained_are_refused_before_training() -> None:
    with pytest.raises(DataError, match=r"f:1: message 2: the chat template ends the answer .* without a stop token"):
        rendered([chat("a", "b")], NO_STOP)
    with pytest.raises(DataError, match=r"f:1: message 2: the chat template shows the model .* before it answers"):
        rendered([chat("a", "b")], REWRITES)
    with pytest.raises(DataError, match=r"f:1: message 3: .*System role not supported"):
        rendered([chat("a", "b", system="s")], TEMPLATES["gemma"])
    with pytest.raises(DataError, match="f:1: message 2: the answer continues after the stop token"):
        rendered([chat("a", "b<|im_end|>c")])
    with pytest.raises(ModelError, match="the chat template is broken at line 1"):
        rendered([chat("a", "b")], "{% if %}")
    with pytest.raises(ModelError, match=r"has no chat template.*--chat-template FILE"):
        rendered([chat("a", "b")], None)


def test_a_stop_token_unknown_to_the_model_is_trained_and_said() -> None:
    result = rendered([chat("a", "b")], CHATML, stops=("</s>",))
    assert trained_text(result.examples[0]) == ["b<|im_end|>"]
    assert 'Answers end with "<|im_end|>", which is not among' in result.notes[0]


def test_text_that_the_template_drops_is_said() -> None:
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    result = rendered([chat("a", "b", system="be brief")], deaf)
    assert 'leaves out or rewrites text of the role "system" (messages: 1)' in result.notes[0]


def test_use_after_training_sees_the_trained_prompt_and_expects_the_trained_answer() -> None:
    for template in TEMPLATES.values():
        record = chat("a", "b ", "c", "d\n")
        tokenizer = tokenizer_for(template)
        example = rendered([record], template).examples[-1]
        start, end = spans(example)[-1]
        assert prompt_ids(record, tokenizer) == example.token_ids[:start].tolist()
        answer = tokenizer.decode(example.token_ids[start:end], skip_special_tokens=True)
        assert reference(record, tokenizer, stop_ids(tokenizer)) == answer
    pair = Record("f:1", prompt="the", completion=" dog")
    assert prompt_ids(pair, TOKENIZER) == TOKENIZER("the")["input_ids"]
    assert reference(pair, TOKENIZER, frozenset()) == " dog"
    with pytest.raises(DataError, match="f:1: raw text has no question"):
        prompt_ids(Record("f:1", text="a"), TOKENIZER)


TOOL_TEXTS = [
    "{{ c.function.name }} {{ c.function.arguments }}",
    "{{ c.function.name + c.function.arguments }}",
    "{{ c.function | tojson }}",
    "{{ c.id }}{{ c.function.name }}{% if c.function.arguments is string %}{{ c.function.arguments }}{% endif %}",
]


@pytest.mark.parametrize("arguments", ['{"city": "Oslo",  "now": true}', "{}", {"a": 1}, None])
@pytest.mark.parametrize(
    "printed",
    [
        "{{ c | tojson }}",
        "{{ c.name }} {{ c.arguments }}",
        "{% if c.function %}{% set c = c.function %}{% endif %}{{ c.name }}{{ c.arguments | tojson }}",
        "{% if c.function is defined %}F{% endif %}{{ c.type is defined }}{{ c }}",
    ],
)
def test_flat_tool_calls_render_as_in_apply_chat_template(printed: str, arguments: object) -> None:
    """Calls without "function", as some data sets store them, are shown to the template as they stand."""
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content or '' }}{% for c in m.tool_calls or [] %}" + printed + "{% endfor %}"
    )
    call = {"name": "weather", "arguments": arguments}
    raw = [
        {"role": "user", "content": "how warm"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
    ]
    (example,) = rendered([Record("f:1", check_messages("f:1", raw))], template).examples
    text = tokenizer_for(template).apply_chat_template(raw, tokenize=False)
    assert TOKENIZER.decode(example.token_ids) == text


def test_a_template_for_other_calls_refuses_flat_calls_with_file_and_line() -> None:
    template = CHATML.replace("{{ m.content }}", "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}")
    call = {"name": "weather", "arguments": "{}"}
    messages = check_messages("f:1", [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(DataError, match=r"^f:1.* refuses this conversation: .*function"):
        rendered([Record("f:1", messages)], template)


@pytest.mark.parametrize("printed", TOOL_TEXTS)
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {"content": "I look"}, {}])
@pytest.mark.parametrize("arguments", ['{"city": "Oslo",  "now": true}', '{"é": [1.50, null]}', "{}", {"a": 1}])
def test_tool_calls_render_as_in_apply_chat_template(
    printed: str, content: dict[str, Any], arguments: object
) -> None:
    if "+" in printed and not isinstance(arguments, str):
        return  # such templates accept text only
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content or '' }}{% for c in m.tool_calls or [] %}" + printed + "{% endfor %}"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    raw = [{"role": "user", "content": "how warm"}, {"role": "assistant", **content, "tool_calls": [call]}]
    (example,) = rendered([Record("f:1", check_messages("f:1", raw))], template).examples
    text = tokenizer_for(template).apply_chat_template(raw, tokenize=False)
    assert TOKENIZER.decode(example.token_ids) == text


def test_arguments_that_a_template_prints_as_a_string_in_quotes_are_said() -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = check_messages("f:1", [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}])
    (note,) = rendered([Record("f:1", messages)], template).notes
    assert note.startswith("Tool arguments are JSON in a string")


@pytest.mark.parametrize("flag", ["weight", "train", "training", "trainable", "loss", "loss_mask"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_answers_marked_as_not_trained_are_context(flag: str, value: object) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m | tojson }}")  # would show a flag that is left
    raw = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    raw[0][flag], raw[1][flag], raw[3][flag] = value, value, 1  # type: ignore[assignment]
    (example,) = rendered([Record("f:1", check_messages("f:1", raw))], template).examples
    assert trained_text(example) == ['{"role": "assistant", "content": "d"}<|im_end|>']
    assert flag not in TOKENIZER.decode(example.token_ids)


def test_fields_that_the_template_does_not_print_are_said() -> None:
    raw = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b", "mood": {"x": [1]}}]
    messages = check_messages("f:1", [raw[0], raw[1] | {"reasoning_content": "long thought"}])
    notes = rendered([Record("f:1", messages)]).notes
    assert [note.split('"')[1] for note in notes] == ["name", "mood", "reasoning_content"]
    thinking = CHATML.replace(
        "{{ m.content }}", "{{ m.reasoning_content }}{{ m.name }}{{ m.mood | tojson if m.mood }}{{ m.content }}"
    )
    result = rendered([Record("f:1", messages)], thinking)
    assert result.notes == []
    assert trained_text(result.examples[0]) == ['long thought{"x": [1]}b<|im_end|>']


def test_a_conversation_with_thousands_of_answers_is_refused_at_once() -> None:
    started = time.process_time()
    with pytest.raises(DataError, match=r"f:1: has 1,500 answers.*limit is 512.*--train-on last"):
        rendered([chat(*["a"] * 3000)])
    assert time.process_time() - started < 1
    assert len(rendered([chat(*["a"] * 3000)], train_on="last").examples) == 1


def test_half_a_surrogate_pair_is_refused_wherever_it_is() -> None:
    for record in (
        chat("a", "b\ud83d"),
        Record("f:1", text="\ud83d"),
        Record("f:1", prompt="\udc00", completion="b"),
    ):
        with pytest.raises(DataError, match=r"^f:1: .*is half of a surrogate pair"):
            rendered([record])
