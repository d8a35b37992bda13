"""State of a forward: it is freed with the model, and a copied model has a state of its own."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch

from loratune.ops.buffers import COUNTERS, KernelBuffers
from loratune.ops.dropout import dropout_key, row_key
from loratune.ops.state import ForwardState
from tests.ops.test_threads import KINDS, forward_of, trained


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_model_is_freed_with_its_state(kind):
    forward = forward_of(kind, 0)
    trained(forward, 0)
    objects = [forward.model, forward.state, forward.state.buffers, forward.state.products, *forward.model.modules()]
    alive = [weakref.ref(one) for one in objects]
    del forward, objects
    gc.collect()
    assert not [found for found in (reference() for reference in alive) if found is not None]


@pytest.mark.parametrize("duplicate", ["copied", "saved"])
def test_a_copy_of_a_model_has_a_state_of_its_own(duplicate):
    forward = forward_of("modules", 0)
    forward.state.buffers.counters(torch.device("cpu"))
    with forward.installed(), forward.state.dropout(row_key(dropout_key(0, 0))):
        if duplicate == "copied":
            twin = copy.deepcopy(forward.model)
        else:
            file = io.BytesIO()
            torch.save(forward.model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
    states = [module.state for module in twin.modules() if hasattr(module, "lora_A")]
    assert states
    assert all(isinstance(state, ForwardState) and state.dropout_row is None for state in states)
    assert forward.state not in states


def test_an_interrupted_row_leaves_no_dropout_key():
    state, row = ForwardState(), row_key(1)
    with pytest.raises(KeyboardInterrupt), state.dropout(row), state.dropout(None):
        assert state.dropout_row is None
        raise KeyboardInterrupt
    assert state.dropout_row is None


def test_buffers_are_made_once_and_belong_to_their_owner():
    cpu, ours, theirs = torch.device("cpu"), KernelBuffers(), KernelBuffers()
    counters = ours.counters(cpu)
    assert counters.shape == (COUNTERS,)
    assert not counters.any()
    assert ours.counters(cpu) is counters
    assert theirs.counters(cpu) is not counters
    made = [ours.table("key", lambda: (torch.zeros(1),)) for _ in range(2)]
    assert made[0] is made[1]
    assert theirs.table("key", lambda: (torch.ones(1),))[0] == 1
