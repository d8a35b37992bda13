"""Adapter folders: a saved adapter comes back to the bit, and a file that does not fit is refused with a reason."""

from __future__ import annotations

import json
import math
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.errors import AdapterError, OutputError
from loratune.lora.files import adapter_tensors, load_adapter, read_config, read_info, save
from loratune.lora.inject import (
    activate,
    active,
    adapter_names,
    attach,
    detach,
    merge,
    trainable_parameters,
    unmerge,
)
from tests.conftest import SMALL
from tests.lora.helpers import fill, make, make_mlp, run

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RICH = LoraConfig(r=2, lora_alpha=5, bias="all", modules_to_save=["classifier"], target_modules=["mlp.0", "shared"])


def _x() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def _adapted(name: str = "default", config: LoraConfig = RICH, seed: int = 1) -> nn.Module:
    model = make_mlp()
    attach(model, config, name=name)
    fill(trainable_parameters(model).values(), seed)
    return model


def _saved(folder: Path, config: LoraConfig = RICH) -> Path:
    save(_adapted(config=config), folder)
    return folder


def _edit(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def _edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _assert_refused(folder: Path | str, message: str, model: nn.Module | None = None) -> None:
    """The adapter is refused with `message`, and the model is the same afterwards."""
    model = model or make_mlp()
    before = {path: (id(m), set(vars(m))) for path, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, folder)
    assert before == {path: (id(m), set(vars(m))) for path, m in model.named_modules()}
    assert flags == [p.requires_grad for p in model.parameters()]


# Saving and loading


def test_a_users_own_module_gets_its_adapter_back_to_the_bit(tmp_path: Path) -> None:
    model = _adapted("sql")
    expected = model(_x())
    save(model, tmp_path / "a", name="sql")
    again = make_mlp()
    report = load_adapter(again, str(tmp_path / "a"), name="mlp")
    assert torch.equal(again(_x()), expected)
    assert active(again) == ("mlp",)
    assert report.trainable_parameters == sum(p.numel() for p in trainable_parameters(again).values())
    ours, theirs = adapter_tensors(model, "sql"), adapter_tensors(again, "mlp")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["mlp", "weight", "lora_A", "shared"])
def test_the_name_of_an_adapter_is_in_no_key_and_loses_no_tensor(name: str, tmp_path: Path) -> None:
    """PEFT's fault: with an adapter called "mlp" attached, saving another drops the tensors of that module."""
    model = _adapted("default")
    attach(model, LoraConfig(r=2, target_modules=["weight"]), name=name)
    save(model, tmp_path / "a", name="default")
    assert set(load_file(tmp_path / "a" / WEIGHTS)) == {
        "base_model.model.mlp.0.lora_A.weight",
        "base_model.model.mlp.0.lora_B.weight",
        "base_model.model.mlp.0.base_layer.bias",
        "base_model.model.mlp.2.bias",
        "base_model.model.weight.bias",
        "base_model.model.shared.lora_A.weight",
        "base_model.model.shared.lora_B.weight",
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }


def test_an_inactive_or_merged_adapter_is_saved_the_same(tmp_path: Path) -> None:
    from loratune.lora.inject import merge

    model = _adapted()
    save(model, tmp_path / "active")
    activate(model, None)
    save(model, tmp_path / "inactive")
    merge(model)
    save(model, tmp_path / "merged")
    contents = {(tmp_path / which / WEIGHTS).read_bytes() for which in ("active", "inactive", "merged")}
    assert len(contents) == 1


