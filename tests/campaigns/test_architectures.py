"""A sample of the sweep over model types: every column of docs/models.md, one type of each kind of row."""

from __future__ import annotations

import pytest

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
