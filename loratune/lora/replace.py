"""Hot replacement: the weights of an adapter are exchanged while the model serves requests.

A server that retrains an adapter wants the new weights without a pause, and without a forward that computes half with
the old and half with the new. So all slow or fallible work happens while the old adapter is in use: reading, checking
against the model, moving to the device or into a store's host memory. The exchange itself re-points Parameters, as
`activate` does, in a fraction of a millisecond between two forwards. Ranks, scalings and the set of layers may all
differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loratune.errors import AdapterError
from loratune.lora.files import read_adapter
from loratune.lora.inject import base_in_use, drop_unused, join
from loratune.lora.state import Adapters, require
from loratune.lora.switch import switch


def replace(model: nn.Module, directory: str | Path, name: str, *, at_next_forward: bool = False) -> None:
    """Replaces adapter `name` by the one in `directory`. If the old adapter is in use, so is the new one afterwards.

    Args:
        at_next_forward: reading and checking happen now, the exchange just before the next forward, in the thread
            that runs it. So any thread may replace an adapter of a model whose forwards run one after another: each
            forward sees the old weights or the new ones, never both.

    Raises: AdapterError: no such adapter; the folder holds no adapter that fits the model; an adapter is merged;
        at_next_forward while an adapter with modules or biases of its own is in use. The old adapter then stays.
    """
    state = require(model)
    state.require_unmerged("replace an adapter")
    if not at_next_forward:
        before = dict(state.active)
        with base_in_use(model, state):
            exchange = _prepared(model, state, directory, name)
        switch(model, state, before)
        exchange()
        return
    if state.base_modules or state.base_biases:
        raise AdapterError(
            "an adapter with modules or biases of its own is in use, and the base behind it cannot be inspected "
            "while the model runs; replace without at_next_forward, between forwards"
        )
    _before_next_forward(model, _prepared(model, state, directory, name))


def _prepared(model: nn.Module, state: Adapters, directory: str | Path, name: str) -> Callable[[], None]:
    """Prepares the new adapter. Returns a function that makes the exchange."""
    stored = state.get(name).stored
    selection, adapter = read_adapter(model, directory, name, torch.device("cpu") if stored else None)
    assert state.store is not None or not stored
    put = state.store.prepare(name, selection, adapter) if stored and state.store is not None else None

    def exchange() -> None:
        if name not in state.adapters:  # detached while this was waiting
            return
        if put is not None:
            put()
        join(model, state, name, selection, adapter)
        drop_unused(model, state)
        switch(model, state, dict(state.active))

    return exchange


def _before_next_forward(model: nn.Module, exchange: Callable[[], None]) -> None:
    """Calls `exchange` once, before the next run of the model or of its decoder alone."""
    lock = threading.Lock()
    handles: list[RemovableHandle] = []

    def hook(*_: object) -> None:
        with lock:
            if handles:
                for handle in handles:
                    handle.remove()
                handles.clear()
                exchange()

    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    with lock:
        for module in {id(module): module for module in (model, decoder)}.values():
            handles.append(module.register_forward_pre_hook(hook))
