"""A sample of the sweep over model types: every column of docs/models.md, one type of each kind of row."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.campaigns import other_models
from tests.campaigns.architecture_checks import COLUMNS, check
from tests.campaigns.small_configs import small_config

SAMPLE = {
    "llama": "packed",
    "gpt2": "packed",
    "roberta": "packed",
    "bart": "packed",
    "bloom": "document mask",
    "stablelm": "position mask",
    "openai-gpt": "padded batches",
    "qwen3_moe": "packed",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAMPLE)
def test_every_column_passes(kind: str) -> None:
    *_, row = check(kind)
    assert row.columns == dict.fromkeys(COLUMNS, "")
    assert row.facts["path"] == SAMPLE[kind]


def test_small_configurations_have_a_layer_of_each_kind() -> None:
    config = small_config("gemma3_text")
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert (config.hidden_size, config.sliding_window, config.num_hidden_layers) == (64, 16, 2)
    assert small_config("qwen3_5").get_text_config().layer_types == ["linear_attention", "full_attention"]


def test_the_page_of_models_lists_every_type_with_its_path() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    rows = {cells[1]: cells for line in lines if len(cells := [cell.strip() for cell in line.split("|")]) > 10}
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= set(rows) - {"type", "---"}
    assert len(rows) > 180
    for kind, path in SAMPLE.items():
        assert path in rows[kind]
        assert rows[kind].count("✓") == len(COLUMNS) - 1
    assert {name for names in other_models.GROUPS.values() for name in names} <= {
        line.split("|")[1].strip() for line in lines if line.startswith("| ")
    }


@pytest.mark.parametrize("name", ["ConvNextForImageClassification", "Wav2Vec2ForCTC", "T5ForConditionalGeneration"])
@pytest.mark.filterwarnings("ignore")
def test_every_column_of_another_class_passes(name: str) -> None:
    *_, row = other_models.check(name)
    assert row.columns == dict.fromkeys(other_models.COLUMNS, "")
