"""Adapters on a model: attach, activate, merge, unmerge, detach. Module instances are replaced; nothing is patched.

`attach` replaces each selected layer by a `LoraLayer`. After that, switching adapters only re-points Parameters: the
active adapter is found in `model.parameters()`, and the model's `Adapters` object holds the others, which come back
to the bit. With none active the model computes the same bits as before `attach`.

Every function validates all it can before it changes anything, so an error leaves the model unchanged.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.errors import AdapterError, expect
from loratune.lora import peft_keys, tied
from loratune.lora.build import build
from loratune.lora.layer import LoraLayer
from loratune.lora.select import Selection, select
from loratune.lora.state import Adapter, Adapters, find, identity, install, require, ties, uninstall
from loratune.lora.switch import is_plain, set_module, switch
from loratune.ops.dropout import layer_salt
from loratune.precision.finite import fault_of, overflow
from loratune.precision.linear import count_parameters


@dataclass(frozen=True, repr=False)
class Attached:
    """Report of `attach` or `load_adapter`; `print` it."""

    name: str
    ranks: dict[str, int]
    """Path of each adapted layer -> rank."""
    modules_to_save: tuple[str, ...]
    biases: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    """Parameters of the base model and this adapter together."""
    left_out: tuple[str, ...] = ()
    """Reasons why "all-linear" skipped linear layers; layers narrower than the rank share one line."""
    notes: tuple[str, ...] = ()
    """Settings that are legal and of no use, such as a rank above a layer's smaller side."""

    def __repr__(self) -> str:
        return f"<Attached {str(self).partition(chr(10))[0]}>"

    def __str__(self) -> str:
        share = self.trainable_parameters / max(1, self.total_parameters)
        lines = [
            f'adapter "{self.name}": {len(self.ranks)} layers, {self.trainable_parameters:,} of '
            f"{self.total_parameters:,} parameters train ({share:.2%})"
        ]
        kinds = Counter((path.rpartition(".")[2], r) for path, r in self.ranks.items())
        lines += [f"  {count:>4} x {leaf}, rank {r}" for (leaf, r), count in kinds.items()]
        lines += [f"  in full: {path}" for path in self.modules_to_save]
        if self.biases:
            lines.append(f"  {len(self.biases)} biases")
        lines += [f"  left out: {why}" for why in self.left_out]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def attach(
    model: nn.Module, config: LoraConfig, name: str = "default", seed: int = 0, *, active: bool = True
) -> Attached:
    """Adds a new adapter to `model`, freezes the base, and makes the adapter the active one.

    Args:
        model: any module; its layers are replaced in place. Move and cast it before, not after: masters are float32.
        name: any non-empty string that can name a folder.
        seed: seed of the initial A (and B); torch's global generator is not touched.
        active: False leaves the adapters in use as they are.

    Raises:
        ArgumentError: `model` is not a module, or `config` is not a LoraConfig.
        ConfigError: a value of `config` is out of range.
        AdapterError: the name is taken or unusable; an entry matches nothing, or a layer that cannot be adapted;
            another adapter is merged. The model is then unchanged.
    """
    call = "attach(model, config)"
    expect(model, nn.Module, "model", call)
    keyword = "Write LoraConfig(**config)" if isinstance(config, Mapping) else "Write LoraConfig(r=16, ...)"
    expect(config, LoraConfig, "config", call, keyword)
    return add(model, name, lambda: _new(model, config, seed), active=active)


def _new(model: nn.Module, config: LoraConfig, seed: int) -> tuple[Selection, Adapter]:
    selection = select(model, config)
    notes = tied.notes(model, selection.saved) + peft_keys.notes(model, [target.path for target in selection.targets])
    selection = replace(selection, notes=selection.notes + notes)
    return selection, build(model, config, selection, seed)


def activate(model: nn.Module, which: str | Sequence[str] | Mapping[str, float] | None) -> None:
    """Chooses the adapters that the model computes with from now on.

    Args:
        which: one name: that adapter, trainable. None: the bare base, to the bit. Several names, or a mapping of
            names to weights: the weighted sum of their updates, for inference only (rank-concatenated copies).
            A module of modules_to_save, or a bias, replaces the one of the base. So it may join a sum at weight 1,
            if no other adapter of the sum changes the same module.

    Tensors of an adapter that comes into use move to the device of their layers.
    Raises: AdapterError: an unknown name; an adapter is merged; two adapters of a sum change the same module of
        modules_to_save or the same bias; such an adapter is weighted; one is not a low-rank sum.
    """
    state = require(model)
    state.require_unmerged("activate")
    weights = _as_weights(which)
    if is_plain(weights):
        for name in weights:
            state.get(name)
    else:
        _check_weighted(state, weights)
    switch(model, state, weights)


