"""When work runs directly, is recorded or replayed, with fake graphs; tests/gpu tests real ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from loratune.training import recordings as recordings_module
from loratune.training.recordings import Recordings, _cause


class Replayed:
    """Replaces a CUDA graph."""

    def __init__(self, log, key):
        self.log, self.key = log, key

    def replay(self):
        self.log.append(("replayed", self.key))


@pytest.fixture
def recordings(monkeypatch):
    """`Recordings` with a log of its actions; a layout below 0 cannot be recorded."""
    made, log = Recordings(), []

    def record(part, layout, work):
        log.append(("recorded", layout))
        if layout < 0:
            made.why_not = "it waits"
            return False
        made.graphs[part, layout] = Replayed(log, layout)
        return True

    monkeypatch.setattr(made, "record", record)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    made.log = log
    return made


def ran(recordings, *layouts):
    """The log of running these layouts in order."""
    recordings.log.clear()
    for layout in layouts:
        recordings.run("row", layout, lambda layout=layout: recordings.log.append(("ran", layout)))
    return recordings.log


def test_work_runs_then_is_recorded_then_replayed(recordings):
    assert ran(recordings, 1, 1, 1) == [("ran", 1), ("recorded", 1), ("replayed", 1), ("replayed", 1)]


def test_a_new_layout_frees_all_recordings_and_an_old_one_is_recorded_again_at_once(recordings):
    ran(recordings, 1, 1)
    held = []
    recordings.run("row", 2, lambda: held.append(dict(recordings.graphs)))
    assert held == [{}]
    assert ran(recordings, 1, 2, 1) == [
        ("recorded", 1), ("replayed", 1), ("recorded", 2), ("replayed", 2), ("replayed", 1),
    ]  # fmt: skip


def test_freed_work_is_recorded_again_and_after_a_restart_all_work_is_new(recordings):
    ran(recordings, 1, 1)
    recordings.free()
    assert ran(recordings, 1) == [("recorded", 1), ("replayed", 1)]
    recordings.restart()
    assert ran(recordings, 1) == [("ran", 1)]


def test_after_a_failed_recording_all_work_runs_directly(recordings):
    assert ran(recordings, -1, -1, -1, 3) == [("ran", -1), ("recorded", -1), ("ran", -1), ("ran", -1), ("ran", 3)]


def test_no_graph_is_held_by_the_module():
    """Two models in two threads share no state of recordings."""
    shared = [name for name, value in vars(recordings_module).items() if isinstance(value, list | dict | set)]
    assert [name for name in shared if not name.startswith("__")] == []


def failed(*errors):
    """The last error, raised while the one before it was handled, and so on."""
    for error, after in itertools.pairwise(errors):
        after.__context__ = error
    return errors[-1]


def test_the_reason_is_the_first_failure_and_memory_comes_before_all():
    text = "the recording could not be ended"
    assert _cause(failed(RuntimeError("it waits"), RuntimeError(text))) == ("it waits", False)
    assert _cause(failed(torch.OutOfMemoryError("no memory"), RuntimeError(text))) == ("no memory", True)
    assert _cause(failed(RuntimeError("first"), torch.OutOfMemoryError("no memory"))) == ("no memory", True)
    assert _cause(failed(RuntimeError(text + "\nmore"))) == (text, False)
