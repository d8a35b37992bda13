"""Operators of recurrent layers, with the arguments that transformers' layers give them and documents kept apart.

transformers writes each recurrent layer as projections around a few named functions: a short convolution and a scan.
Each has a reference in PyTorch, and kernels of other packages may stand behind it. `tables.ROW_OPERATORS` names the
functions that replace them while a packed row runs (`base.row_layers`). The first argument is the forward's state,
which holds the positions of the row. The others are those of transformers. No cache is in use in a packed row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from transformers.activations import ACT2FN

from loratune.ops.recurrence.convolution import causal_convolution
from loratune.ops.recurrence.decayed import decayed_attention
from loratune.ops.recurrence.delta import gated_delta_rule
from loratune.ops.recurrence.selective import selective_scan
from loratune.ops.state import ForwardState

_NORM_EPSILON = 1e-6
"""Added to sums of squares before queries and keys are normalised, as in flash-linear-attention."""


def positions_of(state: ForwardState, tokens: int) -> Tensor:
    """(T,) positions of the row in use. Raises: ValueError: the row has another number of tokens."""
    positions = state.row_positions
    if positions is None or len(positions) != tokens:
        raise ValueError(f"a recurrent layer got {tokens} tokens, which are not the tokens of a packed row")
    return positions


def _refuse_cache(*states: object) -> None:
    if any(state is not None and state is not False for state in states):
        raise NotImplementedError("a packed row has no cache")


def convolution(
    state: ForwardState,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **others: object,
) -> Tensor:
    """(batch, channels, T) -> (batch, channels, T): causal depthwise convolution, then the activation."""
    _refuse_cache(others.get("initial_states"), others.get("return_final_states"))
    out = causal_convolution(hidden_states, weight, bias, positions_of(state, hidden_states.shape[2]))
    if activation is None:
        return out
    result: Tensor = silu(out) if activation in ("silu", "swish") else ACT2FN[activation](out)
    return result


def delta_rule(
    state: ForwardState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: object,
) -> tuple[Tensor, None]:
    """The gated delta rule, (batch, T, heads, value), and no state. `g` is the decay's logarithm."""
    _refuse_cache(initial_state, output_final_state)
    epsilon = _NORM_EPSILON if use_qk_l2norm_in_kernel else None
    out = gated_delta_rule(query, key, value, g, beta, positions_of(state, query.shape[1]), epsilon=epsilon)
    return out * query.shape[-1] ** -0.5, None


def mamba2_scan(
    state: ForwardState,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **others: object,
) -> Tensor:
    """The scan of Mamba 2, (batch, T, heads, head size)."""
    _refuse_cache(initial_states, return_final_states)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    dt = torch.clamp(softplus(dt) if dt_softplus else dt, *dt_limit)
    positions = positions_of(state, hidden_states.shape[1])
    out = decayed_attention(C, B, hidden_states, dt.float() * A.float(), dt, positions)
    if D is not None:
        out = out + D.to(out.dtype)[:, None] * hidden_states
    return out if z is None else out * silu(z)


def mamba_scan(
    state: ForwardState,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **others: object,
) -> Tensor:
    """The selective scan of Mamba 1. Tensors are (batch, channels or states, T), and so is the result."""
    _refuse_cache(return_last_state)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    dt = softplus(dt) if delta_softplus else dt
    positions = positions_of(state, hidden_states.shape[2])
    out = selective_scan(hidden_states.mT, dt.mT, A, B.mT, C.mT, positions).mT
    if D is not None:
        out = out + hidden_states * D[:, None]
    return out if z is None else out * silu(z)


def unfused(state: ForwardState, *arguments: object, **others: object) -> None:
    """Stands for kernels that replace a whole layer and skip its adapters. Without them the layer runs its parts."""
