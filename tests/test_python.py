"""The Python interface: names, progress, data in memory, texts, short reprs, clear errors, tensors and sums."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import loratune as lt
from loratune.base.load import stop_ids
from loratune.errors import AdapterError, ArgumentError, ConfigError, DataError
from loratune.infer import engine
from tests.cli_lab import CHAT, small_model, write_jsonl
from tests.conftest import build

IDS = torch.tensor([[1, 5, 9, 4, 7]])
TINY = lt.TrainConfig(max_steps=3, learning_rate=1e-2, epochs=1, gradient_accumulation_steps=1)
ROWS = lt.DataConfig(tokens_per_row=64, eval_fraction=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_model(tmp_path_factory.mktemp("python") / "base"))


@pytest.fixture
def pair(base: str) -> tuple[Any, Any]:
    return lt.load(base, device="cpu"), lt.load_tokenizer(base)


def adapter(r: int = 2, **settings: Any) -> lt.LoraConfig:
    """An adapter whose update is not zero."""
    return lt.LoraConfig(r=r, init_lora_weights=False, **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_all_names_are_listed_before_anything_is_imported() -> None:
    code = "import loratune, sys; print(*dir(loratune)); assert 'torch' not in sys.modules"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"attach", "train", "generate", "adapter_names", "active", "config_of"} <= set(lt.__all__) <= set(names)
    assert all(getattr(lt, name).__doc__ for name in lt.__all__)


# Training


def test_records_in_memory_train_as_the_same_file_does(pair: tuple[Any, Any], tmp_path: Path) -> None:
    import datasets

    model, tokenizer = pair
    file = str(write_jsonl(tmp_path / "chat.jsonl", CHAT))
    losses = []
    for data in (file, Path(file), [file], CHAT, datasets.Dataset.from_list(CHAT)):
        lt.attach(model, lt.LoraConfig(r=2))
        losses.append(lt.train(model, tokenizer, data, TINY, dataset=ROWS, eval_data=CHAT[:2]).last_loss)
        lt.detach(model)
    assert losses == [losses[0]] * 5


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([CHAT[0], "text"], r"data\[1\]: is a str"),
        ([{"messages": []}] * 2, r"data\[0\]"),
        ([], "data is empty"),
        ({"train": CHAT}, r"data\['train'\]"),
        ((record for record in CHAT), "list"),
        (3, "data is a int"),
    ],
)
def test_wrong_data_in_memory_are_named(pair: tuple[Any, Any], data: Any, says: str) -> None:
    model, tokenizer = pair
    lt.attach(model, lt.LoraConfig(r=2))
    with pytest.raises((DataError, ArgumentError), match=says):
        lt.train(model, tokenizer, data, TINY, dataset=ROWS)


def test_progress_is_shown_where_somebody_looks(
    pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = pair
    lt.attach(model, lt.LoraConfig(r=2))
    events: list[object] = []

    def said(**settings: Any) -> str:
        lt.train(model, tokenizer, CHAT, TINY, dataset=ROWS, on_event=events.append, **settings)
        return capsys.readouterr().out

    assert said() == ""
    assert "step 3/3" in said(progress=True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    assert "24 examples" in said()
    assert said(progress=False) == ""
    assert len(events) > 4 * 3


# Texts


def test_a_text_is_answered_as_in_a_chat(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    turns = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    (expected,) = engine.generate(model, [ids], max_new_tokens=5, stop_ids=stop_ids(model, tokenizer))
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert lt.generate(model, tokenizer, "hello", max_new_tokens=5) == text
    assert lt.generate(model, tokenizer, turns, max_new_tokens=5) == text
    assert lt.generate(model, tokenizer, ["hello", turns], max_new_tokens=5) == [text, text]
    plain = tokenizer("hello", add_special_tokens=True)["input_ids"]
    (expected,) = engine.generate(model, [plain], max_new_tokens=5, stop_ids=stop_ids(model, tokenizer))
    verbatim = lt.generate(model, tokenizer, "hello", max_new_tokens=5, template=False)
    assert verbatim == tokenizer.decode(expected, skip_special_tokens=True)


# Texts of objects, and errors


def test_reprs_are_one_short_line(llama: Any) -> None:
    assert repr(lt.LoraConfig()) == "LoraConfig()"
    assert repr(lt.LoraConfig(r=8, target_modules=["q_proj"])) == "LoraConfig(r=8, target_modules=['q_proj'])"
    assert repr(lt.TrainConfig(epochs=3)) == "TrainConfig(epochs=3)"
    attached = lt.attach(llama, lt.LoraConfig(r=2), name="sql")
    assert repr(attached).startswith('<Attached adapter "sql": 14 layers, ')
    assert "\n" not in repr(attached)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: lt.attach(lt.LoraConfig(), m), "attach(model, config): model must be a Module, but a LoraConfig"),
        (lambda m: lt.attach(m, {"r": 8}), "Write LoraConfig(**config)"),
        (lambda m: lt.attach(m, lt.LoraConfig(), 3), "name must be a str"),
        (lambda m: lt.activate("sql", m), "the first argument is the model, but a str"),
        (lambda m: lt.save("folder", m), "save(model, directory): model must be a Module"),
        (lambda m: lt.load_adapter("folder", m), "load_adapter(model, directory): model must be a Module"),
        (lambda m: lt.train(m, "tokenizer", []), "tokenizer must be a PreTrainedTokenizerBase"),
        (lambda m: lt.generate(m, "hello", None), "tokenizer must be a PreTrainedTokenizerBase"),
    ],
)
def test_swapped_or_wrong_arguments_are_named(llama: Any, call: Callable[[Any], object], says: str) -> None:
    before = dict(vars(llama))
    with pytest.raises(ArgumentError) as error:
        call(llama)
    assert says in str(error.value)
    assert isinstance(error.value, TypeError)
    assert vars(llama).keys() == before.keys()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lt.LoraConfig(r="8"), "r = '8' is not a whole number"),
        (lambda: lt.TrainConfig(epochs=1.5), "epochs = 1.5 is not a whole number"),
        (lambda: lt.DataConfig(truncate="no"), "true or false"),
        (lambda: lt.RunConfig(model="m", data=["d"], out="o", lora={"r": 8}), "write LoraConfig"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_dict_of_settings_for_training_is_named(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    with pytest.raises(ArgumentError, match="Write training=TrainConfig"):
        lt.train(model, tokenizer, CHAT, {"epochs": 1})


def test_a_model_wrapped_by_peft_is_refused(llama: Any, tmp_path: Path) -> None:
    import peft

    lt.attach(copy.deepcopy(llama), lt.LoraConfig(r=2))
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(AdapterError, match="wrapped by PEFT"):
            lt.attach(model, lt.LoraConfig(r=2))
    lt.attach(wrapped.unload(), lt.LoraConfig(r=2))


def test_save_pretrained_says_that_it_leaves_the_adapter_behind(llama: Any, tmp_path: Path) -> None:
    bare = build("llama").state_dict()
    lt.attach(llama, adapter(), name="sql")
    with pytest.warns(UserWarning, match=r"will not find the adapters .*\(sql\).*loratune.save"):
        llama.save_pretrained(tmp_path / "base")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(again[key], bare[key]) for key in bare)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.state_dict()
        expected = logits(llama)
        lt.merge(llama, "sql")
        llama.save_pretrained(tmp_path / "merged")
        lt.unmerge(llama)
        lt.detach(llama)
        llama.save_pretrained(tmp_path / "detached")
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


# Adapters


def test_names_active_ones_and_configurations(llama: Any) -> None:
    assert (lt.adapter_names(llama), lt.active(llama), lt.merged(llama)) == ((), (), None)
    lt.attach(llama, adapter(2), name="a")
    alone = logits(llama)
    lt.attach(llama, adapter(4), name="b", seed=1, active=False)
    assert (lt.adapter_names(llama), lt.active(llama)) == (("a", "b"), ("a",))
    assert torch.equal(logits(llama), alone)
    assert lt.config_of(llama, "b") == adapter(4)
    lt.activate(llama, None)
    lt.attach(llama, adapter(4), name="c", active=False)
    assert lt.active(llama) == ()


def test_tensors_go_out_and_in_again(llama: Any, tmp_path: Path) -> None:
    lt.attach(llama, adapter(), name="a")
    alone = logits(llama)
    tensors = lt.adapter_tensors(llama, "a")
    lt.save(llama, tmp_path / "a", "a")
    other = build("llama")
    attached = lt.attach_tensors(other, tensors, adapter(), name="x")
    assert attached.name == "x"
    assert torch.equal(logits(other), alone)
    lt.attach(other, adapter(), name="y", seed=3, active=False)
    lt.set_adapter_tensors(other, tensors, "y")
    assert lt.active(other) == ("x",)
    lt.activate(other, {"x": 0.5, "y": 0.5})
    torch.testing.assert_close(logits(other), alone, rtol=1e-4, atol=1e-5)
    lt.set_adapter_tensors(other, {key: torch.zeros_like(value) for key, value in tensors.items()}, "y")
    lt.activate(other, ["x", "y"])
    torch.testing.assert_close(logits(other), alone, rtol=1e-4, atol=1e-5)
    lt.load_adapter(other, tmp_path / "a", name="z", active=False)
    assert lt.active(other) == ("x", "y")
    key = next(iter(tensors))
    for wrong in ({key: tensors[key]}, tensors | {"base_model.model.nonsense": tensors[key]}):
        with pytest.raises(AdapterError, match="does not fit"):
            lt.set_adapter_tensors(other, wrong, "y")


def test_adapters_with_different_modules_in_full_are_active_together(llama: Any) -> None:
    """The sum is the base with the module replaced, plus both updates: the same adapters merged by hand agree."""
    lt.attach(llama, adapter(target_modules=["q_proj"], modules_to_save=["lm_head"]), name="head")
    lt.attach(llama, adapter(target_modules=["q_proj", "up_proj"], modules_to_save=["norm"]), name="norm", seed=1)
    with torch.no_grad():
        for name, factor in (("head", 1.5), ("norm", 0.5)):
            tensors = lt.adapter_tensors(llama, name)
            changed = {k: v * factor if "lora_" not in k else v for k, v in tensors.items()}
            lt.set_adapter_tensors(llama, changed, name)
    lt.activate(llama, ["head", "norm"])
    together = logits(llama)
    expected = build("llama")
    for name, factor in (("head", 1.5), ("norm", 0.5)):
        for key, value in lt.adapter_tensors(llama, name).items():
            if key.endswith("lora_A.weight"):
                B = lt.adapter_tensors(llama, name)[key.replace("lora_A", "lora_B")]
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                expected.get_parameter(f"{path}.weight").data += lt.config_of(llama, name).lora_alpha / 2 * B @ value
        part = expected.lm_head if name == "head" else expected.model.norm
        part.weight.data *= factor
    torch.testing.assert_close(together, logits(expected), rtol=1e-4, atol=1e-4)
    lt.activate(llama, None)
    assert torch.equal(logits(llama), logits(build("llama")))


@pytest.mark.parametrize(
    ("settings", "which", "says"),
    [
        ({"modules_to_save": ["lm_head"]}, ["a", "b"], 'replaces "lm_head"'),
        ({"target_modules": ["lm_head"]}, ["b", "a"], 'replaces "lm_head"'),
        ({}, {"a": 0.5, "b": 1.0}, "cannot be weighted by 0.5"),
    ],
)
def test_a_sum_that_is_not_defined_is_refused(llama: Any, settings: Any, which: Any, says: str) -> None:
    lt.attach(llama, adapter(target_modules=["q_proj"], modules_to_save=["lm_head"]), name="a")
    lt.attach(llama, adapter(**({"target_modules": ["q_proj"]} | settings)), name="b")
    before = logits(llama)
    with pytest.raises(AdapterError, match=says):
        lt.activate(llama, which)
    assert torch.equal(logits(llama), before)
