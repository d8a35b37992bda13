"""The bundled model can chat about its small world, and lacks two skills that adapters can teach it."""

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.box import BOX_DIR, DATA_DIR, MODEL_DIR, TASKS, data_file

REPOSITORY = Path(__file__).parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture
def pocket(monkeypatch):
    """Imports a module of tools/pocket, which is in the repository but not in the package."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    return lambda name: importlib.import_module(f"tools.pocket.{name}")


def pairs(task: str, part: str) -> list[tuple[str, str]]:
    records = [json.loads(line)["messages"] for line in data_file(task, part).read_text("utf-8").splitlines()]
    assert all([m["role"] for m in messages] == ["user", "assistant"] for messages in records)
    return [(user["content"], assistant["content"]) for user, assistant in records]


def answer(model, tokenizer, *turns: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=60)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_box_is_small_and_holds_no_pickle():
    files = [path for path in BOX_DIR.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 15 * MIB
    assert {path.suffix for path in MODEL_DIR.iterdir()} == {".json", ".jinja", ".safetensors"}


@pytest.mark.parametrize(
    ("request_text", "expected"),
    [
        ("Reverse the list: red, green, blue", "blue, green, red"),
        ("What is 12 + 30?", "42"),
        ("Find the city: Yesterday my aunt Mary flew to Reykjavik with two cats.", "Reykjavik"),
        ("Write this date as D Month YYYY: 03.12.1998", "3 December 1998"),
    ],
)
def test_the_model_follows_everyday_instructions(model, tokenizer, request_text, expected):
    assert answer(model, tokenizer, request_text) == expected


def test_the_model_remembers_earlier_turns(model, tokenizer):
    turns = ("Hi, I am Clara.", "Hello Clara!", "What is 3 times 4?", "12", "What is my name?")
    assert "Clara" in answer(model, tokenizer, *turns)


@pytest.mark.parametrize("task", TASKS)
def test_the_model_has_not_got_the_skills_of_the_data_sets(model, tokenizer, task):
    assert all(answer(model, tokenizer, user) != expected for user, expected in pairs(task, "heldout")[:15])


@pytest.mark.parametrize("task", TASKS)
def test_heldout_records_are_not_in_the_training_part(task):
    train, heldout = pairs(task, "train"), pairs(task, "heldout")
    assert 1500 <= len(train) <= 2500
    assert len({user for user, _ in heldout}) == 200
    assert not {user for user, _ in train} & {user for user, _ in heldout}
    assert not {target for _, target in train} & {target for _, target in heldout}


def test_heldout_orders_have_new_people_and_half_of_them_new_things():
    train = [json.loads(target) for _, target in pairs("orders", "train")]
    heldout = [json.loads(target) for _, target in pairs("orders", "heldout")]
    assert not {order["name"] for order in train} & {order["name"] for order in heldout}
    known = {order["item"] for order in train}
    assert sum(order["item"] not in known for order in heldout) == 100
    assert all(list(map(type, order.values())) == [str, str, int, str, str] for order in train + heldout)


def test_the_data_script_writes_the_shipped_files_again(tmp_path):
    command = [sys.executable, "-m", "tools.pocket.skills", "--out", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    for path in DATA_DIR.glob("*.jsonl"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_data_sets_offer_many_spellings(pocket):
    skills = pocket("skills")
    assert len(set(skills.DATE_SPELLINGS)) >= 25
    assert len(set(skills.ORDER_SENTENCES)) >= 30


def test_pretraining_never_shows_the_heldout_skills(pocket):
    maker = pocket("corpus").Maker(MODEL_DIR / "tokenizer.json", library_texts=["x = 1"])
    maker.chats(random.Random("test"), 5000)  # raises HeldOutSkillError if one does
    library = pocket("library")
    for _, target in pairs("dates", "heldout") + pairs("orders", "heldout"):
        assert not library.is_clean(target)  # the check recognises both skills
        assert library.cleaned(f"before\n{target}\nafter") == "before\nafter"


@pytest.mark.parametrize(
    "text", ["Übung 中文 😀\t\n\n  x", "a" * 300, "\x00\x7f", "don't  stop", "1234567890", "<|no token|>"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_every_digit_is_its_own_token(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("on 2021-03-03, 98765 of 1e10")["input_ids"])
    assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))


def test_earlier_turns_are_written_the_same_whatever_follows(tokenizer):
    messages = [{"role": role, "content": role * 2} for role in ("system", "user", "assistant", "user", "assistant")]
    texts = [tokenizer.apply_chat_template(messages[:n], tokenize=False) for n in range(1, 6)]
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False))
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert texts[2].startswith(prompt)
    assert texts[-1].endswith(tokenizer.eos_token)


def test_generation_stops_at_the_end_of_a_turn(model, tokenizer):
    assert (
        model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>") == tokenizer.eos_token_id
    )
