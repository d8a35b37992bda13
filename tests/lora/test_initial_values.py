"""Initial values by name: the update is zero, the values have their distribution, and misfits are refused."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from loratune.config import LoraConfig
from loratune.errors import AdapterError, ConfigError
from loratune.lora.contract import LowRankSum, fusion_of
from loratune.lora.files import load_adapter, read_config, save
from loratune.lora.inject import attach, trainable_parameters
from tests.lora.helpers import fill, make, run

_TARGETS = ["q_proj", "down_proj"]


@pytest.mark.parametrize("r", [2, 8])
def test_orthogonal_pairs_are_random_and_their_product_is_zero(r: int) -> None:
    model = make("llama")
    bare = run(model)
    attach(model, LoraConfig(r=r, target_modules=_TARGETS, init_lora_weights="orthogonal"))
    torch.testing.assert_close(run(model), bare, rtol=1e-5, atol=1e-5)
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(fusion_of(layer), LowRankSum)
    for tensor in layer.adapter_tensors().values():
        assert torch.linalg.matrix_rank(tensor) == r // 2
        assert 0.6 < float(tensor.detach().square().mean() / 0.005) < 1.6  # (1/10)² times half of the rows
    assert float((layer.lora_B @ layer.lora_A).detach().abs().max()) < 1e-7


def test_orthogonal_files_are_exchanged_with_peft(tmp_path: Path) -> None:
    model = make("llama")
    attach(model, LoraConfig(r=4, target_modules=_TARGETS, init_lora_weights="orthogonal", use_dora=True))
    fill(trainable_parameters(model).values(), std=0.02)
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "ours")
    torch.testing.assert_close(run(theirs), run(model), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    other = make("llama")
    load_adapter(other, tmp_path / "theirs")
    assert torch.equal(run(other), run(model))
    assert read_config(tmp_path / "theirs").init_lora_weights == "orthogonal"


def test_misfits_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"q_proj.*needs an even rank, and its rank is 3"):
        attach(make("llama"), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="orthogonal"))
    with pytest.raises(AdapterError, match=r"embed_tokens.*is for linear layers"):
        attach(make("llama"), LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights="orthogonal"))
    with pytest.raises(ConfigError, match="init_lora_weights = 'orthogonl'"):
        LoraConfig(init_lora_weights="orthogonl")  # type: ignore[arg-type]
