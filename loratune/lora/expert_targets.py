"""The expert weights that `target_parameters` selects in a model.

Matching is PEFT's: an entry is a Parameter's whole path or its end after a dot. "all-experts" stands for every
expert weight that can be adapted; the others are reported. An entry that matches nothing, or a Parameter that is no
expert weight (a router, a bias, the weight of a layer), is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from loratune.config import LoraConfig
from loratune.errors import AdapterError, ConfigError, nearest
from loratune.lora.experts import ExpertPairs, kind_of_experts, parameter_of, why_not
from loratune.lora.layer import LoraVariant
from loratune.lora.paths import ModulePaths, named
from loratune.lora.target import Target
from loratune.precision import experts
from loratune.precision.experts import ExpertForm

ALL_EXPERTS = "all-experts"


@dataclass(frozen=True)
class ExpertChoice:
    """The result of `choose`."""

    targets: tuple[Target, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def choose(
    modules: Sequence[ModulePaths],
    config: LoraConfig,
    variant: LoraVariant,
    *,
    strict: bool,
) -> ExpertChoice:
    """The experts that `config` selects.

    Args:
        modules: modules of the model, without those that other settings exclude or train in full.
        variant: the variant that the configuration chooses for layers.
        strict: as for `select`.
    Raises: AdapterError: an entry matches nothing, or a Parameter that cannot be adapted. ConfigError: experts do not
        go with another setting.
    """
    found = [(entry.module, entry.paths) for entry in modules]
    wanted = config.target_parameters
    if not wanted:
        return ExpertChoice(notes=_not_adapted(found, config))
    if isinstance(wanted, str) and wanted != ALL_EXPERTS:
        raise ConfigError(f'target_parameters is "{wanted}"; give a list of names, or "{ALL_EXPERTS}"')
    if strict:
        _check_settings(config, variant)
    if isinstance(wanted, list):
        _check_entries(found, wanted, strict=strict)
    targets: list[Target] = []
    left_out: list[str] = []
    for module, paths in found:
        form = experts.form_of(module)
        names = _selected(module, paths, form, wanted)
        if not names:
            continue
        reason = form if isinstance(form, str) else why_not(module)
        if isinstance(form, str) or reason is not None:
            if wanted != ALL_EXPERTS:
                raise AdapterError(f'target_parameters: "{paths[0]}.{names[0]}" cannot be adapted: {reason}')
            left_out.append(f'"{paths[0]}" cannot be adapted: {reason}')
            continue
        parameters = [parameter_of(module, form, name, paths[0], config) for name in names]
        pairs, last = ExpertPairs(parameters), parameters[-1]
        targets.append(Target(paths[0], paths, module, kind_of_experts(module), pairs, last.r, last.scaling))
    if wanted == ALL_EXPERTS and not targets:
        why = f": {left_out[0]}" if left_out else ""
        raise AdapterError(f'target_parameters "{ALL_EXPERTS}": the model has no experts that can be adapted{why}')
    return ExpertChoice(tuple(targets), tuple(left_out), _adapted(targets))


def routers(modules: Sequence[ModulePaths]) -> set[str]:
    """Paths of linear layers that choose experts: beside an experts module, with one output for each expert."""
    counts = {
        path.rpartition(".")[0]: form.experts
        for entry in modules
        if isinstance(form := experts.form_of(entry.module), ExpertForm)
        for path in entry.paths
    }
    found = set()
    for entry in modules:
        outputs = getattr(entry.module, "out_features", None)
        beside = [n for parent, n in counts.items() for path in entry.paths if path.startswith(f"{parent}.")]
        if outputs is not None and outputs in beside:
            found.add(entry.paths[0])
    return found


def routers_line(found: Iterable[str]) -> list[str]:
    """One line for all routers."""
    paths = sorted(found)
    if not paths:
        return []
    return [f'{len(paths)} routers of experts, the first "{paths[0]}"; name them in target_modules to adapt them']


def _check_settings(config: LoraConfig, variant: LoraVariant) -> None:
    if config.lora_dropout:
        raise ConfigError(
            f"lora_dropout is {config.lora_dropout:g}, and adapters of experts (target_parameters) have no dropout, "
            "as in PEFT; set it to 0"
        )
    if config.layers_to_transform is not None:
        raise ConfigError(
            "layers_to_transform does not go with target_parameters, where PEFT ignores it; put the layer numbers "
            'into the entries, such as "layers.0.mlp.experts.down_proj"'
        )
    if not variant.low_rank_sum:
        raise ConfigError(f"{type(variant).__name__} is for layers; experts (target_parameters) have plain LoRA only")


def _selected(module: nn.Module, paths: Sequence[str], form: ExpertForm | str, wanted: str | list[str]) -> list[str]:
    """Names of the selected Parameters of a module, in its order."""
    if isinstance(wanted, str):
        if isinstance(form, str):
            return ["experts"] if _is_stack(module) else []
        return experts.parameter_names(module, form)
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if isinstance(form, ExpertForm):
        own = experts.parameter_names(module, form)
    return [name for name in own if any(named(entry, f"{path}.{name}") for entry in wanted for path in paths)]


def _is_stack(module: nn.Module) -> bool:
    """True for a module that holds matrices of several experts: Parameters of three dimensions and a count."""
    count = getattr(module, "num_experts", None)
    return any(p.dim() == 3 and p.shape[0] == count for p in module.parameters(recurse=False))


def _check_entries(
    found: Sequence[tuple[nn.Module, tuple[str, ...]]], wanted: Sequence[str], *, strict: bool
) -> None:
    """Raises AdapterError for an entry that matches nothing, or a Parameter that is no expert weight."""
    expert_paths, others = [], []
    for module, paths in found:
        form = experts.form_of(module)
        names = [] if isinstance(form, str) else experts.parameter_names(module, form)
        expert_paths += [f"{path}.{name}" for path in paths for name in names]
        own = [name for name, p in module.named_parameters(recurse=False) if name not in names]
        others += (
            [] if _is_stack(module) and isinstance(form, str) else [f"{path}.{n}" for path in paths for n in own]
        )
    for entry in wanted:
        other = next((path for path in others if named(entry, path)), None)
        if other is not None:
            owner, _, name = other.rpartition(".")
            hint = f'name the layer in target_modules: "{owner}"' if name == "weight" else "leave it out"
            raise AdapterError(f'target_parameters "{entry}" names {other}, which is no expert weight; {hint}')
        if strict and not any(named(entry, path) for path in expert_paths) and not _stacked(found, entry):
            ends = sorted({".".join(path.rsplit(".", 2)[-2:]) for path in expert_paths})
            here = f" Expert weights here: {', '.join(ends)}." if ends else " The model has no expert weights."
            raise AdapterError(f'target_parameters "{entry}" matches no Parameter.{nearest(entry, ends) or here}')


def _stacked(found: Sequence[tuple[nn.Module, tuple[str, ...]]], entry: str) -> bool:
    """True if the entry names a Parameter of experts without a supported form, whose fault `choose` names."""
    return any(
        named(entry, f"{path}.{name}")
        for module, paths in found
        if _is_stack(module)
        for name, _ in module.named_parameters(recurse=False)
        for path in paths
    )


def _not_adapted(found: Sequence[tuple[nn.Module, tuple[str, ...]]], config: LoraConfig) -> tuple[str, ...]:
    """One line if "all-linear" leaves experts without adapters."""
    if config.target_modules != "all-linear":
        return ()
    stacks = [(module, paths) for module, paths in found if _is_stack(module) or _has_form(module)]
    if not stacks:
        return ()
    forms = [
        (module, paths, form) for module, paths in stacks if isinstance(form := experts.form_of(module), ExpertForm)
    ]
    if not forms:
        return (
            f'experts in {len(stacks)} modules stay frozen ("{stacks[0][1][0]}"): {experts.form_of(stacks[0][0])}',
        )
    values = sum(
        parameter_of(module, form, name, paths[0], config).parameters
        for module, paths, form in forms
        for name in form.names
    )
    names = ", ".join(
        dict.fromkeys(name for module, _, form in forms for name in experts.parameter_names(module, form))
    )
    return (
        f'experts in {len(forms)} modules ({names}) stay frozen; target_parameters = "{ALL_EXPERTS}" gives each '
        f"expert a pair of its own, {values:,} more values to train",
    )


def _has_form(module: nn.Module) -> bool:
    return isinstance(experts.form_of(module), ExpertForm)


def _adapted(targets: Sequence[Target]) -> tuple[str, ...]:
    """One line about the adapted experts."""
    if not targets:
        return ()
    variants = [target.variant for target in targets]
    parameters = [p for variant in variants if isinstance(variant, ExpertPairs) for p in variant.parameters]
    names = ", ".join(dict.fromkeys(parameter.name for parameter in parameters))
    ranks = ", ".join(str(r) for r in sorted({parameter.r for parameter in parameters}))
    counts = ", ".join(str(n) for n in sorted({parameter.experts for parameter in parameters}))
    return (
        f"experts in {len(targets)} modules ({names}) have a pair of rank {ranks} for each of {counts} experts: "
        f"{sum(parameter.parameters for parameter in parameters):,} values",
    )


def parameter_paths(layers: Iterable[tuple[str, LoraVariant]]) -> list[str]:
    """Paths of the expert Parameters that an adapter's layers, given by path and variant, adapt."""
    return [
        name for path, variant in layers if isinstance(variant, ExpertPairs) for name in variant.pattern_paths(path)
    ]
