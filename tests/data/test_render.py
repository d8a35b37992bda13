"""Many records: the order does not depend on the number of processes, and no document is cut or dropped silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.config import DataConfig
from loratune.data.record import Record
from loratune.data.render import RECORDS_PER_BATCH, Rendered, render
from loratune.errors import ConfigError, DataError, ModelError
from tests.data.toy_tokenizers import CHATML, stop_ids, toy_tokenizer

TOKENIZER = toy_tokenizer(CHATML)
STOPS = stop_ids(TOKENIZER)


def chat(number: int, answer: str = "the dog") -> Record:
    messages = ({"role": "user", "content": str(number)}, {"role": "assistant", "content": answer})
    return Record(f"f:{number}", messages)


def rendered(records: list[Record], max_tokens: int | None = None, **settings: object) -> Rendered:
    return render(records, TOKENIZER, DataConfig(**settings), max_tokens=max_tokens, stop_ids=STOPS)  # type: ignore[arg-type]


def test_processes_change_nothing() -> None:
    records = [chat(number) for number in range(2 * RECORDS_PER_BATCH + 3)]
    alone, together = rendered(records, num_proc=1), rendered(records, num_proc=4)
    assert [example.source for example in together.examples] == [record.source for record in records]
    for a, b in zip(alone.examples, together.examples, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.weights.tolist() == b.weights.tolist()


def test_faults_from_processes_keep_their_place_and_are_counted() -> None:
    records = [chat(number, answer="b<|im_end|>c") for number in range(6)]
    for cores in (1, 4):
        with pytest.raises(DataError) as fault:
            rendered(records, num_proc=cores)
        assert [line.split(": ")[0] for line in str(fault.value).splitlines()] == ["f:0", "f:1", "f:2", "and 3 more"]


def test_long_documents_are_refused_with_the_fix() -> None:
    records = [chat(1), chat(2, "the dog " * 50), chat(3, "the dog " * 90)]
    length = len(rendered(records).examples[2])
    with pytest.raises(DataError) as fault:
        rendered(records, max_tokens=60)
    message = str(fault.value)
    assert message.startswith(f"f:3: {length:,} tokens, but at most 60 fit; 2 of 3 records are too long, next: f:2 (")
    assert "--truncate" in message
    assert f"--tokens-per-row to {length}" in message


def test_truncation_is_counted_and_leaves_something_to_train() -> None:
    result = rendered([chat(1), chat(2, "the dog " * 50)], max_tokens=40, truncate=True)
    assert [len(example) for example in result.examples][1] == 40
    (note,) = result.notes
    assert note.startswith("1 of 2 documents were cut to 40 tokens, 1 of them in a trained part")
    prompt_length = int(result.examples[0].weights.argmax())
    with pytest.raises(DataError, match=f"^f:1: no token is left to train on after cutting it to {prompt_length}"):
        rendered([chat(1)], max_tokens=prompt_length, truncate=True)


def test_a_template_from_a_file_is_used_instead(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(CHATML.replace("assistant\n", "assistant:"))
    with pytest.raises(DataError, match="shows the model"):  # now prompt and answer differ: proof that it is used
        rendered([chat(1)], chat_template=str(file))
    file.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        rendered([chat(1)], chat_template=str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        rendered([chat(1)], chat_template=str(tmp_path / "none"))


def test_an_unanswered_last_message_is_said() -> None:
    record = chat(1)
    assert record.messages is not None
    asked = Record("f:1", (*record.messages, {"role": "user", "content": "x"}))
    (note,) = rendered([asked, chat(2)]).notes
    assert note.startswith("1 of 2 conversations end with a message that is not an answer")


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_proc is 0"):
        rendered([chat(1)], num_proc=0)
    with pytest.raises(ConfigError, match="train_on = 'answers' is not one of"):
        rendered([chat(1)], train_on="answers")
    endless = toy_tokenizer()
    endless.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        render([Record("f:1", text="a")], endless, DataConfig(), max_tokens=None, stop_ids=STOPS)
