"""A new variant of LoRA takes one file, `toy_variant.py`, and one line in `tables.VARIANTS`.

The gated variant has a further tensor and its own formula. It runs as modules wherever a plain adapter runs, and
fused layers and banks refuse it. The orthogonal variant only has other initial values, so it is fused and banked.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune import tables
from loratune.adapters.combine import combine
from loratune.base.forward import fuse, prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.data.pack import Row, make_row
from loratune.errors import AdapterError, ConfigError
from loratune.lora.contract import LowRankSum, fusion_of
from loratune.lora.files import load_adapter, read_config, read_info, save
from loratune.lora.inject import activate, attach, config_of, merge, trainable_parameters, unmerge
from loratune.lora.layer import LoraLayer, LoraVariant
from loratune.lora.store import Store
from loratune.many.bank import Bank
from loratune.memory.budget import RowSetting
from loratune.memory.estimate import EstimateRequest, survey_of
from loratune.ops.dropout import dropout_key, row_key
from loratune.precision.linear import quantise_linears
from loratune.training.optim import adamw, set_rate
from loratune.training.step import row_loss, train_step
from tests.cli_lab import CHAT, SHORT, loratune, small_model, write_jsonl
from tests.conftest import build
from tests.extending.toy_variant import GATED, ORTHOGONAL, GatedConfig, GatedLora, OrthogonalConfig
from tests.lora.helpers import fill, make, run
from tests.training.helpers import examples, loss_and_gradients

LINES = {
    "use_gate": "tests.extending.toy_variant:GATED",
    "init_lora_weights=orthonormal": "tests.extending.toy_variant:ORTHOGONAL",
}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "up_proj", "down_proj"]}


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in LINES.items():
        monkeypatch.setitem(tables.VARIANTS, *line)


def _gated(name: str = "llama", **settings: object) -> GatedConfig:
    return GatedConfig(**({"r": 2, "use_gate": True, "target_modules": TARGETS[name]} | settings))


def _with_gates(model: nn.Module, name: str = "default", **settings: object) -> nn.Module:
    attach(model, _gated("gpt2" if "gpt2" in str(model.config.model_type) else "llama", **settings), name=name)
    fill(trainable_parameters(model).values())
    return model


def _orthogonal() -> OrthogonalConfig:
    return OrthogonalConfig(r=2, target_modules=TARGETS["llama"], init_lora_weights="orthonormal")


def _row() -> Row:
    return make_row(examples(7), 256, 0)


def _step(model: PreTrainedModel, **settings: object) -> list[float]:
    forward, parameters = prepare(model), list(trainable_parameters(model).values())
    optimizer = adamw(parameters, TrainConfig(learning_rate=2e-4))
    set_rate(optimizer, 1e-2)
    model.train()
    with forward.installed():
        steps = [train_step(forward, [_row()], parameters, optimizer, max_grad_norm=1.0, key=k) for k in range(8)]
    return [step.loss for step in steps]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_layer_computes_with_its_delta_and_all_tensors_train(name: str) -> None:
    model = _with_gates(make(name))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    x = torch.randn(3, layer.features(layer.to_base())[0])
    weight = layer.weight + layer.delta()
    expected = x @ (weight if layer.transposed else weight.T) + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    assert all(bool(tensor.grad.any()) for tensor in layer.adapter_tensors().values())


def test_it_trains_with_dropout_as_modules() -> None:
    model = build("llama")
    attach(model, _gated(lora_dropout=0.1))
    losses = _step(model)
    assert losses[-1] < losses[0]
    gates = [p for path, p in trainable_parameters(model).items() if path.endswith("lora_gate")]
    assert gates
    assert all(bool((gate != 1).any()) for gate in gates)


def test_its_dropout_comes_from_the_row_key() -> None:
    model = _with_gates(build("llama"), lora_dropout=0.5).train()
    forward = prepare(model)

    def loss(step: int) -> Tensor:
        with forward.installed(), forward.state.dropout(row_key(dropout_key(0, step), 256)):
            return row_loss(forward, _row()).detach()

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))


def test_fused_layers_refuse_it_and_the_result_is_that_of_the_modules() -> None:
    model = _with_gates(build("llama"))
    assert not fuse(prepare(model))
    assert "GatedLora is not a low-rank sum" in str(fusion_of(model.model.layers[0].self_attn.q_proj))
    activate(model, None)
    assert fuse(prepare(model))


def test_a_bank_refuses_it() -> None:
    with pytest.raises(AdapterError, match=r"GatedLora is not a low-rank sum.*train it by itself"):
        Bank.attach(build("llama"), [_gated()], slots=1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_and_loaded_it_computes_the_same(name: str, tmp_path: Path) -> None:
    model = _with_gates(make(name))
    expected = run(model)
    save(model, tmp_path / "a")
    assert any(key.endswith(".lora_gate") for key in read_info(tmp_path / "a").shapes)
    assert read_config(tmp_path / "a").use_gate
    other = make(name)
    load_adapter(other, tmp_path / "a", "again")
    assert torch.equal(run(other), expected)
    assert type(config_of(other, "again")) is GatedConfig


def test_without_the_table_entry_its_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(_with_gates(make("llama")), tmp_path / "a")
    monkeypatch.delitem(tables.VARIANTS, "use_gate")
    with pytest.raises(AdapterError, match=r"use_gate = true .an unknown field"):
        load_adapter(make("llama"), tmp_path / "a")


def test_every_verb_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_model(tmp_path / "base")
    write_jsonl(tmp_path / "chat.jsonl", CHAT)
    (tmp_path / "run.toml").write_text('[lora]\nuse_gate = true\ntarget_modules = ["q_proj", "up_proj"]\n')
    words = ["base", "chat.jsonl", "--config", "run.toml", *SHORT]
    trained = loratune("train", *words, "--max-steps", "2", "--out", "run")
    assert trained.status == 0, trained.err
    assert read_config("run").use_gate
    shown = loratune("inspect", "run")
    assert shown.status == 0, shown.err
    assert "GatedLora" in shown.out
    assert "in full" not in shown.out
    measured = loratune("eval", "run", "chat.jsonl", "--limit", "2", "--no-generate", "--json")
    assert measured.status == 0, measured.err
    merged = loratune("merge", "run", "--out", "merged")
    assert merged.status == 0, merged.err


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_equals_unmerged_and_unmerge_restores_the_bits(name: str) -> None:
    model = make(name)
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    expected = run(_with_gates(model))
    merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert torch.equal(run(model), expected)
    activate(model, None)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[path]) for path, tensor in before.items())


def test_it_works_on_a_quantised_base() -> None:
    model = make("llama")
    quantise_linears(model.model.layers)
    plain = run(model)
    expected = run(_with_gates(model))
    assert not torch.allclose(expected, plain)
    merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    unmerge(model)
    activate(model, None)
    assert torch.equal(run(model), plain)


def test_plain_and_gated_adapters_share_a_model() -> None:
    model = make("llama")
    plain = run(model)
    attach(model, LoraConfig(r=3, target_modules=TARGETS["llama"]), name="lora")
    fill(trainable_parameters(model).values(), 3)
    expected = {"lora": run(model)}
    expected["gated"] = run(_with_gates(model, "gated"))
    for name in ("lora", "gated", "gated", "lora"):
        activate(model, name)
        assert torch.equal(run(model), expected[name])
        assert any("lora_gate" in path for path, _ in model.named_parameters()) == (name == "gated")
    activate(model, None)
    assert torch.equal(run(model), plain)
    with pytest.raises(
        AdapterError, match='"gated" uses GatedLora, which is not a low-rank sum; it cannot be weighted'
    ):
        activate(model, ["lora", "gated"])


def test_a_store_keeps_its_bits(tmp_path: Path) -> None:
    save(_with_gates(make("llama")), tmp_path / "a")
    resident, model = make("llama"), make("llama")
    load_adapter(resident, tmp_path / "a")
    store = Store(model, slots=1)
    store.load(tmp_path / "a", "a")
    activate(model, "a")
    assert torch.equal(run(model), run(resident))


def test_it_cannot_be_combined(tmp_path: Path) -> None:
    save(_with_gates(make("llama")), tmp_path / "a")
    with pytest.raises(AdapterError, match="GatedLora; only plain low-rank updates"):
        combine([tmp_path / "a"], tmp_path / "out")


def test_it_is_estimated_with_its_tensors_and_as_modules() -> None:
    model = build("llama", dtype=torch.bfloat16)
    setting = RowSetting(256, 1)
    plain = survey_of(model, EstimateRequest("auto", LoraConfig(r=2, target_modules=TARGETS["llama"]), setting))
    gated = survey_of(model, EstimateRequest("auto", _gated(), setting))
    assert plain.ledgers
    assert not gated.ledgers
    attach(model, _gated())
    assert gated.trainable == sum(p.numel() for p in trainable_parameters(model).values())
    assert gated.trainable > plain.trainable


def test_an_adapted_embedding_leaves_the_layers_fused_in_the_estimate() -> None:
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    assert survey_of(build("llama", dtype=torch.bfloat16), EstimateRequest("auto", lora, RowSetting(256, 1))).ledgers


def test_embeddings_cannot_have_it() -> None:
    with pytest.raises(AdapterError, match=r"embed_tokens.*GatedLora is for linear layers"):
        attach(build("llama"), _gated(target_modules=["embed_tokens"]))


def test_two_variants_at_once_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.VARIANTS, "use_rslora", LINES["use_gate"])
    with pytest.raises(ConfigError, match="use_gate and use_rslora choose two variants"):
        attach(build("llama"), _gated(use_rslora=True))


def test_other_initial_values_alone_stay_a_low_rank_sum() -> None:
    assert ORTHOGONAL.low_rank_sum
    assert not GATED.low_rank_sum
    model = build("llama", dtype=torch.float64)
    attach(model, _orthogonal())
    layer = model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(2, dtype=torch.float64))
    assert isinstance(fusion_of(layer), LowRankSum)
    fill(trainable_parameters(model).values(), std=0.02)
    forward = prepare(model)
    plain = loss_and_gradients(model, forward, _row())
    assert fuse(forward)
    torch.testing.assert_close(loss_and_gradients(model, forward, _row())[0], plain[0], rtol=1e-7, atol=0)


def test_it_joins_a_bank_with_the_weights_of_attach(tmp_path: Path) -> None:
    model, alone = build("llama"), build("llama")
    bank = Bank.attach(model, [_orthogonal()], slots=2)
    bank.place(1, _orthogonal(), seed=5)
    attach(alone, _orthogonal(), seed=5)
    for path, parameter in trainable_parameters(alone).items():
        assert torch.equal(bank.named(1)[path], parameter)
    bank.save(1, tmp_path / "a")
    other = build("llama")
    load_adapter(other, tmp_path / "a")
    assert config_of(other, "default").init_lora_weights == "orthonormal"


def test_a_formula_changed_later_withdraws_the_declaration() -> None:
    class Scaled(LoraVariant):
        low_rank_sum = True

        def forward(self, layer: LoraLayer, x: Tensor) -> Tensor:
            return layer.lora_forward(x)

    class Negated(Scaled):
        def forward(self, layer: LoraLayer, x: Tensor) -> Tensor:
            return -layer.lora_forward(x)

    assert Scaled.low_rank_sum
    assert not Negated.low_rank_sum
    assert not GatedLora.low_rank_sum
