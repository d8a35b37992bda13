"""How a model takes the positions of a packed row, found by trying.

    offset    `position_ids` is an argument, and the first position is a small number: 0, or the padding index + 1
              in RoBERTa and its descendants
    tables    the model counts along the row itself (BART, Marian, XGLM). Modules whose output depends on a token's
              place and not on the token are replaced while a row runs: the replacement asks the original for the
              longest document, and takes the lines that the positions name
    counting  the model adds up the attention mask along the row (ALiBi in BLOOM and Falcon). A mask of ones whose
              first value in each document takes the sum back to 1 makes it count from 0 in every document. It goes
              with `base.masks`, which does not read it

Replacements share the children and Parameters of the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.base.probe import ProbeRow, probe_row, relative_error, tolerance


@dataclass
class RunningRow:
    """Positions of the row that runs now; the replacements of one forward share it."""

    position_ids: Tensor | None = None
    longest: int = 0


@dataclass(frozen=True)
class PositionRule:
    """How positions reach a model."""

    offset: int = 0
    """Position of a document's first token."""
    tables: Mapping[str, int] = field(default_factory=dict)
    """Path of each replaced module in the model -> dimension of its output that counts places."""

    counting: bool = False

    def arguments(self, position_ids: Tensor) -> dict[str, Tensor]:
        """Arguments of the model for positions from 0, (T,)."""
        given = {} if self.tables else {"position_ids": (position_ids + self.offset)[None]}
        return given | ({"attention_mask": counting_mask(position_ids)[None]} if self.counting else {})

    @contextmanager
    def installed(self, model: nn.Module, row: RunningRow) -> Iterator[None]:
        """Replaces the tables, and puts the originals back on exit."""
        swapped = []
        try:
            for path, dim in self.tables.items():
                outer, _, name = path.rpartition(".")
                parent, base = model.get_submodule(outer), model.get_submodule(path)
                swapped.append((parent, name, base))
                parent._modules[name] = RowTable.from_base(base, dim, row)
            yield
        finally:
            for parent, name, base in swapped:
                parent._modules[name] = base


def counting_mask(position_ids: Tensor) -> Tensor:
    """(T,) numbers whose running sum is `position_ids` + 1."""
    return torch.cat([position_ids[:1] + 1, position_ids.diff()])


class RowTable(nn.Module):
    """Replaces a module whose output depends on places alone."""

    _base: tuple[nn.Module]  # in a tuple, so that nn.Module does not register it as a child
    _dim: int
    _row: RunningRow

    @classmethod
    def from_base(cls, base: nn.Module, dim: int, row: RunningRow) -> RowTable:
        """The replacement of `base`, whose output counts places along `dim`."""
        table = cls.__new__(cls)
        table.__dict__.update(base.__dict__)
        table._base, table._dim, table._row = (base,), dim, row
        return table

    def forward(self, *arguments: object, **named: object) -> Tensor:
        """The original's output for the longest document, taken at the row's positions."""
        positions, longest = self._row.position_ids, self._row.longest
        assert positions is not None
        cut = [_cut(value, len(positions), longest) for value in arguments]
        lines = self._base[0](*cut, **{name: _cut(value, len(positions), longest) for name, value in named.items()})
        return cast(Tensor, lines).index_select(self._dim, positions)


def _cut(value: object, total: int, longest: int) -> object:
    """An argument for a row of `total` tokens, cut to `longest`."""
    if isinstance(value, Tensor):
        dim = next((i for i, size in enumerate(value.shape) if size == total), None)
        return value if dim is None else value.narrow(dim, 0, longest)
    if isinstance(value, tuple):
        return type(value)(longest if entry == total else entry for entry in value)
    return value


def first_position(model: PreTrainedModel) -> int | None:
    """Position of a text's first token, as the model counts without `position_ids`; None if no argument gives that.

    Models with one table of embeddings count from 0, so they are not run.
    """
    if not may_hold_positions(model):
        return 0
    tokens = probe_row(model, (5,)).tokens[None]
    expected = model(input_ids=tokens, use_cache=False).logits[0]

    def run(**given: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, use_cache=False, **given).logits[0]
        return logits

    return next((n for n in _offsets(model) if _starts_at(model, run, tokens, expected, n)), None)


def may_hold_positions(model: nn.Module) -> bool:
    """True if the model has a table of embeddings beside that of its tokens."""
    return sum(isinstance(module, nn.Embedding) for module in model.modules()) > 1


def _offsets(model: PreTrainedModel) -> list[int]:
    """First positions to try."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return sorted({0, 1, 2, padding + 1 if isinstance(padding, int) else 0})


def position_rules(model: PreTrainedModel, backbone: nn.Module, row: ProbeRow, alone: Tensor) -> list[PositionRule]:
    """Rules to try on packed paths, the plain one first.

    Args:
        row: a short row, of which the first document is run.
        alone: hidden states of the row's documents alone, (T, d).
    """
    end = int(row.cu_seqlens[1])
    tokens, expected = row.tokens[None, :end], alone[:end]

    def run(**given: Tensor) -> Tensor:
        states: Tensor = backbone(input_ids=tokens, use_cache=False, **given).last_hidden_state[0]
        return states

    found = [PositionRule(n) for n in _offsets(model) if _starts_at(model, run, tokens, expected, n)]
    tables = position_tables(model, backbone, row)
    return [*found[:1], *([PositionRule(tables=tables)] if tables else [])]


def _starts_at(
    model: PreTrainedModel, run: Callable[..., Tensor], tokens: Tensor, expected: Tensor, offset: int
) -> bool:
    """True if positions that start at `offset` give the `expected` result."""
    places = torch.arange(offset, offset + tokens.shape[1], device=tokens.device)[None]
    try:
        got = run(position_ids=places)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    return relative_error(got, expected) <= tolerance(expected.dtype, model)


def position_tables(model: PreTrainedModel, backbone: nn.Module, row: ProbeRow) -> dict[str, int]:
    """Path -> dimension of places, of modules whose output depends on places and not on tokens."""
    long, short = int(row.cu_seqlens[2]), int(row.cu_seqlens[1])
    first, other = row.tokens[None, :long], row.tokens.flip(0)[None, :long]
    runs = [_outputs(backbone, tokens) for tokens in (first, other, first[:, :short])]
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, int] = {}
    for module, output in runs[0].items():
        if any(names[module].startswith(f"{outer}.") for outer in found):
            continue
        same, part = runs[1].get(module), runs[2].get(module)
        if same is None or part is None or not torch.equal(output, same) or part.dim() != output.dim():
            continue
        dims = [i for i, (a, b) in enumerate(zip(output.shape, part.shape, strict=True)) if (a, b) == (long, short)]
        if len(dims) == 1 and torch.equal(output.narrow(dims[0], 0, short), part):
            found[names[module]] = dims[0]
    return found


def _outputs(backbone: nn.Module, tokens: Tensor) -> dict[nn.Module, Tensor]:
    """Outputs that are one tensor, by module; outer modules come first. A module that runs twice is left out."""
    found: dict[nn.Module, Tensor | None] = {}

    def watch(module: nn.Module) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: object, output: object) -> None:
            once = module not in found and isinstance(output, Tensor)
            found[module] = cast(Tensor, output).detach() if once else None

        return keep

    handles = [module.register_forward_hook(watch(module)) for module in backbone.modules() if module is not backbone]
    try:
        backbone(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    order = [module for module in backbone.modules() if found.get(module) is not None]
    return {module: cast(Tensor, found[module]) for module in order}
