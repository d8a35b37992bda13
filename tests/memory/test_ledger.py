"""The bytes of a fused layer, counted by running it without data, against figures that were right on a GPU.

`layer_bytes.json` was recorded from the ledger written by hand that this one replaced: its estimates were within 5 %
of the measured peaks of an H200 and never below them (benchmarks/results/2026-11-26-h200-estimate.jsonl).
"""

from __future__ import annotations

import functools
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
import transformers as tf

from benchmarks.memory_estimate import ESTIMATED
from benchmarks.memory_lab import TARGETS, cut, plan_of
from benchmarks.shapes import model_of
from loratune.config import LoraConfig
from loratune.fused.policy import ActivationPlan, Level
from loratune.lora.inject import attach
from loratune.memory.budget import RowSetting, peak
from loratune.memory.estimate import EstimateRequest, survey_of
from loratune.memory.ledger import LayerLedger, LayerRun
from loratune.memory.simulate import simulate, without_data
from loratune.tables import PRECISIONS
from tests.conftest import SMALL, build
from tests.fused.models import MODELS

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "layer_bytes.json").read_text())
MEASURED = HERE.parent.parent / "benchmarks/results/2026-11-26-h200-estimate.jsonl"
SHAPES = {
    "l7b": (tf.LlamaConfig, 4096, 11008, 32, 32, {}),
    "l8b": (tf.LlamaConfig, 4096, 14336, 32, 8, {}),
    "l1b": (tf.LlamaConfig, 2048, 8192, 32, 8, {}),
    "q8b": (tf.Qwen3Config, 4096, 12288, 32, 8, {"head_dim": 128}),
    "q0_6b": (tf.Qwen3Config, 1024, 3072, 16, 8, {"head_dim": 128}),
}
ADAPTED = {"all": TARGETS, "attention": ["q_proj", "v_proj"], "mlp": ["gate_proj", "down_proj"]}
GIB = 1 << 30


@functools.cache
def ledger(shape: str, precision: str, r: int, adapted: str) -> LayerLedger:
    kind, width, mlp, heads, shared, own = SHAPES[shape]
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_attention_heads": heads}
    config = kind(**sizes, num_key_value_heads=shared, num_hidden_layers=1, vocab_size=1000, **own)
    return survey_of(without_data(config, torch.bfloat16), requested(precision, r, ADAPTED[adapted])).ledgers[0]


def requested(precision: str, r: int, target_modules: list[str]) -> EstimateRequest:
    name = precision if precision in PRECISIONS else "auto"
    return EstimateRequest(name, LoraConfig(r=r, target_modules=target_modules), RowSetting(1))


@pytest.fixture(scope="module", autouse=True)
def _no_ledger_outlives_this_module():
    yield
    ledger.cache_clear()


@pytest.mark.parametrize("precision", ["bf16", "nf4", "fp8"])
def test_layers_take_the_recorded_bytes(precision):
    """All levels, tiles, documents and adapters on record: at most 0.5 % below and 3 % above."""
    wrong, rows = [], [dict(zip(RECORDED["columns"], row, strict=True)) for row in RECORDED["rows"]]
    for row in rows:
        if row["precision"] != precision:
            continue
        run = LayerRun(row["tokens"], row["documents"], Level[row["level"]], row["tile"], row["hold_transposed"])
        found = ledger(row["shape"], precision, row["r"], row["targets"])(run)
        for name in ("saved", "forward", "away", "backward"):
            if not 0.995 * row[name] <= getattr(found, name) <= 1.03 * row[name]:
                wrong.append((row, name, getattr(found, name)))
    assert not wrong


def test_working_copies_are_those_of_the_recorded_ledger():
    """Within 1 %, or 0.2 MB: a Qwen3 layer also holds the norms of its heads in one table."""
    for row in (dict(zip(RECORDED["columns"], row, strict=True)) for row in RECORDED["rows"]):
        found = ledger(row["shape"], row["precision"], row["r"], row["targets"]).copies_bytes()
        assert found == pytest.approx(row["copies"], rel=0.01, abs=2e5)


def test_estimates_are_above_measured_peaks_by_at_most_five_percent():
    """The peaks of whole models on an H200, as measured on 26 November 2026."""
    rows = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    measured = [row for row in rows if "measured_gib" in row]
    assert len(measured) == len(ESTIMATED)
    for case, row in zip(ESTIMATED, measured, strict=True):
        shape, layers, precision, r, batch, tokens, text, uneven = case
        assert (row["shape"], row["r"], row["batch"], row["tokens"]) == (shape, r, batch, tokens)
        found = survey_of(model_of(cut(shape, layers), "meta"), requested(precision, r, TARGETS))
        plan = plan_of(text, found.layers)
        estimated = peak(found, RowSetting(batch * tokens, even=not uneven), plan).allocated / GIB
        assert row["measured_gib"] <= estimated <= 1.05 * row["measured_gib"], (case, estimated, row["measured_gib"])


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_has_a_ledger(name):
    """No code of the ledger knows a recipe. Frugal levels save less, and all tensors but the gradients are freed."""
    model = without_data(MODELS[name](SMALL).config, torch.bfloat16)
    request = EstimateRequest("auto", LoraConfig(r=4, target_modules="all-linear"), RowSetting(512))
    found = survey_of(model, request)
    assert len(found.ledgers) == found.layers
    levels = (Level.NONE, Level.WIDE, Level.SELECTIVE, Level.FULL, Level.OFFLOAD)
    runs = [found.ledgers[0](LayerRun(512, 0, level, 256)) for level in levels]
    saved = [run.saved for run in runs]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > saved[-2] > saved[-1]
    assert [run.away > 0 for run in runs] == [level.on_host for level in levels]
    assert all(run.backward > run.saved for run in runs)


def test_a_second_run_of_a_layer_takes_the_same_bytes():
    """Nothing of a run stays alive."""
    layer = ledger("l1b", "bf16", 16, "all")
    run = LayerRun(2048, 16, Level.SELECTIVE, 1024)
    assert layer._run(run) == layer._run(run)


def test_estimates_keep_no_model_alive():
    """Neither the ledger nor the simulation of modules registers a model anywhere."""
    kept = []
    for _ in range(5):
        model = without_data(build("llama").config, torch.bfloat16)
        request = EstimateRequest("auto", LoraConfig(r=4, target_modules=TARGETS), RowSetting(256))
        found = survey_of(model, request)
        peak(found, RowSetting(256), ActivationPlan.uniform(Level.FULL, found.layers))
        attach(model, LoraConfig(r=4, target_modules=TARGETS))
        simulate(model, 64, ActivationPlan.uniform(Level.NONE, found.layers), on_gpu=True)
        kept += [weakref.ref(model), weakref.ref(model.model.layers[0].self_attn), weakref.ref(found.ledgers[0])]
        del model, found
    gc.collect()
    assert not any(reference() is not None for reference in kept)
