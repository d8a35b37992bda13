"""Layers whose keys PEFT renames while it reads a file: read by PEFT as by us, or named beforehand."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import loratune as lt
from loratune.lora.files import adapter_tensors
from tests.campaigns.architecture_checks import build

TOKENS = torch.arange(5, 25)[None]


def _attached(kind: str) -> tuple[torch.nn.Module, lt.Attached]:
    model = build(kind)
    return model, lt.attach(model, lt.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))


@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_peft_reads_layers_that_its_rules_rename(tmp_path: Path) -> None:
    model, attached = _attached("laguna")
    lt.save(model, tmp_path / "a")
    expected = model(TOKENS).logits
    theirs = peft.PeftModel.from_pretrained(build("laguna"), tmp_path / "a").eval()
    assert (theirs(TOKENS).logits - expected).abs().max() < 1e-5
    again = build("laguna")
    lt.load_adapter(again, tmp_path / "a")
    assert torch.equal(again(TOKENS).logits, expected)
    assert not any("PEFT will drop" in note for note in attached.notes)


def test_files_with_the_layers_own_paths_are_read_too(tmp_path: Path) -> None:
    """PEFT itself writes such files, and drops a part of them when it reads them."""
    model, _ = _attached("laguna")
    lt.save(model, tmp_path / "a")
    plain = adapter_tensors(model)
    assert set(load_file(tmp_path / "a" / "adapter_model.safetensors")) != set(plain)
    other = peft.get_peft_model(build("laguna"), peft.LoraConfig(r=2, target_modules=["gate_proj"]))
    other.save_pretrained(tmp_path / "theirs")
    again = build("laguna")
    lt.load_adapter(again, tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {key: tensor.tolist() for key, tensor in adapter_tensors(again).items()} == {
        key: tensor.tolist() for key, tensor in saved.items()
    }


def test_layers_that_peft_drops_are_named() -> None:
    model, attached = _attached("inkling2_text")
    [note] = [note for note in attached.notes if "PEFT will drop" in note]
    assert '"model.layers.1.self_attn.k_sconv.weight_proj" and 1 more' in note
    assert not any("PEFT will drop" in note for note in _attached("llama")[1].notes)
    del model
