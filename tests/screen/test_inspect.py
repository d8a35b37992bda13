"""`inspect` reads an adapter from its folder alone, and its norms equal those of the real updates."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from rich.console import Console

from loratune import tables
from loratune.config import DataConfig, LoraConfig, RunConfig, TrainConfig, to_toml
from loratune.errors import AdapterError, ConfigError
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import attach
from loratune.screen.inspect import Inspected, as_json, draw, inspect
from tests.conftest import build
from tests.extending.toy_variant import GatedConfig


def drawn(found: Inspected, encoding: str = "utf-8") -> str:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=80)
    draw(found, console)
    console.file.flush()
    assert isinstance(console.file, io.TextIOWrapper)
    return console.file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter with every special case: patterns, rsLoRA, a module trained in full."""
    model = build("llama")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers\.1\..*up_proj": 3},
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    attach(model, config, name="a")
    save(model, tmp_path / "dates", "a")
    return tmp_path / "dates"


def test_norms_are_those_of_the_updates(folder: Path) -> None:
    model = build("llama")
    load_adapter(model, folder, name="a")
    layers = {layer.path: layer for layer in inspect(folder).layers}
    assert len(layers) == 14
    for path, layer in layers.items():
        live = model.get_submodule(path)
        assert layer.scaling == pytest.approx(live.scaling, rel=1e-12), path
        assert (layer.d_in, layer.d_out) == (live.in_features, live.out_features)
        update = live.scaling * live.lora_B.double() @ live.lora_A.double()
        assert layer.norm == pytest.approx(update.norm().item(), rel=1e-9), path
    assert layers["model.layers.0.self_attn.q_proj"].r == 2


def test_it_reads_what_peft_wrote(tmp_path: Path) -> None:
    wrapped = get_peft_model(
        build("gpt2"), PeftConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert [(layer.path, layer.r) for layer in found.layers] == [
        ("transformer.h.0.attn.c_attn", 3),
        ("transformer.h.1.attn.c_attn", 3),
    ]
    text = drawn(found)
    assert "attn.c_attn" in text
    assert "not recorded" in text


def test_a_trained_folder_tells_its_story(folder: Path) -> None:
    run = RunConfig(
        model="some/base",
        data=["/private/place/dates.jsonl"],
        out="x",
        dataset=DataConfig(tokens_per_row=2048),
        training=TrainConfig(learning_rate=2e-4, gradient_accumulation_steps=1),
    )
    (folder / "run.toml").write_text(to_toml(run))
    lines = [{"step": n, "loss": 4.0 / n, "trained_tokens": 100 * n, "tokens": 512, "tokens_per_second": 256.0}
             for n in range(1, 11)]  # fmt: skip
    lines += [{"step": 5, "eval_loss": 1.5}, {"step": 10, "eval_loss": 0.75}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = drawn(inspect(folder))
    for expected in ("dates.jsonl", "10 in 20 s, 1,000 trained", "4.0000", "0.4000", "0.7500 held-out, at step 10"):
        assert expected in text, expected
    assert "/private" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_plain_terminals_get_plain_characters(folder: Path) -> None:
    assert "lm_head" in drawn(inspect(folder), encoding="ascii")


def test_json_is_complete(folder: Path) -> None:
    values = json.loads(json.dumps(as_json(inspect(folder)), allow_nan=False))
    assert values["layers"]["model.layers.1.mlp.up_proj"]["r"] == 4
    assert values["in_full"] == ["lm_head.weight"]
    assert values["parameters"] > values["layers"]["model.layers.1.mlp.up_proj"]["r"] * (64 + 96)


def test_other_folders_are_named_for_what_they_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        inspect(tmp_path / "nowhere")
    build("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="not an adapter"):
        inspect(tmp_path / "base")
    (folder / "run.toml").write_text("model = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        inspect(folder)


def test_a_variant_is_named_and_its_tensors_belong_to_their_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tables.VARIANTS, "use_gate", "tests.extending.toy_variant:GATED")
    model = build("llama")
    attach(model, GatedConfig(r=2, use_gate=True, target_modules=["q_proj"], modules_to_save=["lm_head"]), name="a")
    save(model, tmp_path / "gated", "a")
    found = inspect(tmp_path / "gated")
    assert [layer.path for layer in found.layers] == [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    assert found.in_full == ("lm_head.weight",)
    assert "GatedLora, not a low-rank sum; the table shows scaling" in " ".join(drawn(found).split())
