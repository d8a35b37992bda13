"""Variants of LoRA, and the fields of PEFT's configuration that choose them.

A variant is a subclass of `lora.layer.LoraVariant` in a file of its own, and one entry here. If its field is not one
of `LoraConfig`, its `settings` names a subclass of `LoraConfig` that has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Final

from loratune.config import LoraConfig
from loratune.errors import ConfigError
from loratune.lora.layer import PLAIN, LoraVariant

VARIANTS: Final[dict[tuple[str, object], LoraVariant]] = {}
"""(field of the configuration, value) -> variant, for example ("use_dora", True) -> DoRA."""


def variant_of(config: LoraConfig) -> LoraVariant:
    """The variant that `config` chooses; plain LoRA by default.

    Raises: ConfigError: two variants are chosen at once.
    """
    chosen = {name: v for (name, value), v in VARIANTS.items() if getattr(config, name, None) == value}
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} choose two variants of LoRA; set one of them")
    return next(iter(chosen.values()), PLAIN)


def settings_of(values: Mapping[str, object]) -> type[LoraConfig]:
    """The configuration class for field values from a file: the class that has the fields which are set."""
    return next((v.settings for v in VARIANTS.values() if any(map(values.get, own_fields(v)))), LoraConfig)


def own_fields(variant: LoraVariant) -> set[str]:
    """Fields of a variant's `settings` that `LoraConfig` lacks."""
    return {f.name for f in fields(variant.settings)} - {f.name for f in fields(LoraConfig)}
