"""The execution paths of packed rows, in the order in which they are tried; `base.forward` describes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from transformers import PreTrainedModel

from loratune.base import batches, masks
from loratune.ops.attention import documents as attention
from loratune.precision import experts

ExecutionPath = Literal["packed", "position mask", "document mask", "padded batches", "per document"]
IN_ONE_CALL: tuple[ExecutionPath, ...] = ("packed", "position mask", "document mask")
"""Execution paths on which a row is one call of the model, fastest first."""
IN_PARTS: dict[ExecutionPath, float] = {"padded batches": batches.LEAST_SHARE, "per document": 1.0}
"""Execution paths that cut a row into documents, fastest first, each with the `least_share` of `base.batches`."""
PATHS: tuple[ExecutionPath, ...] = (*IN_ONE_CALL, *IN_PARTS)
"""Execution paths, fastest first."""


@contextmanager
def attention_of(model: PreTrainedModel, path: ExecutionPath) -> Iterator[None]:
    """Selects the attention that a path needs; the model's own one comes back on exit."""
    if path == "document mask":
        with masks.installed(model):
            yield
        return
    if path != "packed":
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(attention.IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def experts_of(model: PreTrainedModel, path: ExecutionPath) -> AbstractContextManager[object]:
    """Runs experts as grouped products that do not wait for the device (`precision.experts`), on a GPU."""
    on_gpu = path in IN_ONE_CALL and model.device.type == "cuda"
    return experts.installed(model) if on_gpu else nullcontext()
