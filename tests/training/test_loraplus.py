"""LoRA+: B moves at its own rate, with every optimizer, and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from loratune.config import LoraConfig, Optim, TrainConfig
from loratune.errors import ConfigError
from loratune.lora.inject import attach, trainable_parameters
from loratune.lora.rates import output_factors
from loratune.many.step import check_training
from loratune.training.optim import optimizer_of, set_rate
from tests.cli_lab import CHAT, SHORT, loratune, small_model, write_jsonl
from tests.lora.helpers import make

RATIO = 8.0


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_each_group_equals_adamw_at_its_own_rate(optim: Optim) -> None:
    start = [torch.randn(5, 60, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    joint, slow, fast = ([nn.Parameter(value.clone()) for value in start] for _ in range(3))
    config = TrainConfig(learning_rate=1e-3, loraplus_lr_ratio=RATIO, optim=optim, weight_decay=0.1)
    plain = TrainConfig(learning_rate=1e-3, optim=optim, weight_decay=0.1)
    optimizers = [
        optimizer_of(joint, config, joint[1:]),
        optimizer_of(slow[:1], plain),
        optimizer_of(fast[1:], plain),
    ]
    for step in range(4):
        rate = 1e-3 / (step + 1)
        for optimizer, own in zip(optimizers, (rate, rate, RATIO * rate), strict=True):
            set_rate(optimizer, own)
        for n in range(2):
            joint[n].grad = torch.randn(5, 60, generator=torch.Generator().manual_seed(10 * step + n))
        slow[0].grad, fast[1].grad = joint[0].grad.clone(), joint[1].grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(joint[0], slow[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(joint[1], fast[1], rtol=1e-6, atol=1e-7)
    assert not torch.equal(joint[0], start[0])


def test_the_faster_parameters_are_b_of_layers_that_see_activations() -> None:
    model = make("llama")
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "use_dora": True}
    attach(model, LoraConfig(r=2, **settings))
    faster = {id(parameter) for parameter in output_factors(model)}
    names = {name for name, p in trainable_parameters(model).items() if id(p) in faster}
    assert names == {name for name in trainable_parameters(model) if name.endswith("q_proj.lora_B")}
    assert len(names) == len(model.model.layers)


@pytest.mark.parametrize("value", [0, -1.0])
def test_a_ratio_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"loraplus_lr_ratio is .*positive"):
        TrainConfig(loraplus_lr_ratio=value)


def test_what_has_one_rate_refuses_it() -> None:
    with pytest.raises(ConfigError, match="adamw_offload has one rate"):
        TrainConfig(loraplus_lr_ratio=2, optim="adamw_offload")
    with pytest.raises(ConfigError, match="loraplus_lr_ratio 2: adapters of a bank have one rate each"):
        check_training(TrainConfig(loraplus_lr_ratio=2))
    with pytest.raises(ConfigError, match="optim adamw_8bit: a bank"):
        check_training(TrainConfig(optim="adamw_8bit"))
    check_training(TrainConfig())


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_model(tmp_path / "base")
    write_jsonl(tmp_path / "chat.jsonl", CHAT)
    words = ["base", "chat.jsonl", *SHORT, "--loraplus-lr-ratio", "8"]
    for out, extra in (("whole", []), ("plain", ["--loraplus-lr-ratio", "1"])):
        done = loratune("train", *words, *extra, "--max-steps", "3", "--out", out)
        assert done.status == 0, done.err
    weights = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("whole", "plain")]
    assert weights[0] != weights[1]
    refused = loratune("train", *words, "--learning-rate", "auto", "--max-steps", "3", "--out", "auto")
    assert refused.status == 2
    assert "loraplus_lr_ratio 8" in refused.err
