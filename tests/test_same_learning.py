"""loratune and PEFT learn the same: from the same A and B, 50 float32 AdamW steps of a plain PyTorch loop agree.

A and B move by about 0.1 over the run: 50 steps of at most the learning rate each. The bound of 1e-4 on their final
values is a thousandth of that. It is not tighter because AdamW divides by the root of the second moment. For an
element whose gradient is almost zero, a rounding difference can become a visible part of a step.
"""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.shapes import row_of
from loratune.base.forward import prepare
from loratune.config import LoraConfig
from loratune.lora.files import adapter_tensors
from loratune.lora.inject import attach, trainable_parameters
from loratune.training.step import train_step
from tests.base.test_row_layers import made
from tests.conftest import build
from tests.lora.test_peft_targets import mixture

STEPS = 50
LEARNING_RATE = 2e-3


def _learn(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    """Losses of a plain loop over fixed random tokens."""
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(3, 300, (8, 2, 24), generator=generator)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        tokens = data[step % len(data)]
        logits = model(input_ids=tokens).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_same_losses_and_weights_as_peft_over_50_steps(name: str) -> None:
    ours = build(name)
    attach(ours, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(build(name), settings)
    start = adapter_tensors(ours)
    peft.set_peft_model_state_dict(theirs, start)

    our_losses = _learn(ours, list(trainable_parameters(ours).values()))
    their_losses = _learn(theirs, [p for p in theirs.parameters() if p.requires_grad])

    assert our_losses[-1] < our_losses[0] - 0.01, "nothing was learnt, so nothing was compared"
    assert our_losses == pytest.approx(their_losses, rel=1e-5)
    our_end, their_end = adapter_tensors(ours), peft.get_peft_model_state_dict(theirs)
    assert our_end.keys() == their_end.keys()
    for key, tensor in our_end.items():
        assert not torch.equal(tensor, start[key]), key
        torch.testing.assert_close(tensor, their_end[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_experts_learn_as_in_peft_over_50_steps(name: str) -> None:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    ours = mixture(name)
    attach(ours, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], target_parameters=parameters))
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], target_parameters=parameters, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(mixture(name), settings)
    start = adapter_tensors(ours)
    peft.set_peft_model_state_dict(theirs, start)

    our_losses = _learn(ours, list(trainable_parameters(ours).values()))
    their_losses = _learn(theirs, [p for p in theirs.parameters() if p.requires_grad])

    assert our_losses[-1] < our_losses[0] - 0.01, "nothing was learnt, so nothing was compared"
    assert our_losses == pytest.approx(their_losses, rel=1e-5)
    our_end, their_end = adapter_tensors(ours), peft.get_peft_model_state_dict(theirs)
    assert our_end.keys() == their_end.keys()
    for key, tensor in our_end.items():
        assert not torch.equal(tensor, start[key]), key
        torch.testing.assert_close(tensor, their_end[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_learn_the_same_from_packed_rows_and_from_documents_alone(name: str) -> None:
    losses, ends = [], []
    for path in ("packed", "per document"):
        model = mixture(name)
        attach(model, LoraConfig(r=4, lora_alpha=8, target_parameters="all-experts"))
        forward = prepare(model)
        assert forward.path == "packed"
        forward.path = path  # type: ignore[assignment]
        parameters = list(trainable_parameters(model).values())
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        rows = [row_of([9, 14, 20], 48, seed) for seed in range(4)]
        found = []
        with forward.installed():
            for step in range(STEPS):
                found.append(train_step(forward, [rows[step % 4]], parameters, optimizer, max_grad_norm=1.0).loss)
        losses.append(found)
        ends.append(adapter_tensors(model))
    assert losses[0][-1] < losses[0][0] - 0.01
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for key, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "falcon_h1", "granite hybrid"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_recurrent_models_learn_from_packed_rows_as_peft_does_from_documents(name: str) -> None:
    """PEFT trains on each document by itself; the loss of a step is the mean over all of its tokens."""
    lengths, targets = [9, 14, 25], ["q_proj", "v_proj", "in_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_z"]
    ours = made(name)
    targets = [t for t in targets if any(path.endswith(f".{t}") for path, _ in ours.named_modules())]
    attach(ours, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(made(name), settings)
    start = adapter_tensors(ours)
    peft.set_peft_model_state_dict(theirs, start)
    forward = prepare(ours)
    assert forward.path == "packed"
    rows = [row_of(lengths, sum(lengths), seed) for seed in range(4)]
    parameters = list(trainable_parameters(ours).values())
    other = [p for p in theirs.parameters() if p.requires_grad]
    optimizer, their_optimizer = (torch.optim.AdamW(p, lr=LEARNING_RATE) for p in (parameters, other))
    found, expected = [], []
    for step in range(STEPS):
        row = rows[step % 4]
        with forward.installed():
            found.append(train_step(forward, [row], parameters, optimizer, max_grad_norm=0).loss)
        their_optimizer.zero_grad()
        documents = row.tokens.split(lengths)
        loss = torch.stack(
            [cross_entropy(theirs(input_ids=d[None]).logits[0, :-1], d[1:], reduction="sum") for d in documents]
        ).sum() / sum(n - 1 for n in lengths)
        loss.backward()
        their_optimizer.step()
        expected.append(loss.item())
    assert found[-1] < found[0] - 0.01, "nothing was learnt, so nothing was compared"
    assert found == pytest.approx(expected, rel=1e-4)
    end, their_end = adapter_tensors(ours), peft.get_peft_model_state_dict(theirs)
    for key, tensor in end.items():
        torch.testing.assert_close(tensor, their_end[key], rtol=0, atol=1e-4)
