"""An adapter from the difference of two checkpoints: exact if the difference is low-rank, else with its error."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from loratune.adapters import lowrank
from loratune.adapters.extract import WeightReader, extract
from loratune.config import LoraConfig
from loratune.errors import AdapterError, ConfigError, ModelError, OutputError
from loratune.lora.files import load_adapter
from loratune.lora.inject import attach, merge, trainable_parameters
from tests.conftest import build
from tests.lora.helpers import fill, run


def _saved(model: PreTrainedModel, folder: Path, **how: object) -> str:
    model.save_pretrained(folder, **how)
    return str(folder)


def _tuned(name: str = "llama", std: float = 0.02) -> PreTrainedModel:
    """Every parameter moved, as full fine-tuning does."""
    model = build(name)
    fill(model.parameters(), std=std)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merged_adapter_comes_back(tmp_path: Path, name: str) -> None:
    """The rank suffices: the logits equal those of the merged checkpoint in float32."""
    model = build(name)
    base = _saved(model, tmp_path / "base")
    attach(model, LoraConfig(r=3))
    fill(trainable_parameters(model).values())
    merge(model, reversible=False)
    tuned = _saved(model, tmp_path / "tuned")
    expected = run(model)
    found = extract(tuned, base, tmp_path / "out", rank=3)
    fresh = build(name)
    untuned = run(fresh)
    load_adapter(fresh, tmp_path / "out")
    assert float((untuned - expected).abs().max()) > 0.1
    assert float((run(fresh) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert found.errors[3] < 1e-5 < 0.05 < found.errors[1]
    assert found.left_out == {}


@pytest.mark.parametrize("way", ["exact", "randomised"])
def test_the_table_is_the_error_that_each_rank_really_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(lowrank, "EXACT_SIDE", 2048 if way == "exact" else 8)
    before, after = build("llama"), _tuned()
    base, tuned = _saved(before, tmp_path / "base"), _saved(after, tmp_path / "tuned", max_shard_size="100KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    found = extract(tuned, base, tmp_path / "out", rank=4)
    assert list(found.errors) == [1, 2, 4, 8, 16]
    old, new = before.state_dict(), after.state_dict()
    lost, whole = dict.fromkeys(found.errors, 0.0), 0.0
    for path, layer in found.layers.items():
        assert layer.exact == (way == "exact")
        delta = (new[f"{path}.weight"] - old[f"{path}.weight"]).double()
        values = torch.linalg.svdvals(delta).square()
        whole += float(values.sum())
        for r, error in layer.errors.items():
            best = float((values[r:].sum() / values.sum()).sqrt())
            assert best * (1 - 1e-6) <= error <= best * (1.0001 if layer.exact else 1.1)
            lost[r] += (error * layer.norm) ** 2
    for r, error in found.errors.items():
        assert error == pytest.approx((lost[r] / whole) ** 0.5, rel=1e-5)
    report = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert report["relative_errors_by_rank"] == {str(r): e for r, e in found.errors.items()}
    assert set(report["layers"]) == set(found.layers)
    written = load_adapter(build("llama"), tmp_path / "out")
    assert set(written.ranks.values()) == {4}


def test_changes_outside_of_the_adapter_are_listed(tmp_path: Path) -> None:
    base, tuned = _saved(build("llama"), tmp_path / "base"), _saved(_tuned(), tmp_path / "tuned")
    found = extract(tuned, base, tmp_path / "out", rank=2, target_modules=["q_proj"])
    assert {"model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"} <= set(found.left_out)
    assert not any("q_proj" in key for key in found.left_out)
    assert "changed too, but not in the adapter" in str(found)
    assert all(0 < change < 10 for change in found.left_out.values())


def test_half_precision_differences_are_exact(tmp_path: Path) -> None:
    """bfloat16 weights that moved by one unit in the last place differ by exactly one unit."""
    model = build("llama", dtype=torch.bfloat16)
    base = _saved(model, tmp_path / "base")
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5].float(), torch.tensor(9.0)).bfloat16() * 1.01
        moved = float(weight[3, 5].float())
    tuned = _saved(model, tmp_path / "tuned")
    found = extract(tuned, base, tmp_path / "out", rank=1, target_modules=["q_proj"])
    before = float(build("llama", dtype=torch.bfloat16).model.layers[0].self_attn.q_proj.weight[3, 5].float())
    assert found.layers["model.layers.0.self_attn.q_proj"].norm == pytest.approx(abs(moved - before), rel=1e-6)


def test_one_weight_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = _saved(build("llama"), tmp_path / "base"), _saved(_tuned(), tmp_path / "tuned")
    read = WeightReader.read
    living: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(self: WeightReader, key: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, key)
        living.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in living))
        return tensor

    monkeypatch.setattr(WeightReader, "read", counted)
    extract(tuned, base, tmp_path / "out", rank=2)
    assert len(living) > 28
    assert most <= 4  # two of this layer, and two of the previous one until they are replaced


def test_mistakes(tmp_path: Path) -> None:
    base, tuned = _saved(build("llama"), tmp_path / "base"), _saved(_tuned(), tmp_path / "tuned")
    with pytest.raises(AdapterError, match="do not differ in any of the 14 layers"):
        extract(base, base, tmp_path / "out", rank=2)
    with pytest.raises(ConfigError, match="rank is 0"):
        extract(tuned, base, tmp_path / "out", rank=0)
    with pytest.raises(ConfigError, match=r"rank 10000 is larger than every layer: .*largest useful rank is \d+$"):
        extract(tuned, base, tmp_path / "out", rank=10_000)
    with pytest.raises(ModelError, match="no such folder"):
        extract(str(tmp_path / "tune"), base, tmp_path / "out", rank=2)
    with pytest.raises(ModelError, match=r"has no tensor model.layers.0.self_attn.q_proj.weight"):
        extract(_saved(_tuned("gpt2"), tmp_path / "gpt2"), base, tmp_path / "out", rank=2)
    with pytest.raises(OutputError, match="is one of the sources"):
        extract(tuned, base, tuned, rank=2, overwrite=True)
    assert not (tmp_path / "out").exists()
