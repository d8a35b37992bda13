"""Variants of LoRA: finds the variant that a configuration chooses in the table `loratune.tables.VARIANTS`.

A variant is a subclass of `lora.layer.LoraVariant` in a file of its own, and one line in the table. If the field that
chooses it is not one of `LoraConfig`, its `settings` names a subclass of `LoraConfig` that has the field.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratune import tables
from loratune.config import LoraConfig
from loratune.errors import ConfigError
from loratune.lora.layer import PLAIN, LoraVariant


def variant_of(config: LoraConfig) -> LoraVariant:
    """The variant that `config` chooses; plain LoRA by default.

    Raises: ConfigError: two variants are chosen at once.
    """
    return _variant(vars(config))


def settings_of(values: Mapping[str, object]) -> type[LoraConfig]:
    """The configuration class of the variant that field values from a file choose. Raises ConfigError."""
    return _variant(values).settings


def values_of(field: str) -> set[str]:
    """Values of `field` that choose a variant."""
    choices = (choice.partition("=") for choice in tables.VARIANTS)
    return {value for name, _, value in choices if name == field}


def _variant(values: Mapping[str, object]) -> LoraVariant:
    chosen = tables.chosen_variants(values)
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} choose two variants of LoRA; set one of them")
    variant = tables.load_entry(tables.VARIANTS[chosen[0]]) if chosen else PLAIN
    assert isinstance(variant, LoraVariant)
    return variant
