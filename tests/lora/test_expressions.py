"""Adapter configurations that would hang: slow expressions, and ranks far beyond the file, fail within a second."""

from __future__ import annotations

import json
import time

import pytest

import loratune as lt
from loratune.errors import AdapterError
from loratune.lora.expressions import PathExpression, fits_end
from loratune.lora.files import read_info
from tests.cli_lab import loratune, small_model

SLOW = r"((.|[a-z])*)*[^a-z_.0-9]"


@pytest.fixture
def saved(tmp_path):
    base = small_model(tmp_path / "base")
    model = lt.load(str(base), device="cpu")
    lt.attach(model, lt.LoraConfig(r=2))
    lt.save(model, tmp_path / "adapter")
    return base, tmp_path / "adapter"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"alpha_pattern": {SLOW: 3}},
        {"rank_pattern": {SLOW: 3}},
        {"layers_pattern": [SLOW], "layers_to_transform": [0]},
        {"r": 10**6},
        {"rank_pattern": {"q_proj": 10**7}},
    ],
    ids=str,
)
def test_it_fails_within_a_second(saved, changes):
    base, folder = saved
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model = lt.load(str(base), device="cpu")
    start = time.process_time()
    with pytest.raises(AdapterError, match=r"takes over|was made for another model or rank"):
        lt.load_adapter(model, folder)
    assert time.process_time() - start < 2
    for verb in (["inspect", str(folder)], ["resize", str(folder), "--rank", "1", "--out", str(folder) + "-1"]):
        start = time.process_time()
        assert loratune(*verb).status in (0, 2)
        assert time.process_time() - start < 4


@pytest.mark.parametrize("text", ["[" * 99_999, '{"r": 1, "r": 2}', "[]", "", '{"r": ' + "9" * 5000 + "}"])
def test_a_damaged_configuration_names_its_file(saved, text):
    (saved[1] / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json: "):
        read_info(saved[1])


def test_expressions_mean_what_they_mean_to_peft():
    assert PathExpression("f", r".*\.(q|v)_proj").fits("a.q_proj")
    assert not PathExpression("f", r"(q|v)_proj").fits("a.q_proj")
    assert fits_end("f", "q_proj", "a.q_proj")
    assert fits_end("f", r"b\.q_.*", "a.b.q_proj")
    assert not fits_end("f", "q_proj", "a.xq_proj")
    assert PathExpression("f", r"(?:^|.*?\.)layers\.(\d+)\.").number_in("model.layers.12.q") == 12
    with pytest.raises(AdapterError, match="is not a regular expression"):
        PathExpression("f", "(")