def _check_weighted(state: Adapters, weights: Mapping[str, float]) -> None:
    """Raises AdapterError if the weighted sum of these adapters is not defined."""
    for name, weight in weights.items():
        refusal = state.get(name).sum_refusal()
        if refusal is not None:
            raise AdapterError(f'adapter "{name}" {refusal}; it cannot be weighted or summed: activate it alone')
        replaced = _replaced(state, state.get(name))
        if replaced and weight != 1.0:
            raise AdapterError(
                f'adapter "{name}" has modules_to_save or biases ("{replaced[0]}"), which replace those of the base '
                f"and cannot be weighted by {weight:g}: use weight 1"
            )
        for other in weights:
            for path in [] if other == name else _changed(state, state.get(other)):
                clash = next((mine for mine in replaced if path == mine or path.startswith(mine + ".")), None)
                if clash is not None:
                    raise AdapterError(
                        f'adapters "{name}" and "{other}" cannot be active together: "{name}" replaces "{clash}" '
                        f'(modules_to_save or bias), which "{other}" changes too'
                    )


def _replaced(state: Adapters, adapter: Adapter) -> list[str]:
    """Paths of the modules and biases that an adapter replaces."""
    return [path for own in adapter.modules for path in state.paths[own]] + list(adapter.biases)


def _changed(state: Adapters, adapter: Adapter) -> list[str]:
    """Paths of everything that an adapter replaces or adds an update to."""
    return _replaced(state, adapter) + [path for own in adapter.layers for path in state.paths[own]]


def detach(model: nn.Module, name: str | None = None) -> None:
    """Removes the adapter `name`, or all. Removing the last adapter restores the model's original layer instances.

    If the removed adapter was in use, the bare base is active afterwards.
    Raises: AdapterError: an unknown name, or an adapter is merged.
    """
    state = require(model)
    state.require_unmerged("detach")
    if name is not None:
        state.get(name)
    before = {} if name is None or name in state.active else dict(state.active)
    with base_in_use(model, state):
        for gone in [name] if name is not None else list(state.adapters):
            del state.adapters[gone]
            if state.store is not None:
                state.store.release(gone)
        drop_unused(model, state)
    if state.adapters:
        switch(model, state, before)
        return
    for parameter in state.unfrozen:
        parameter.requires_grad_(True)
    uninstall(model)


