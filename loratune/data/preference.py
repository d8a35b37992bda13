"""Recognises preference data, which no objective supports, so that rejected answers are not trained as good ones.

Fields as in TRL (chosen, rejected; prompt, completion, label), OpenAI (preferred_output, non_preferred_output) and
LLaMA-Factory (chosen, rejected; kto_tag).
"""

from __future__ import annotations

from loratune.data.record import RawRecord
from loratune.errors import DataError

_PAIRS = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
)
_LABELS = ("label", "kto_tag")


def refuse_preference(raw: RawRecord) -> None:
    """Raises DataError if a record compares answers or marks one as good or bad."""
    for good, bad in _PAIRS:
        if good in raw.fields and bad in raw.fields:
            raise DataError(
                f'{raw.source}: "{good}" and "{bad}" are preference data (DPO, ORPO), but only supervised '
                f'fine-tuning is available. To train the answers in "{good}", write them as "messages", or as '
                '"prompt" and "completion"'
            )
    for name in _LABELS:
        if isinstance(raw.fields.get(name), bool):
            raise DataError(
                f'{raw.source}: "{name}" is true or false, which marks good and bad answers (KTO), but only '
                f'supervised fine-tuning is available. Keep the records to train, without "{name}"'
            )
