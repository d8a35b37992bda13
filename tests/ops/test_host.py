"""Device memory of offloaded layers, with copies that do nothing. Real copies are tested in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from loratune.ops.host import HostOffload, is_mapped


@pytest.fixture
def host(monkeypatch):
    """A `HostOffload` whose copies do nothing."""
    made = HostOffload()
    made._streams = "two"
    monkeypatch.setattr(made, "_finish_leaving", lambda layer: made._leaving.pop(layer)[0])
    monkeypatch.setattr(made, "_start_return", lambda layer: (made._buffers[layer], None))
    return made


def offloaded(host, layer):
    """Does what `HostOffload.offload` does on a GPU."""
    host._returning.clear()
    host._buffers[layer] = [torch.tensor(layer)]
    host._leaving[layer] = host._buffers[layer], None
    host.layer_done(layer)


def test_layers_without_offloading_free_the_tensors_of_layers_below(host):
    for layer in range(3):
        offloaded(host, layer)
    assert list(host._leaving) == [1, 2]
    host.layer_done(3)
    assert list(host._leaving) == [2]
    host.layer_done(4)
    assert not host._leaving


def test_the_layer_above_the_last_offloaded_one_starts_its_return(host):
    for layer in range(2):
        offloaded(host, layer)
    for layer in (2, 3):
        host.layer_done(layer)
    host.prefetch_below(3)
    assert not host._returning  # layer 2 saves its tensors on the device
    host.prefetch_below(2)
    assert list(host._returning) == [1]


def test_tensors_that_are_still_leaving_do_not_return(host):
    offloaded(host, 0)
    host.prefetch_below(1)
    assert not host._returning


def test_a_forward_waits_for_no_copies_of_an_interrupted_one(host, monkeypatch):
    for layer in range(4):
        offloaded(host, layer)
    waited = []
    monkeypatch.setattr(host, "_finish_leaving", lambda layer: waited.append(layer) or host._leaving.pop(layer)[0])
    offloaded(host, 0)  # the next forward
    offloaded(host, 1)
    assert not waited
    assert list(host._leaving) == [0, 1]


def test_a_tensor_on_the_cpu_is_not_mapped():
    assert not is_mapped(torch.zeros(3))
