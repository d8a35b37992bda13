"""A quick end-to-end check on a GPU: trains both demo tasks with defaults, evaluates, merges, resumes.

    python -m benchmarks.gpu_check OUT_FOLDER

Needs only torch, transformers, safetensors and numpy, so it runs on a bare GPU image.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import loratune as lt
from loratune.base.load import POCKET, stop_ids
from loratune.box import TASKS, data_file
from loratune.data.records import read_records
from loratune.runs.evaluation import answers
from loratune.runs.run import Note, RunResult, run
from loratune.training.course import StepDone


def main() -> None:
    out = Path(sys.argv[1])
    figures: dict[str, object] = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    for task in TASKS:
        config = lt.RunConfig(
            model=POCKET,
            data=[str(data_file(task, "train"))],
            out=str(out / task),
            overwrite=True,
            dataset=lt.DataConfig(tokens_per_row=512, eval_data=[str(data_file(task, "heldout"))]),
            training=lt.TrainConfig(learning_rate=2e-3, max_steps=120, eval_every_steps=30, warmup_ratio=0.1),
        )
        started, losses, notes = time.perf_counter(), [], []
        for event in run(config):
            if isinstance(event, StepDone):
                losses.append(event.loss)
            elif isinstance(event, Note):
                notes.append(event.text)
            elif isinstance(event, RunResult):
                result = event
        seconds = time.perf_counter() - started
        model, tokenizer = lt.load(POCKET), lt.load_tokenizer(POCKET)
        lt.load_adapter(model, out / task, name=task)
        exact = answers(model, tokenizer, read_records([str(data_file(task, "heldout"))]), stop_ids(model, tokenizer))
        figures[task] = {
            "exact_match": exact.share,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(result.tokens_per_second),
            "first_loss": losses[0],
            "held_out_loss": result.progress.best_eval_loss,
            "skipped": result.progress.skipped_steps,
            "notes": notes,
        }
        print(task, json.dumps(figures[task]), flush=True)
    (out / "gpu-check.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
