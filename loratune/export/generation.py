"""The stop tokens in a written checkpoint, so that every program stops where the model learned to stop."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune.base import generation


def record_stops(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Puts all stop tokens into generation_config.json, beside the settings that transformers wrote there.

    The model's own come first, then those of the tokenizer and of its chat template.
    """
    file = folder / generation.FILE
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    own = generation.listed(settings.get("eos_token_id"))
    stops = own + sorted(generation.stop_ids(model.generation_config, tokenizer) - set(own))
    if stops:
        settings["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