def merge(model: nn.Module, name: str = "default", *, reversible: bool = True) -> None:
    """Adds the update of adapter `name` to the weights of `model` in place, rounded once to their dtype.

    Its modules_to_save and biases replace those of the base. While merged, the model cannot attach, activate or
    train. `unmerge` restores the exact bits, which no arithmetic on rounded sums can: in bf16 most weights would
    differ. So a reversible merge saves the weights from before in CPU memory, the bytes of the adapted layers. With
    reversible=False nothing is saved: the adapter is gone, and the model is a plain one, as if trained in full.

    Raises: AdapterError: an unknown name; an adapter is merged already; a weight is tied to another module, which
        would change too; the adapter holds non-finite values; a merged weight overflows its
        dtype; an irreversible merge beside other adapters. The model is then unchanged.
    """
    state = require(model)
    state.require_unmerged("merge")
    adapter = state.get(name)
    others = [other for other in state.adapters if other != name]
    if others and not reversible:
        raise AdapterError(f'an irreversible merge would leave "{others[0]}" without its base; detach it first')
    _check_finite(name, adapter)
    _check_mergeable(state, adapter)
    before = dict(state.active)
    with base_in_use(model, state):
        _check_ties(model, state, adapter)
        switch(model, state, {name: 1.0})
        untied = tied.declare_untied(model)
        _fold(name, {path: state.layers[path] for path in adapter.layers}, reversible)
    if not reversible:
        # The base's modules and biases do not come back: the model keeps those of the adapter.
        state.base_modules.clear()
        state.base_biases.clear()
        state.unfrozen.clear()
        detach(model)
        model.requires_grad_(False)
        return
    state.merged, state.active_before_merge, state.untied = name, before, untied


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`: restores the exact weights, and the adapters that were active before.

    Raises: AdapterError: nothing is merged.
    """
    state = require(model)
    if state.merged is None:
        raise AdapterError("no adapter is merged")
    for path in state.get(state.merged).layers:
        state.layers[path].unmerge()
    state.merged = None
    tied.declare_tied(state.untied)
    switch(model, state, state.active_before_merge)


def merged(model: nn.Module) -> str | None:
    """Name of the merged adapter, or None."""
    state = find(model)
    return None if state is None else state.merged


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all adapters of `model`, oldest first."""
    state = find(model)
    return () if state is None else tuple(state.adapters)


def active(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters in use; empty if the model computes with the bare base."""
    state = find(model)
    return () if state is None else tuple(state.active)


def config_of(model: nn.Module, name: str) -> LoraConfig:
    """A copy of the configuration with which adapter `name` was attached or loaded."""
    return copy.deepcopy(require(model).get(name).config)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The Parameters of the one active adapter by name, each once, in a fixed order: for an optimizer.

    Raises: AdapterError: an adapter is merged, not exactly one adapter is active, or a store holds it.
    """
    state = require(model)
    state.require_unmerged("train")
    if not is_plain(state.active) or not state.active:
        raise AdapterError(f"exactly one adapter must be active to train; active now: {state.active or 'none'}")
    name = next(iter(state.active))
    adapter = state.get(name)
    if adapter.stored:
        raise AdapterError(
            f'adapter "{name}" is in a store, rounded for inference; to train it, load it without the store'
        )
    return adapter.parameters()


def add(
    model: nn.Module, name: str, make: Callable[[], tuple[Selection, Adapter]], *, active: bool = True
) -> Attached:
    """Adds the adapter that `make` builds while the bare base is in use; for `attach` and `load_adapter`.

    Args:
        active: the new adapter is in use afterwards; otherwise the ones from before are.
    """
    check_name(name)
    _check_foreign(model)
    state = find(model) or Adapters()
    before = dict(state.active)
    state.require_unmerged("attach")
    if name in state.adapters:
        raise AdapterError(f'an adapter "{name}" is already attached; detach it first or choose another name')
    with base_in_use(model, state):
        selection, adapter = make()
    added = join(model, state, name, selection, adapter)
    switch(model, state, {name: 1.0} if active else before)
    return added


def _check_foreign(model: nn.Module) -> None:
    """Raises AdapterError if PEFT has replaced layers of the model: its adapters and ours cannot be nested."""
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            where = f' (at "{path}")' if path else ""
            raise AdapterError(
                f"this model is wrapped by PEFT: it holds a {type(module).__name__}{where}, and adapters of two "
                "libraries cannot be nested. Save the adapter with PEFT, take the base with model.unload(), and read "
                "the folder with loratune.load_adapter(base, folder)"
            )


def check_name(name: str) -> None:
    """Raises AdapterError for a name that cannot name a folder. ArgumentError: it is no string."""
    expect(name, str, "name", "attach(model, config, name)")
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise AdapterError(f"an adapter cannot be called {name!r}: a name is not empty and holds no / or \\")


@contextmanager
def base_in_use(model: nn.Module, state: Adapters) -> Iterator[None]:
    """Context in which the bare base is in use. If the block raises, the previous adapters are in use again."""
    before = dict(state.active)
    finished = False
    switch(model, state, {})
    try:
        yield
        finished = True
    finally:
        if not finished:
            switch(model, state, before)


def join(model: nn.Module, state: Adapters, name: str, selection: Selection, adapter: Adapter) -> Attached:
    """Gives the model a new adapter, not yet in use. The only part of attaching that changes the model.

    Nothing in it can fail because of the user's input, and the model computes the same as before.
    """
    total = count_parameters(model) + sum(p.numel() for p in adapter.parameters().values())
    fresh = [target for target in selection.targets if target.path not in state.layers]
    # The layer that is in the model now: since it was selected, other adapters may have come or gone.
    bases = {target.path: model.get_submodule(target.path) for target in fresh}
    layers = {target.path: target.kind.from_base(bases[target.path]) for target in fresh}
    if not state.adapters:
        state.unfrozen = [p for p in model.parameters() if p.requires_grad]
    if not state.active:
        model.requires_grad_(False)
    for target in fresh:
        state.paths[target.path] = target.paths
        state.layers[target.path] = layers[target.path]
        layers[target.path].salt = layer_salt(target.path)
        set_module(model, target.paths, layers[target.path])
    for path, weights in adapter.layers.items():
        state.layers[path].expect(weights.tensors)
    for saved in selection.saved:
        state.paths[saved.paths[0]] = saved.paths
    state.adapters[name] = adapter
    state.switches.clear()
    install(model, state)
    return Attached(
        name=name,
        ranks={path: weights.r for path, weights in adapter.layers.items()},
        modules_to_save=tuple(adapter.modules),
        biases=tuple(adapter.biases),
        trainable_parameters=sum(p.numel() for p in adapter.parameters().values()),
        total_parameters=total,
        left_out=selection.left_out,
        notes=selection.notes,
    )


def drop_unused(model: nn.Module, state: Adapters) -> None:
    """Restores the base layers that no remaining adapter adapts."""
    still_used = {path for adapter in state.adapters.values() for path in adapter.layers}
    for path in [path for path in state.layers if path not in still_used]:
        set_module(model, state.paths[path], state.layers.pop(path).to_base())
    state.switches.clear()


def _as_weights(which: str | Sequence[str] | Mapping[str, float] | None) -> dict[str, float]:
    if which is None:
        return {}
    if isinstance(which, str):
        return {which: 1.0}
    if isinstance(which, Mapping):
        return {name: float(weight) for name, weight in which.items()}
    if len(set(which)) < len(which):
        raise AdapterError(f"an adapter is named twice in {list(which)}; give weights as a mapping instead")
    return dict.fromkeys(which, 1.0)


def _fold(name: str, layers: Mapping[str, LoraLayer], reversible: bool) -> None:
    """Merges every layer. If memory runs out half-way, or a sum overflows, the merged layers are unmerged again.

    An irreversible merge tries every sum first.
    """
    if not reversible:
        for path, layer in layers.items():
            if not layer.sum_is_bounded():
                _check_sum(name, path, layer.merged_weight())
    folded: list[LoraLayer] = []
    finished = False
    try:
        for path, layer in layers.items():
            total = layer.merge(reversible=reversible)
            folded.append(layer)
            if reversible:
                _check_sum(name, path, total)
        finished = True
    finally:
        if reversible and not finished:
            for layer in folded:
                layer.unmerge()


def _check_sum(name: str, path: str, total: Tensor) -> None:
    """Raises AdapterError if a merged weight holds NaN or infinity."""
    if fault := fault_of(total):
        why = f" ({overflow(total.dtype)})" if fault == "infinity" else ""
        raise AdapterError(
            f'adapter "{name}" cannot be merged: the sum of {path}.weight and its update holds {fault}{why}. '
            "Use the adapter unmerged, or load the base in bfloat16 or float32"
        )


def _check_ties(model: nn.Module, state: Adapters, adapter: Adapter) -> None:
    layers = {path: state.layers[path] for path in adapter.layers if state.layers[path].weight_is_parameter}
    holders = ties(model, [layer.own_weight for layer in layers.values()])
    for path, layer in layers.items():
        others = [at for at in holders[identity(layer.own_weight)] if at.rpartition(".")[0] not in state.paths[path]]
        if others:
            raise AdapterError(
                f'cannot merge into "{path}.{layer.weight_name}": it is tied to "{others[0]}", which would change '
                "too. Keep the adapter unmerged, or untie the weights first"
            )


def _check_mergeable(state: Adapters, adapter: Adapter) -> None:
    for path in adapter.layers:
        layer = state.layers[path]
        refusal = layer.merge_refusal(layer)
        if refusal is not None:
            raise AdapterError(f'cannot merge into "{path}": {refusal}. Keep the adapter unmerged')


def _check_finite(name: str, adapter: Adapter) -> None:
    for path, weights in adapter.layers.items():
        if any(fault_of(tensor) for tensor in weights.tensors.values()):
            raise AdapterError(f'adapter "{name}" holds non-finite values at "{path}"; it is not merged')
    in_full = dict(adapter.biases)
    for path, module in adapter.modules.items():
        in_full |= {f"{path}.{key}": parameter for key, parameter in module.named_parameters()}
    for path, parameter in in_full.items():
        if fault := fault_of(parameter):
            raise AdapterError(f'adapter "{name}" holds {fault} at "{path}", trained in full; it is not merged')
