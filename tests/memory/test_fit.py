"""The plan of a run on a CPU, and the message for a GPU that is too small. The dry step is tested in tests/gpu."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from loratune.base.forward import prepare
from loratune.config import LoraConfig
from loratune.errors import ConfigError
from loratune.fused.policy import ActivationPlan, Level, tiles
from loratune.memory.budget import RowSetting, peak
from loratune.memory.devices import named
from loratune.memory.estimate import EstimateRequest, survey_of
from loratune.memory.fit import DryStep, _any_row, by_estimate, first_that_fits, fit, plans_of_modules, too_small
from loratune.memory.simulate import without_data
from loratune.training.graph import layout_for
from tests.training.helpers import config, model_with_adapter, trainable

GIB = 1 << 30


@pytest.mark.parametrize(("activations", "level"), [("auto", Level.NONE), ("full", Level.FULL)])
def test_on_a_cpu_the_setting_is_the_plan(activations, level):
    model = model_with_adapter("llama")
    forward = prepare(model)
    found = fit(forward, trainable(model), config(activations=activations), 64)
    assert forward.plan == found.plan
    assert set(found.plan.levels) == {level}


def test_the_error_names_the_missing_bytes_and_the_settings_that_help():
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    what = survey_of(
        without_data(tf.LlamaConfig(**shape), torch.bfloat16), EstimateRequest("auto", LoraConfig(), RowSetting(1))
    )
    text = too_small(what, RowSetting(32768), config(activations="none"), named("H200"), 24 * GIB)
    assert "a row of 32768 tokens takes 1" in text  # more than 100 GiB
    assert "24.00 GiB may be taken" in text
    assert "--activations auto" in text
    assert "--precision nf4" in text
    hopeless = too_small(what, RowSetting(32768), config(), named("H200"), 4 * GIB)
    assert "--tokens-per-row" not in hopeless
    assert "Set --precision nf4" in hopeless


def test_a_device_is_found_by_a_part_of_its_name_or_made_of_a_size():
    assert named("rtx 4090").name == "NVIDIA RTX 4090"
    assert named("24GiB").memory_bytes == 24 * GIB
    with pytest.raises(ConfigError, match="H100"):
        named("H10O")


@pytest.mark.parametrize("text", ["24", "GiB", "a lot"])
def test_a_text_that_is_no_size_is_an_error_with_the_setting(text):
    with pytest.raises(ConfigError, match=r"memory: .*24GiB"):
        config(memory=text)


@pytest.mark.parametrize(("tokens", "tile"), [(8192, 2048), (1000, 300), (5, 8192), (4097, 4096), (640, 640)])
def test_tiles_cover_a_row_and_are_no_wider_than_asked(tokens, tile):
    parts = tiles(tokens, tile)
    assert [t for part in parts for t in range(part.start, part.stop)] == list(range(tokens))
    assert all(part.stop - part.start <= -(-tile // 64) * 64 for part in parts)


def plans_and_trials(*outcomes):
    """`first_that_fits` over one plan for each outcome; the chosen plan, and the plans that were tried."""
    plans = [ActivationPlan.uniform(level, 2) for level in Level][: len(outcomes)]
    tried = []

    def trial(plan):
        tried.append(plans.index(plan))
        outcome = outcomes[plans.index(plan)]
        return None if outcome is None else DryStep(0, outcome)

    found = first_that_fits([plans[0], *plans], trial)  # the first comes twice, as a closer share may choose it again
    return (None if found is None else plans.index(found[0])), tried


def test_the_first_plan_whose_recording_fits_is_taken_and_no_plan_tried_twice():
    assert plans_and_trials(True, True) == (0, [0])
    assert plans_and_trials(None, False, True, True) == (2, [0, 1, 2])


def test_if_no_recording_fits_the_fastest_plan_that_fits_is_taken():
    assert plans_and_trials(None, False, False) == (1, [0, 1, 2])
    assert plans_and_trials(None, None) == (None, [0, 1])


@pytest.mark.parametrize("tokens", [2, 3, 64, 384, 640, 1024, 5000])
def test_the_trial_row_takes_as_much_memory_as_any_of_its_length(tokens):
    """Uneven documents, as many as the estimate assumes, and trained positions that are gathered."""
    row = _any_row(tokens, RowSetting(tokens).documents)
    layout = layout_for(row, {})
    assert int(row.cu_seqlens[-1]) == tokens == len(row.position_ids) == len(row.weights)
    assert bool((row.cu_seqlens.diff() > 0).all())
    if tokens >= 64:
        assert layout.documents == RowSetting(tokens).documents
        assert layout.documents * layout.longest != tokens or layout.documents == 1
        assert 0.75 * tokens <= layout.scored < tokens


@pytest.mark.parametrize(("tokens", "daring"), [(8192, True), (131_072, False)])
def test_a_plan_that_may_just_not_fit_is_tried_first_where_a_step_is_quick(tokens, daring):
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    what = survey_of(
        without_data(tf.LlamaConfig(**shape), torch.bfloat16), EstimateRequest("auto", LoraConfig(), RowSetting(1))
    )
    setting, limit = RowSetting(tokens), (20 if daring else 80) * GIB
    totals = [peak(what, setting, plan).total for plan in by_estimate(what, setting, named("H200"), limit)]
    assert (limit < totals[0] <= 1.03 * limit) == daring
    assert all(total <= limit for total in totals[daring:])
    assert totals == sorted(totals, reverse=True)


def test_layers_that_run_as_modules_save_less_from_plan_to_plan():
    plans = list(plans_of_modules(6))
    assert [sum(plan.levels) for plan in plans] == [0, 6, 9, 15, 18, 30, 30, 36]
    assert all(plan.levels == tuple(sorted(plan.levels, reverse=True)) for plan in plans)
    assert [plan.embeddings_on_host for plan in plans] == [False] * 6 + [True] * 2
    assert len(set(plans_of_modules(1))) == 5  # a plan that repeats is tried once