def test_the_file_is_float32_safetensors_for_pytorch(tmp_path: Path) -> None:
    model = make("llama").to(torch.bfloat16)
    attach(model, LoraConfig(r=2))
    save(model, tmp_path / "a")
    with safe_open(tmp_path / "a" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {t.dtype for t in load_file(tmp_path / "a" / WEIGHTS).values()} == {torch.float32}


def test_an_adapter_of_another_precision_is_taken_in(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a", LoraConfig(r=2))
    expected = _adapted(config=LoraConfig(r=2))(_x())
    _edit_tensors(folder, lambda t: t.update({key: value.to(torch.bfloat16) for key, value in t.items()}))
    model = make_mlp()
    load_adapter(model, folder)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    # bf16 keeps 8 bits: relative rounding of at most 2^-9 in each of A and B, times the size of the outputs.
    torch.testing.assert_close(model(_x()), expected, rtol=0.05, atol=0.05)


def test_layer_numbers_are_written_as_names_that_every_reader_understands(tmp_path: Path) -> None:
    model = make("llama")
    attach(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]))
    save(model, tmp_path / "a")
    config = read_config(tmp_path / "a")
    assert config.target_modules == ["1.self_attn.q_proj", "1.self_attn.v_proj"]
    assert config.layers_to_transform is None
    load_adapter(make("llama"), tmp_path / "a")


def test_info_tells_of_the_adapter_without_the_model(tmp_path: Path) -> None:
    model = make("llama")
    attach(model, LoraConfig(r=2, target_modules=["q_proj"]))
    save(model, tmp_path / "a")
    info = read_info(tmp_path / "a")
    assert info.task_type == "CAUSAL_LM"
    assert info.base_model is None
    assert info.config.r == 2
    assert info.shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == (2, 64)
    assert info.parameters == sum(p.numel() for p in trainable_parameters(model).values())
    assert info.dtypes == ("F32",)


def test_folder_of_a_named_adapter_is_found_by_name_only(tmp_path: Path) -> None:
    _saved(tmp_path / "out" / "sql")
    _saved(tmp_path / "out" / "dates")
    model = make_mlp()
    load_adapter(model, tmp_path / "out", name="sql")
    assert adapter_names(model) == ("sql",)
    _assert_refused(tmp_path / "out", r"holds the adapters dates, sql; name one, for example .*out/dates")


