"""Settings: TOML in both directions, and errors that name the setting and its nearest neighbour."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from loratune.config import DataConfig, LoraConfig, RunConfig, TrainConfig, from_dict, read_toml, to_toml
from loratune.errors import ConfigError


def test_toml_there_and_back():
    config = RunConfig(
        model="m",
        data=["a.jsonl", "b.jsonl"],
        out="o",
        lora=LoraConfig(r=8, target_modules=["q_proj"], rank_pattern={"q_proj": 4}, modules_to_save=["score"]),
        dataset=DataConfig(eval_data=["c.jsonl"], truncate=True),
        training=TrainConfig(max_steps=7, log_to=["tensorboard"]),
    )
    assert from_dict(RunConfig, tomllib.loads(to_toml(config)), "x") == config


MINIMAL = {"model": "m", "data": ["d"], "out": "o"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"traning": {}}, 'Did you mean "training"'),
        ({"training": {"learning_rat": 1e-3}}, 'Did you mean "learning_rate"'),
        ({"learning_rate": 1e-3}, r"belongs under \[training\]"),
        ({"training": {"learning_rate": "fast"}}, "is not a number"),
        ({"training": {"learning_rate": True}}, "is not a number"),
        ({"training": {"max_steps": 2.5}}, "is not a whole number"),
        ({"training": {"lr_scheduler_type": "cos"}}, "'cosine', 'linear', 'constant'"),
        ({"data": "d"}, "is not a list"),
        ({"lora": {"rank_pattern": {"q": "x"}}}, "rank_pattern"),
        ({"lora": {"r": 0}}, "at least 1"),
        ({"lora": {"lora_dropout": 1.0}}, "lora_dropout"),
        ({"training": {"epochs": 0}}, "epochs"),
        ({"dataset": {"tokens_per_row": 1}}, "tokens_per_row"),
        ({"training": {"max_grad_norm": float("inf")}}, "max_grad_norm is inf; it must be finite"),
        ({"training": {"max_grad_norm": float("nan")}}, "max_grad_norm is nan; it must be finite"),
        ({"training": {"weight_decay": 10**400}}, "weight_decay = .* is not a number"),
        ({"training": {"max_steps": 2**63}}, "max_steps = 9223372036854775808 is not a whole number"),
        ({"training": {"seed": -(2**63) - 1}}, "seed = .* is not a whole number"),
        ({"lora": {"alpha_pattern": {"q": float("inf")}}}, "alpha_pattern"),
        ({"lora": {"r": True}}, "r = True is not a whole number"),
        ({"lora": 3}, r"lora = 3 is a value, but lora is a section: \[lora\]"),
        ({"model": ["m"]}, "is not a string"),
        ({"model": "a\0b"}, "is not UTF-8 text"),
        ({"data": ["d", "\ud83d"]}, "data = .* is not"),
        ({"model": None}, "model = None is not a string"),
    ],
)
def test_a_wrong_setting_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, MINIMAL | values, "run.toml")


def test_broken_toml_names_file_and_line(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('model = "m"\nout = \n')
    with pytest.raises(ConfigError, match=r"run\.toml.*line 2"):
        read_toml(str(file))


def test_the_largest_whole_numbers_and_floats_are_settings() -> None:
    settings = {"seed": 2**63 - 1, "weight_decay": 1.7976931348623157e308, "adam_epsilon": 1e38}
    made = from_dict(TrainConfig, settings, "x")
    assert (made.seed, made.weight_decay, made.adam_epsilon) == tuple(settings.values())


def test_an_int_will_do_for_a_float():
    assert from_dict(TrainConfig, {"weight_decay": 0}, "x").weight_decay == 0


def test_a_byte_order_mark_before_toml_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b'\xef\xbb\xbfmodel = "m"\n')
    assert read_toml(str(file)) == {"model": "m"}
