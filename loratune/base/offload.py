"""Moves input embeddings to host memory."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from loratune.ops.host import is_mapped, mapped


def embeddings_to_host(model: PreTrainedModel) -> None:
    """Moves the input embeddings of a model on a GPU to host memory, unless the head shares the table.

    The table stays there afterwards. It works as before, and the GPU may have no free memory to take it back.
    """
    weight = cast(nn.Parameter, model.get_input_embeddings().weight)
    head = model.get_output_embeddings()
    shared = isinstance(head, nn.Module) and head.weight is weight
    if weight.is_cuda and not shared and not is_mapped(weight):
        weight.data = mapped(weight.data)
        torch.cuda.empty_cache()
