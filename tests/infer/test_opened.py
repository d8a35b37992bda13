"""Opening folders: more adapters than fit on the device work like a few."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratune.base.load import load
from loratune.config import LoraConfig
from loratune.infer import opened
from loratune.infer.opened import open_folders
from loratune.lora.files import save
from loratune.lora.inject import activate, active, attach, detach, trainable_parameters
from loratune.lora.state import require
from tests.cli_lab import small_model
from tests.lora.helpers import fill


@pytest.mark.parametrize("resident", [2, 8])
def test_many_adapters_wait_in_host_memory_and_answer_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: int
) -> None:
    monkeypatch.setattr(opened, "RESIDENT", resident)
    model = load(str(small_model(tmp_path / "base")))
    tokens = torch.arange(5, 30)[None]
    expected, folders = {}, []
    for index in range(5):
        full = ["model.norm"] if index == 3 else None  # a store does not hold such an adapter
        attach(model, LoraConfig(r=2, modules_to_save=full), name="x")
        fill(trainable_parameters(model).values(), seed=index)
        folders.append(str(tmp_path / f"a{index}"))
        save(model, folders[-1], name="x")
        expected[f"a{index}"] = model(input_ids=tokens).logits
        detach(model)
    together = open_folders(folders)
    assert active(together.model) == ("a0",)
    assert (require(together.model).store is not None) == (resident == 2)
    for name in ("a0", "a1", "a2", "a3", "a4", "a0"):
        activate(together.model, name)
        assert torch.equal(together.model(input_ids=tokens).logits, expected[name])
