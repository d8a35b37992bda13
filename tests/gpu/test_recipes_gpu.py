"""On a CUDA device: every recipe in bfloat16 against float64, at several levels, and recorded = eager."""

from __future__ import annotations

import copy

import pytest
import torch

from loratune.base.forward import PackedForward, prepare
from loratune.fused.policy import ActivationPlan, Level
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, set_rate
from tests.fused.models import MODELS, recipe_model
from tests.gpu.test_step_gpu import a_row, assert_as_good, gradients
from tests.training.helpers import config, trainable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 5003,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PLANS = [
    None,
    ActivationPlan((Level.WIDE, Level.SELECTIVE, Level.FULL), tile=300),
    ActivationPlan((Level.HOSTED, Level.STAGED, Level.OFFLOAD)),
]


def on_gpu(name):
    return recipe_model(name, torch.bfloat16, SIZES, r=16).cuda()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("lengths", [(300, 17, 512, 1, 100), (256,) * 4], ids=str)
def test_fused_layers_are_as_exact_as_the_modules(name, plan, lengths):
    model, row = on_gpu(name), a_row(lengths)
    forward = prepare(model)
    assert forward.fused is not None
    forward.plan = plan
    fast = gradients(model, forward, row)
    plain = gradients(model, PackedForward(model, "packed", forward.head), row)
    wide = copy.deepcopy(model).double()
    exact = gradients(wide, PackedForward(wide, "packed", forward.head), row)
    assert_as_good(fast[0], plain[0], exact[0], "log-probabilities")
    for path, gradient in exact[1].items():
        assert_as_good(fast[1][path], plain[1][path], gradient, path)


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "glm4", "gpt_neox", "gpt2"])
def test_a_recorded_step_has_the_bits_of_an_eager_one(name):
    losses = []
    for record in (False, True):
        model = on_gpu(name)
        forward = prepare(model)
        parameters = list(trainable(model).values())
        optimizer = adamw(parameters, config())
        step = GraphStep(forward, parameters, optimizer, 1.0, record=record)
        with forward.installed():
            for seed in range(4):
                set_rate(optimizer, 1e-3)
                losses.append(step([a_row((256,) * 4, seed)]).loss)
        assert step.why_not is None or not record
    assert losses[:4] == losses[4:]
