"""Configurations from anyone: code runs only if trusted, and absurd values are refused within a second."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune.base.load import load, load_config, load_tokenizer
from loratune.box import MODEL_DIR
from loratune.cli import main
from loratune.errors import ModelError
from tests.cli_lab import CHAT, SHORT, loratune, small_model, write_jsonl

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineModel(LlamaForCausalLM):
    config_class = MineConfig

class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def coded(tmp_path, monkeypatch) -> Path:
    """A model whose configuration, class and tokenizer are in a Python file of its own."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = small_model(tmp_path / "coded")
    (folder / "mine.py").write_text(CODE.format(marker=str(tmp_path / "code-ran")))
    edit(folder / "config.json", model_type="mine", architectures=["MineModel"])
    edit(folder / "config.json", auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineModel"})
    edit(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "mine.MineTokenizer"]})
    return folder


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_code_of_a_model_runs_only_with_the_flag(coded, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    data = str(write_jsonl(tmp_path / "chat.jsonl", CHAT))
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(f'data = ["{data}"]\nmax_steps = 1\ntokens_per_row = 64\n[grid]\nr = [1, 2]\n')
    out = str(tmp_path / "out")
    commands = [
        ["train", str(coded), data, "--out", out, *SHORT],
        ["preview", str(coded), data, "--cache-dir", ""],
        ["estimate", str(coded)],
        ["sweep", str(coded), str(jobs), "--out", out],
        ["eval", str(coded), data],
        ["chat", str(coded)],
        ["quantise", str(coded), "--out", out],
        ["extract", str(coded), "--base", str(coded), "--out", out],
    ]
    for words in commands:
        outcome = loratune(*words)
        assert outcome.status == 2, words
        assert outcome.err.count("\n") == 1, outcome.err
        assert "--trust-remote-code" in outcome.err, words
    assert not (tmp_path / "code-ran").exists()
    assert not Path(out).exists()

    trusted = ["--trust-remote-code", "--device", "cpu", "--max-steps", "1"]
    assert main(["train", str(coded), data, "--out", out, *SHORT, *trusted]) == 0
    assert (tmp_path / "code-ran").exists()
    assert "trust_remote_code = true" in Path(out, "run.toml").read_text()
    (tmp_path / "code-ran").unlink()
    assert loratune("merge", out, "--out", str(tmp_path / "merged")).status == 2  # the folder's run.toml is no trust
    assert not (tmp_path / "code-ran").exists()
    assert main(["merge", out, "--out", str(tmp_path / "merged"), "--trust-remote-code"]) == 0


def test_trusted_code_is_the_model_that_runs(coded):
    model = load(str(coded), device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "MineModel"
    assert type(load_tokenizer(str(coded), trust_remote_code=True)).__name__ == "MineTokenizer"
    quantised = load(str(coded), "nf4", "cpu", trust_remote_code=True)
    assert type(quantised).__name__ == "MineModel"


def test_a_known_architecture_that_also_names_code_runs_transformers_own_class(tmp_path):
    folder = small_model(tmp_path / "model")
    edit(folder / "config.json", auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineModel"})
    assert type(load(str(folder), device="cpu")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_a_hub_repository_are_code(tmp_path, name):
    folder = small_model(tmp_path / "model")
    edit(folder / "config.json", **{name: "kernels-community/flash-attn2"})
    with pytest.raises(ModelError, match=rf'{name} = "kernels-community/flash-attn2" is code .*--trust-remote-code'):
        load_config(str(folder))
    assert load_config(str(folder), trust_remote_code=True).hidden_size == 32


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: layers can be 2,048"),
        ({"num_local_experts": 10**9}, "experts can be 4,096"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"first_k_dense_replace": 10**10}, "first_k_dense_replace"),
        ({"max_position_embeddings": 10**300}, "max_position_embeddings"),
        ({"hidden_size": 1 << 20}, "weights take only"),
        ({"intermediate_size": 1 << 22}, "weights take only"),
        ({"num_hidden_layers": 2000}, "2,000 layers, but"),
    ],
)
def test_absurd_sizes_fail_within_a_second(tmp_path, changes, says):
    folder = small_model(tmp_path / "model")
    load(str(folder), device="cpu")
    edit(folder / "config.json", **changes)
    start = time.process_time()
    with pytest.raises(ModelError, match=says):
        load(str(folder), device="cpu")
    assert time.process_time() - start < 2.5  # a second, on an idle machine


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested too deeply"),
        ('{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}", "not JSON"),
        ('{"hidden_size": 32, "hidden_size": 64}', '"hidden_size" is given twice'),
        ('{"rms_norm_eps": NaN}', "NaN"),
        ("[]", "an object is expected"),
        ("", "not JSON"),
        ("\x00", "not JSON"),
    ],
)
def test_a_damaged_configuration_names_its_file(tmp_path, text, says):
    folder = shutil.copytree(MODEL_DIR, tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"config\.json.*{says}"):
        load(str(folder), device="cpu")


def test_layers_in_the_files_that_the_configuration_leaves_out(tmp_path):
    folder = small_model(tmp_path / "model")
    edit(folder / "config.json", num_hidden_layers=1)
    for precision in ("auto", "nf4"):
        with pytest.raises(ModelError, match=r"describes 1 layers at model\.layers, but the files hold 2"):
            load(str(folder), precision, "cpu")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.eh_proj.weight"] = torch.zeros(2, 2)  # a layer of another kind, as GLM-4.5 has
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load(str(folder), device="cpu").config.num_hidden_layers == 1


def test_infinity_in_a_configuration_is_read(tmp_path):
    folder = small_model(tmp_path / "model")
    edit(folder / "config.json", time_step_limit=[0.0, float("inf")])  # as in Mamba 2's files
    assert load(str(folder), device="cpu").dtype == torch.float32
