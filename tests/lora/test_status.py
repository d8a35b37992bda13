"""What `status` says, and what happens to adapters when their model is moved, cast, copied, saved or merged."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch

import loratune as lt
from loratune.errors import AdapterError, ArgumentError
from loratune.lora.inject import trainable_parameters
from tests.lora.helpers import fill, make, run


def _two() -> torch.nn.Module:
    model = make("llama")
    lt.attach(model, lt.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}), name="a")
    fill(trainable_parameters(model).values())
    lt.attach(model, lt.LoraConfig(r=8, target_modules=["up_proj"], modules_to_save=["model.norm"]), name="b")
    fill(trainable_parameters(model).values(), seed=3)
    return model


def test_status_counts_and_names_everything() -> None:
    base = make("llama")
    total = sum(p.numel() for p in base.parameters())
    assert repr(lt.status(base)).endswith("0 values train; active: none (bare base)")
    model = _two()
    status = lt.status(model)
    a, b = status.adapters
    assert (a.name, a.weight, a.layers, a.ranks, a.parameters) == ("a", None, 4, (2, 4), 2 * (4 * 128 + 2 * 96))
    assert (b.name, b.weight, b.layers, b.ranks, b.in_full) == ("b", 1.0, 2, (8,), ("model.norm",))
    assert b.parameters == status.trainable == 2 * 8 * (64 + 96) + 64
    assert (status.active, status.merged, status.total) == (("b",), None, total)
    assert status.devices == a.devices == ("cpu",)
    assert status.dtypes == a.dtypes == ("float32",)
    assert f"LlamaForCausalLM: {total:,} parameters, float32 on cpu; 2,624 values train; active: b" in repr(status)
    assert '"a" (not in use): 4 layers, rank 2, 4, 1,408 values, float32 on cpu' in repr(status)
    lt.merge(model, "a")
    assert lt.status(model).adapters[0].merged
    assert '"a" is merged' in repr(lt.status(model))
    lt.unmerge(model)
    lt.activate(model, {"a": 0.5, "b": 1})
    assert [adapter.weight for adapter in lt.status(model).adapters] == [0.5, 1.0]
    assert '"a" (active, weight 0.5)' in repr(lt.status(model))
    assert lt.status(model).total == total
    with pytest.raises(ArgumentError):
        lt.status("model")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_and_back_keeps_every_bit_of_adapters(dtype: torch.dtype) -> None:
    model = _two()
    for name in ("a", "b"):
        lt.activate(model, name)
        before = {k: v for k, v in lt.adapter_tensors(model, name).items() if "lora_" in k}
        model.to(dtype)
        assert model.model.layers[0].self_attn.q_proj.weight.dtype == dtype
        assert run(model).dtype == dtype
        cast = lt.adapter_tensors(model, name)
        assert all(torch.equal(cast[key], tensor) for key, tensor in before.items())
        model.float()
    model.double()
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float64}
    lt.activate(model, "a")
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float64}


def test_a_copy_has_adapters_of_its_own() -> None:
    model = _two()
    twin = copy.deepcopy(model)
    before = run(model)
    assert torch.equal(run(twin), before)
    fill(trainable_parameters(twin).values(), seed=9)
    lt.activate(twin, "a")
    lt.merge(twin, "a")
    third = copy.deepcopy(twin)
    assert torch.equal(run(model), before)
    assert (lt.active(model), lt.merged(model), lt.merged(third)) == (("b",), None, "a")
    lt.unmerge(third)
    lt.detach(third)
    assert torch.equal(run(third), run(make("llama")))
    assert lt.merged(twin) == "a"


def test_the_state_dict_restores_the_adapter_in_use() -> None:
    model = _two()
    before, state = run(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fill(trainable_parameters(model).values(), seed=9)
    assert not torch.equal(run(model), before)
    model.load_state_dict(state)
    assert torch.equal(run(model), before)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(run(loaded), before)
    lt.activate(loaded, "a")
    lt.activate(model, "a")
    assert torch.equal(run(loaded), run(model))


def test_a_merged_model_refuses_what_would_be_wrong_and_stays_the_same(tmp_path: Path) -> None:
    model = _two()
    lt.merge(model, "a")
    merged = run(model)
    refused = [
        lambda: lt.merge(model, "a"),
        lambda: lt.merge(model, "b"),
        lambda: lt.attach(model, lt.LoraConfig(), name="c"),
        lambda: lt.load_adapter(model, tmp_path / "a", name="c"),
        lambda: lt.activate(model, "b"),
        lambda: lt.activate(model, None),
        lambda: lt.detach(model),
        lambda: lt.detach(model, "b"),
        lambda: lt.set_adapter_tensors(model, lt.adapter_tensors(model, "a"), "a"),
    ]
    lt.save(model, tmp_path / "a", "a")
    for act in refused:
        with pytest.raises(AdapterError, match="merged"):
            act()
        assert torch.equal(run(model), merged)
    lt.unmerge(model)
    with pytest.raises(AdapterError, match="no adapter is merged"):
        lt.unmerge(model)
    for name in ("b", "a"):
        lt.detach(model, name)
    assert torch.equal(run(model), run(make("llama")))
    with pytest.raises(AdapterError, match="no adapters"):
        lt.merge(model, "a")
