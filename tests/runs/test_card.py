"""The model card: readable for the hub and PEFT, and limited to measured facts."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from loratune.config import LoraConfig
from loratune.runs.card import CardFacts, DataFacts, render_card

FACTS = CardFacts(
    name="dates",
    base_model="some-org/Some-Model.1B",
    lora=LoraConfig(r=12, lora_alpha=24, target_modules=["q_proj", "v_proj"]),
    trainable_parameters=1_234_567,
    file_bytes=4_938_268,
    train_data=(DataFacts("dates.train.jsonl", 2000, "ab" * 32),),
    eval_data=(DataFacts("dates.heldout.jsonl", 200, "cd" * 32),),
    results={"held-out loss": "0.0312 nats per token", "exact match": "97.5 % of 200"},
    settings={"learning rate": "0.0002 | cosine"},
    steps=120,
    trained_tokens=345_678,
    seconds=3725,
    tokens_per_second=15234.4,
    peak_memory_bytes=3 * 2**30,
    device="cpu",
    versions={"loratune": "0.1.0", "torch": "2.13.0"},
)


def test_the_hub_reads_the_front_matter() -> None:
    card = ModelCard(render_card(dataclasses.replace(FACTS, license="apache-2.0")))
    assert card.data.base_model == "some-org/Some-Model.1B"
    assert card.data.library_name == "peft"
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["lora", "loratune"]
    assert card.data.to_dict()["base_model_relation"] == "adapter"


@pytest.mark.parametrize("base", ["/home/someone/models/base", "./base", "C:\\models\\base", "loratune/pocket"])
def test_a_local_base_is_not_passed_off_as_a_hub_id(base: str) -> None:
    text = render_card(dataclasses.replace(FACTS, base_model=base))
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_every_fact_is_in_the_text() -> None:
    text = render_card(FACTS)
    for expected in (
        "# dates", "rank 12", "1,234,567", "4.7 MiB", "dates.train.jsonl", "2,000", "ab" * 32, "cd" * 32,
        "0.0312 nats per token", "97.5 % of 200", "120", "345,678", "1 h 02 min", "15,234 tokens per second",
        "3.00 GiB", "q_proj, v_proj", "2.13.0", "--max-lora-rank 16", "PeftModel.from_pretrained",
    ):  # fmt: skip
        assert expected in text, expected


def test_unknown_facts_are_left_out() -> None:
    bare = CardFacts(
        name="x",
        base_model="a/b",
        lora=LoraConfig(),
        trainable_parameters=1,
        file_bytes=1,
        train_data=(DataFacts("hub/set", 3, None),),
    )
    text = render_card(bare)
    assert not re.search(r"None\b(?! switches)|null|\{\}|\[\]|unknown", text)
    assert "## Results" not in text
    assert "license" not in text


def test_tables_survive_pipes() -> None:
    for line in render_card(FACTS).splitlines():
        if line.startswith("|"):
            columns = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert columns in (2, 3), line


def test_vllm_is_only_promised_where_it_works() -> None:
    for change in ({"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"rank_pattern": {"q_proj": 4}}):
        lora = dataclasses.replace(FACTS.lora, **change)
        text = render_card(dataclasses.replace(FACTS, lora=lora))
        assert "--enable-lora" not in text
        assert "merge" in text.split("## Results")[0]


def test_a_merged_checkpoint_says_how_far_it_is_from_the_adapter() -> None:
    text = render_card(dataclasses.replace(FACTS, merged_difference=2.3e-6))
    assert ModelCard(text).data.library_name == "transformers"
    assert "2.3e-06" in text
    assert "PeftModel" not in text
