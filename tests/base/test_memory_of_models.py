"""Models that are dropped leave memory, however they were prepared: nothing in the process refers to them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from loratune.base.forward import fuse, prepare, take_one_pass
from loratune.config import LoraConfig
from loratune.data.pack import make_row
from loratune.fused.policy import ActivationPlan, Level
from loratune.lora.inject import attach
from loratune.memory.simulate import simulate, without_data
from tests.conftest import build
from tests.training.helpers import examples, loss_and_gradients, model_with_adapter


def fused(name):
    model = model_with_adapter(name)
    forward = prepare(model)
    assert fuse(forward)
    loss_and_gradients(model, forward, make_row(examples(3), 128, 0))
    return model


def as_modules(name):
    model = model_with_adapter(name)
    forward = prepare(model)
    assert take_one_pass(forward)
    forward.plan = ActivationPlan.uniform(Level.FULL, model.config.num_hidden_layers)
    loss_and_gradients(model, forward, make_row(examples(3), 128, 0))
    return model


def simulated(name):
    model = without_data(build(name).config, torch.bfloat16)
    attach(model, LoraConfig(r=4), name="default", seed=0)
    simulate(model, 64, ActivationPlan.uniform(Level.NONE, model.config.num_hidden_layers), on_gpu=True)
    return model


@pytest.mark.parametrize("run", [fused, as_modules, simulated])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gptneox"])
def test_a_dropped_model_is_gone(run, name):
    model = run(name)
    gone = [weakref.ref(module) for module in model.modules()] + [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not [ref() for ref in gone if ref() is not None]


def test_a_hundred_models_leave_no_tensor_behind():
    """The number of live tensors after a hundred models is that after one."""
    counts = []
    for index in range(100):
        fused("llama")
        if index in (0, 99):
            gc.collect()
            counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1]
