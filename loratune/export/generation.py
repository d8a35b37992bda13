"""The stop tokens in a written checkpoint, so that every program stops where the model learned to stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loratune.base import generation


@contextmanager
def generation_set_aside(model: PreTrainedModel) -> Iterator[None]:
    """Context in which `save_pretrained` writes default generation settings; `record_generation` writes the model's.

    transformers refuses to save settings that it reads, such as a temperature without `do_sample`.
    """
    own: GenerationConfig | None = model.generation_config  # None: a model without `generate`
    if own is None:
        yield
        return
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def record_generation(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes the model's generation settings with all stop tokens.

    The model's own tokens come first, then those of the tokenizer, if given, and of its chat template.
    """
    file = folder / generation.FILE
    settings = json.loads(model.generation_config.to_json_string()) if file.exists() else {}
    if tokenizer is not None:
        own = generation.listed(settings.get("eos_token_id"))
        stops = own + sorted(generation.stop_ids(model.generation_config, tokenizer) - set(own))
        if stops:
            settings["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    elif not file.exists():
        return
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
