"""A new kind of decoder layer takes one recipe, in `toy_recipe.py`, and one line in `tables.RECIPES`.

With that line the toy decoder runs fused: it trains, saves, merges and is estimated like any other.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratune import tables
from loratune.base.forward import PackedForward, fuse, prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.data.pack import make_row
from loratune.fused.policy import ActivationPlan, Level
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import attach, merge, trainable_parameters
from loratune.memory.budget import RowSetting
from loratune.memory.estimate import EstimateRequest, survey_of
from loratune.memory.ledger import LayerRun
from loratune.training.optim import adamw, set_rate
from loratune.training.step import train_step
from tests.extending.toy_recipe import toy_model
from tests.lora.helpers import fill, run
from tests.training.helpers import examples, loss_and_gradients


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.RECIPES, "toy", "tests.extending.toy_recipe:RECIPE")


def _with_adapter(dtype: torch.dtype = torch.float32, **settings: object):
    model = toy_model(dtype)
    attach(model, LoraConfig(**({"r": 4} | settings)), name="default", seed=0)
    return model


def _fused(model) -> PackedForward:
    forward = prepare(model)
    assert fuse(forward)
    return forward


def test_without_the_line_it_runs_as_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tables.RECIPES, "toy")
    assert not fuse(prepare(_with_adapter()))


@pytest.mark.parametrize("level", [Level.NONE, Level.SELECTIVE, Level.FULL, Level.OFFLOAD])
def test_loss_and_gradients_are_those_of_the_modules(level: Level) -> None:
    model = _with_adapter(torch.float64)
    fill(trainable_parameters(model).values())
    row = make_row(examples(7), 256, 0)
    forward = _fused(model)
    expected = loss_and_gradients(model, PackedForward(model, "packed", forward.head), row)
    forward.plan = ActivationPlan.uniform(level, 2)
    got = loss_and_gradients(model, forward, row)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-7, atol=0)  # norms of transformers run in float32
    for path, gradient in expected[1].items():
        assert float((got[1][path] - gradient).norm() / gradient.norm()) < 1e-5, path


def test_it_trains_saves_and_merges(tmp_path: Path) -> None:
    model = _with_adapter(lora_dropout=0.1)
    forward, parameters = _fused(model), list(trainable_parameters(model).values())
    optimizer = adamw(parameters, TrainConfig(learning_rate=2e-4))
    set_rate(optimizer, 1e-2)
    model.train()
    row = make_row(examples(7), 256, 0)
    with forward.installed():
        steps = [train_step(forward, [row], parameters, optimizer, max_grad_norm=1.0, key=key) for key in range(8)]
    assert steps[-1].loss < steps[0].loss
    model.eval()
    save(model, tmp_path / "a")
    other = toy_model()
    load_adapter(other, tmp_path / "a")
    assert torch.equal(run(other), run(model))
    merge(other)
    torch.testing.assert_close(run(other), run(model), rtol=1e-4, atol=1e-4)


def test_it_is_estimated_as_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    request = EstimateRequest("auto", LoraConfig(r=4), RowSetting(256, 1))
    model = toy_model(torch.bfloat16, "meta")
    found = survey_of(model, request)
    assert len(found.ledgers) == found.layers
    assert all(ledger(LayerRun(256, 0, Level.SELECTIVE, 128)).saved > 0 for ledger in found.ledgers)
    monkeypatch.delitem(tables.RECIPES, "toy")
    assert not survey_of(model, request).ledgers