def test_embedding_table_saved_along_must_be_that_of_the_base(tmp_path: Path) -> None:
    model = make("llama")
    attach(model, LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    save(model, tmp_path / "a")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    table = model.get_input_embeddings().weight
    _edit_tensors(tmp_path / "a", lambda t: t.update({key: table.detach()}))
    again = make("llama")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(run(again), run(model))
    _edit_tensors(tmp_path / "a", lambda t: t.update({key: table.detach() + 1}))
    _assert_refused(tmp_path / "a", "another base model: model.embed_tokens.weight differs", make("llama"))


def test_tied_modules_come_back_tied_unless_the_file_has_two_values(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = make("gemma3")
    attach(model, config)
    fill(trainable_parameters(model).values())
    save(model, tmp_path / "a")
    again = make("gemma3")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(run(again), run(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    _edit_tensors(tmp_path / "a", lambda t: t["base_model.model.lm_head.weight"].add_(1))
    apart = make("gemma3")
    load_adapter(apart, tmp_path / "a")
    assert torch.equal(apart.lm_head.weight, again.lm_head.weight + 1)
    assert torch.equal(apart.model.embed_tokens.weight, again.model.embed_tokens.weight)
    detach(apart)
    assert apart.lm_head.weight is apart.model.embed_tokens.weight


def _tied_llama() -> nn.Module:
    tf.set_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, tie_word_embeddings=True)).requires_grad_(False).eval()


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_modules_saved_from_a_tied_base_are_read_as_peft_reads_them(
    saved: list[str], ensured: bool, tmp_path: Path
) -> None:
    """PEFT trains and saves copies; with ensure_weight_tying they stay tied, and both are in the file."""
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=ensured, task_type="CAUSAL_LM"
    )
    trained = peft.get_peft_model(_tied_llama(), config).eval()
    fill([p for p in trained.parameters() if p.requires_grad])
    trained.save_pretrained(tmp_path / "a")
    model, bare = _tied_llama(), run(_tied_llama())
    load_adapter(model, tmp_path / "a")
    assert torch.allclose(run(model), run(trained), atol=1e-5)
    save(model, tmp_path / "b")
    theirs = peft.PeftModel.from_pretrained(_tied_llama(), tmp_path / "b").eval()
    assert torch.allclose(run(theirs), run(model), atol=1e-5)
    expected = run(model)
    merge(model)  # transformers would tie the head again if the configuration still said so
    model.save_pretrained(tmp_path / "merged")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(run(loaded), expected, atol=1e-5)
    unmerge(model)
    detach(model)
    assert model.config.tie_word_embeddings
    assert torch.equal(run(model), bare)


def test_training_one_of_two_tied_modules_is_said(tmp_path: Path) -> None:
    model = _tied_llama()
    attached = attach(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert "lm_head is tied to model.embed_tokens in the base" in str(attached)
    assert [name for name in trainable_parameters(model) if "lora" not in name] == ["lm_head.weight"]


# Writing


def test_an_adapter_is_overwritten_only_when_asked_and_other_files_stay(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    (folder / "run.toml").write_text("x")
    before = (folder / WEIGHTS).read_bytes()
    other = _adapted(config=LoraConfig(r=3, target_modules=["weight"]), seed=9)
    with pytest.raises(OutputError, match="holds an adapter already"):
        save(other, folder)
    assert (folder / WEIGHTS).read_bytes() == before
    save(other, folder, overwrite=True)
    again = make_mlp()
    load_adapter(again, folder)
    assert torch.equal(again(_x()), other(_x()))
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS, "run.toml"]


def test_a_full_disk_leaves_nothing_new_and_the_old_whole(tmp_path: Path) -> None:
    model = make("llama")
    attach(model, LoraConfig(r=16))
    with _files_of_at_most(8192), pytest.raises(OutputError):
        save(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    _saved(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    with _files_of_at_most(8192), pytest.raises(OutputError):
        save(model, tmp_path / "old", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


@contextmanager
def _files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The operating system refuses to write more to any file, as it does when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_places_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for where in (file, file / "below", "/proc/self/adapter"):
        with pytest.raises(OutputError):
            save(_adapted(), where, overwrite=True)
    assert file.read_text() == "mine"


# Files that are no adapter


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    _assert_refused(tmp_path / "nowhere", "no such folder")
    _assert_refused(tmp_path, "has no adapter_config.json")
    folder = _saved(tmp_path / "a")
    _assert_refused(folder / WEIGHTS, "is a file; name the folder")
    (folder / WEIGHTS).unlink()
    _assert_refused(folder, "has no adapter_model.safetensors")


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt"])
def test_a_pickle_is_refused_and_never_read(name: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a")
    (folder / WEIGHTS).rename(folder / name)
    _assert_refused(folder, "is a pickle")
    _assert_refused(folder / name, "is a pickle")


@pytest.mark.parametrize("kept", [0, 4, 100, -10])
def test_a_damaged_file_is_refused(kept: int, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:kept])
    _assert_refused(folder, "is damaged or not a safetensors file")
    with pytest.raises(AdapterError, match="is damaged"):
        read_info(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\x00", '{"peft_type": "IA3"}', "{}"])
def test_a_damaged_or_foreign_configuration_is_refused(content: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a")
    (folder / CONFIG).write_text(content)
    _assert_refused(folder, "is not JSON|holds a list|peft_type is")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("alora_invocation_tokens", [7]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("megatron_config", {"a": 1}),
        ("kasa_config", {"a": 1}),
        ("kasa_config", {}),
        ("arrow_config", {}),
        ("lora_ga_config", {}),
        ("trainable_token_indices", {}),
        ("trainable_token_indices", []),
        ("layer_replication", []),
        ("init_lora_weights", "pissa"),
        ("some_future_field", 3),
    ],
)
def test_a_field_that_would_change_the_result_is_refused_by_name(field: str, value: object, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a")
    _edit(folder, **{field: value})
    _assert_refused(folder, field)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", "16", "r = '16' is not a whole number"),
        ("r", True, "r = True is not a whole number"),
        ("r", 0, "adapter_config.json: r is 0"),
        ("lora_alpha", None, "lora_alpha is null"),
        ("r", None, "r is null"),
        ("bias", None, "bias is null"),
        ("target_modules", None, "target_modules is missing"),
        ("target_modules", ["nothing"], "leaves no layer"),
        ("rank_pattern", {"mlp.0": "2"}, "rank_pattern"),
        ("bias", "some", "bias"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: object, message: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a")
    _edit(folder, **{field: value})
    _assert_refused(folder, message)


def test_a_missing_alpha_and_rank_are_the_defaults_of_peft(tmp_path: Path) -> None:
    path = _saved(tmp_path / "a") / CONFIG
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in ("r", "lora_alpha")}))
    read = read_config(tmp_path / "a")
    assert (read.r, read.lora_alpha) == (peft.LoraConfig().r, peft.LoraConfig().lora_alpha) == (8, 8)


@pytest.mark.parametrize("value", [3, 0.5, True, {"a": 1}, [3]])
def test_target_parameters_of_another_type_are_refused(value: object, tmp_path: Path) -> None:
    _edit(_saved(tmp_path / "a"), target_parameters=value)
    _assert_refused(tmp_path / "a", "target_parameters")


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("trainable_token_indices", (False, 0, "", "x", 0.5), "a list or an object"),
        ("eva_config", (False, 0, "", [], [1], 3), "an object"),
        ("lora_ga_config", (False, 0, "", []), "an object"),
        ("loftq_config", (False, 0, "", []), "an object"),
        ("runtime_config", (False, "x", []), "an object"),
        ("auto_mapping", ("x", [], False), "an object"),
        ("task_type", (False, 0, [], {}), "text"),
        ("base_model_name_or_path", (False, 0, 3, [], ["x"], {}), "text"),
        ("peft_version", (0, 0.5, []), "text"),
        ("revision", (0, False, []), "text"),
        ("inference_mode", (0, 1, "", "true", []), "true or false"),
        ("use_dora", (0, "", []), "true or false"),
        ("fan_in_fan_out", (0, 1, "no"), "true or false"),
        ("layer_replication", ({}, 0, "", False), "a list"),
        ("qalora_group_size", (True, 0.5, "16"), "a whole number"),
    ],
)
def test_fields_of_a_wrong_type_are_refused_by_name_also_empty_ones(
    field: str, values: tuple[object, ...], words: str, tmp_path: Path
) -> None:
    folder = _saved(tmp_path / "a")
    for value in values:
        _edit(folder, **{field: value})
        _assert_refused(folder, re.escape(f"{folder / CONFIG}: {field} = {json.dumps(value)} is not {words}"))
    _edit(folder, **{field: None})
    load_adapter(make_mlp(), folder)


def test_a_task_that_peft_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a")
    _edit(folder, task_type="CAUSAL")
    _assert_refused(folder, 'task_type is "CAUSAL"; PEFT knows CAUSAL_LM, ')


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("portable", [False, True])
def test_values_that_are_not_finite_are_not_saved(value: float, portable: bool, tmp_path: Path) -> None:
    model = make_mlp()
    attach(model, LoraConfig(r=2, target_modules=["0"]))
    save(model, tmp_path / "a")
    before = (tmp_path / "a" / WEIGHTS).read_bytes()
    with torch.no_grad():
        next(iter(trainable_parameters(model).values())).view(-1)[3] = value
    word = "NaN" if math.isnan(value) else "infinity"
    with pytest.raises(AdapterError, match=f"a: .*lora_A.weight holds {word}, so it is not written"):
        save(model, tmp_path / "a", overwrite=True, portable=portable)
    with pytest.raises(AdapterError, match=word):
        save(model, tmp_path / "b", portable=portable)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before
    assert not (tmp_path / "b").exists()


def test_harmless_fields_of_older_and_newer_versions_are_ignored(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a")
    _edit(
        folder, peft_version="0.30.0", revision="main", eva_config={"rho": 2}, some_future_field=None, use_qalora=...
    )
    load_adapter(make_mlp(), folder)


# Files of another model


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    """PEFT's fault: a file whose keys are all wrong loads, with a warning."""
    folder = _saved(tmp_path / "a", LoraConfig(r=2, target_modules=["weight"]))
    old, new = "base_model.model.weight.lora_A.weight", "base_model.model.weigth.lora_A.weight"
    _edit_tensors(folder, lambda t: t.update({new: t.pop(old)}))
    _assert_refused(folder, r"unexpected weigth\.lora_A.* Did you mean .*weight\.lora_A.*; missing weight\.lora_A")
    _edit_tensors(folder, lambda t: t.pop(new))
    _assert_refused(folder, "does not fit this model; missing weight.lora_A.weight")


def test_a_rank_or_a_width_of_another_model_is_named(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a")
    _edit(folder, r=3)
    _assert_refused(folder, r"mlp\.0\.lora_A\.weight is \(2, 8\) in the file, \(3, 8\) expected here")
    model = make_mlp()
    model.mlp[0] = nn.Linear(9, 16)
    _edit(folder, r=2)
    _assert_refused(folder, r"another model or rank: mlp\.0\.lora_A\.weight is \(2, 8\) .* \(2, 9\)", model)
    _assert_refused(folder, "leaves no layer of LlamaForCausalLM", make("llama"))


def test_a_refused_file_leaves_the_active_adapter_in_use(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a")
    _edit_tensors(folder, lambda t: t.popitem())
    model = _adapted("mine")
    expected = model(_x())
    with pytest.raises(AdapterError):
        load_adapter(model, folder, name="other")
    assert active(model) == ("mine",)
    assert torch.equal(model(_x()), expected)
    detach(model, "mine")
    with pytest.raises(AdapterError, match="already attached"):
        load_adapter(_adapted("mine"), _saved(tmp_path / "b"), name="mine")


def test_saving_an_unknown_adapter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="has no adapters"):
        save(make_mlp(), tmp_path / "a")
    with pytest.raises(AdapterError, match='no adapter "other"'):
        save(_adapted(), tmp_path / "a", name="other")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.float16, torch.bfloat16, torch.float32])
def test_embeddings_saved_beside_an_adapter_in_another_dtype_are_the_same_base(
    stored: torch.dtype, loaded: torch.dtype, tmp_path: Path
) -> None:
    """PEFT saves a targeted embedding whole, in the dtype of training."""
    theirs = peft.get_peft_model(
        make("llama").to(stored),
        peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    )
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in load_file(tmp_path / "a" / WEIGHTS))
    assert len(load_adapter(make("llama").to(loaded), tmp_path / "a").ranks) == 3
    other = make("llama").to(loaded)
    other.model.embed_tokens.weight[7, 3] += 0.5
    with pytest.raises(AdapterError, match="made for another base model: model"):
        load_adapter(other, tmp_path / "a")


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_adapters_are_made_on_their_layers_device_inside_a_device_context(device: str, tmp_path: Path) -> None:
    model, expected = make("llama"), make("llama")
    attach(expected, LoraConfig(r=2, init_lora_weights=False))
    with torch.device(device):
        attach(model, LoraConfig(r=2, init_lora_weights=False))
    assert torch.equal(run(model), run(expected))
    save(model, tmp_path / "a")
    loaded = make("llama")
    with torch.device(device):
        load_adapter(loaded, tmp_path / "a")
    assert torch.equal(run(loaded), run(expected))
