"""A new precision takes one file, `toy_precision.py`, and one line in `tables.PRECISIONS`."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import loratune as lt
from loratune import tables
from loratune.base.forward import PackedForward, fuse, prepare
from loratune.base.load import POCKET, load_tokenizer
from loratune.config import LoraConfig, TrainConfig
from loratune.data.pack import make_row
from loratune.errors import ModelError
from loratune.export.merge import merge_checkpoint
from loratune.export.quantised import save_quantised
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import attach
from loratune.many.bank import Bank
from loratune.memory.budget import RowSetting
from loratune.memory.estimate import EstimateRequest, survey_of
from loratune.ops.bank.pool import Segment
from loratune.precision.linear import form_in_memory, quantised_layers
from loratune.training.optim import adamw
from loratune.training.step import row_loss, train_step
from tests.conftest import build
from tests.extending.toy_precision import Int8Format, Int8Weight
from tests.training.helpers import examples

LINE = {"int8": "tests.extending.toy_precision:Int8Format"}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
TOKENS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.PRECISIONS, *next(iter(LINE.items())))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(TOKENS).logits
    return out


def a_forward(model: PreTrainedModel, *, fused: bool) -> PackedForward:
    forward = prepare(model)
    assert fuse(forward) or not fused
    if not fused:
        forward.fused = None
    return forward


def test_a_model_loads_in_it_layer_by_layer(folder: Path) -> None:
    model = lt.load(str(folder), "int8", "cpu")
    weights = [layer.frozen for _, layer in quantised_layers(model)]
    assert len(weights) == 7 * len(model.model.layers)
    assert all(isinstance(weight, Int8Weight) for weight in weights)
    assert form_in_memory(model) == "int8 beside float32"
    dense = logits(lt.load(str(folder), device="cpu"))
    assert 0 < float((logits(model) - dense).norm() / dense.norm()) < 0.05


def test_fused_layers_train_as_modules_do(folder: Path) -> None:
    """Equal up to the order of float32 sums: both compute with the same codes."""
    found = []
    for fused in (True, False):
        model = lt.load(str(folder), "int8", "cpu")
        attach(model, LORA, name="default", seed=0)
        forward = a_forward(model, fused=fused)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = adamw(parameters, TrainConfig(learning_rate=3e-3))
        with forward.installed():
            row = make_row(examples(3, seed=0), 144, 0)
            losses = [train_step(forward, [row], parameters, optimizer, max_grad_norm=1.0).loss for _ in range(4)]
        found.append(losses)
    assert found[0][-1] < found[0][0]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_a_bank_trains_over_it_as_a_single_adapter_does(folder: Path, fused: bool) -> None:
    row = make_row(examples(3, seed=0), 192, 0)
    alone = lt.load(str(folder), "int8", "cpu")
    attach(alone, LORA, name="default", seed=0)
    forward = a_forward(alone, fused=fused)
    with forward.installed():
        row_loss(forward, row).backward()
    expected = {path: p.grad for path, p in alone.named_parameters() if p.requires_grad}
    bank = Bank.attach(model := lt.load(str(folder), "int8", "cpu"), [LORA], 2)
    bank.place(1, LORA, seed=0)
    forward = a_forward(model, fused=fused)
    with forward.installed(), bank.row([Segment(1, 0, 192)]):
        row_loss(forward, row).backward()
    found = bank.named(1, bank.gradient(1))
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(found[path], gradient, rtol=1e-3, atol=1e-5)


def test_its_checkpoints_come_back_to_the_bit(folder: Path) -> None:
    model = lt.load(str(folder), "int8", "cpu")
    done = save_quantised(model, folder.parent / "small")
    assert done.layers == len(list(quantised_layers(model)))
    again = lt.load(str(folder.parent / "small"), device="cpu")
    assert all(isinstance(layer.frozen, Int8Weight) for _, layer in quantised_layers(again))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ModelError, match="leave --precision nf4 out"):
        lt.load(str(folder.parent / "small"), "nf4", "cpu")


def test_adapters_over_it_are_saved_loaded_and_merged(folder: Path) -> None:
    model = lt.load(str(folder), "int8", "cpu")
    attach(model, LORA, name="default", seed=0)
    expected = logits(model)
    save(model, folder.parent / "adapter", name="default")
    again = lt.load(str(folder), "int8", "cpu")
    load_adapter(again, folder.parent / "adapter", name="other")
    lt.activate(again, "other")
    assert torch.equal(logits(again), expected)
    lt.merge(again, "other")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    lt.unmerge(again)
    assert torch.equal(logits(again), expected)
    merged = merge_checkpoint(
        model, load_tokenizer(POCKET), "default", folder.parent / "merged", prompts=[[3, 4, 5], [6, 7]]
    )
    assert merged.dequantised == len(list(quantised_layers(model)))


def test_its_bytes_are_estimated_before_anything_is_loaded(folder: Path) -> None:
    wish = EstimateRequest("int8", LORA, RowSetting(128))
    before = survey_of(lt.load(str(folder), device="cpu"), wish).base_bytes
    model = lt.load(str(folder), "int8", "cpu")
    weights = [layer.frozen for _, layer in quantised_layers(model)]
    assert sum(weight.nbytes for weight in weights) == sum(Int8Format().bytes_held(w.shape, 4) for w in weights)
    assert before == survey_of(model, wish).base_bytes


def test_settings_accept_its_name_and_no_other() -> None:
    """The names are read when `config` is imported, hence a process of its own."""
    lines = f"from loratune import tables; tables.PRECISIONS |= {LINE}; from loratune.cli import main; import sys; "
    words = ["train", "base", "data.jsonl", "--out", "o", "--print-config", "--precision"]
    for name, status in (("int8", 0), ("int9", 2)):
        code = f"{lines}sys.exit(main({[*words, name]}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        if not status:
            assert tomllib.loads(done.stdout)["precision"] == name
