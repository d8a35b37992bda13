"""What the device holds of layers that wait on the host; copies are stood in for, and real ones in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from loratune.ops.host import HostOffload


@pytest.fixture
def host(monkeypatch):
    """A `HostOffload` of a device whose copies do nothing."""
    made = HostOffload()
    made._streams = "two"
    monkeypatch.setattr(made, "_land", lambda layer: made._leaving.pop(layer)[0])
    monkeypatch.setattr(made, "_send", lambda layer: (made._rooms[layer], None))
    return made


def left(host, layer):
    """As `HostOffload.offload` on a device."""
    host._coming.clear()
    host._rooms[layer] = [torch.tensor(layer)]
    host._leaving[layer] = host._rooms[layer], None
    host.layer_done(layer)


def test_layers_that_send_nothing_let_those_below_land(host):
    for layer in range(3):
        left(host, layer)
    assert list(host._leaving) == [1, 2]
    host.layer_done(3)
    assert list(host._leaving) == [2]
    host.layer_done(4)
    assert not host._leaving


def test_the_layer_above_the_last_that_sent_calls_it_back(host):
    for layer in range(2):
        left(host, layer)
    for layer in (2, 3):
        host.layer_done(layer)
    host.prefetch_below(3)
    assert not host._coming  # layer 2 keeps what it has
    host.prefetch_below(2)
    assert list(host._coming) == [1]


def test_what_has_not_landed_is_not_called_back(host):
    left(host, 0)
    host.prefetch_below(1)
    assert not host._coming


def test_a_forward_after_one_that_was_broken_off_waits_for_none_of_its_copies(host, monkeypatch):
    for layer in range(4):
        left(host, layer)
    landed = []
    monkeypatch.setattr(host, "_land", lambda layer: landed.append(layer) or host._leaving.pop(layer)[0])
    left(host, 0)  # of the next forward
    left(host, 1)
    assert not landed
    assert list(host._leaving) == [0, 1]
