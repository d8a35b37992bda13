"""Alpaca's instructions: {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [...]}.

They become a conversation: instruction and input are the question, output is the answer, and history holds earlier
pairs [instruction, output].
"""

from __future__ import annotations

from loratune.data.messages import check_messages
from loratune.data.record import Message, RawRecord, Record, RecordFormat, optional_text, required_text
from loratune.errors import DataError


def _convert(raw: RawRecord) -> Record:
    instruction, output = required_text(raw, "instruction"), required_text(raw, "output")
    question = "\n\n".join(part for part in (instruction, optional_text(raw, "input")) if part)
    messages: list[Message] = []
    system = optional_text(raw, "system")
    if system:
        messages.append({"role": "system", "content": system})
    history = raw.fields.get("history", [])
    if not isinstance(history, list):
        raise DataError(f'{raw.source}: "history" must be a list of pairs, not {type(history).__name__}')
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f'{raw.source}: "history" entry {number} must be a list [instruction, output]')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    if not output.strip():
        raise DataError(f'{raw.source}: "output" is empty, so there is nothing to train on')
    return Record(raw.source, check_messages(raw.source, messages))


FORMAT = RecordFormat(
    needs='"instruction" and "output"',
    uses=frozenset({"instruction", "input", "output", "system", "history"}),
    recognise=lambda fields: "instruction" in fields,
    convert=_convert,
)
