"""Trackers get the metrics of metrics.jsonl; TensorBoard's own reader reads them back."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loratune.errors import ConfigError
from loratune.runs import trackers


def test_tensorboard_reads_the_reported_metrics(tmp_path):
    (reporter,) = trackers.open_all(["tensorboard"], tmp_path, {"model": "m"})
    for step, loss in enumerate([2.0, 1.5, 1.25], start=1):
        reporter.log({"loss": loss, "learning_rate": 1e-4 * step}, step)
    reporter.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 2.0), (2, 1.5), (3, 1.25)]
    assert [e.step for e in found.Scalars("learning_rate")] == [1, 2, 3]


def test_a_tracker_that_is_not_installed_is_named_before_work_starts(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ConfigError, match=r"pip install 'loratune\[trackio\]'"):
        trackers.require(["trackio"])
