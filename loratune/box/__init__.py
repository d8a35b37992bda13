"""The bundled files: a small pretrained chat model and two small data sets to try LoRA with.

`tools/pocket/` in the repository made both. Its README describes how, and the model's abilities and limits.
"""

from pathlib import Path

BOX_DIR = Path(__file__).parent
MODEL_DIR = BOX_DIR / "model"
DATA_DIR = BOX_DIR / "data"
TASKS = ("dates", "orders")


def data_file(task: str, part: str) -> Path:
    """The bundled JSONL file of a task ("dates" or "orders") and part ("train" or "heldout")."""
    return DATA_DIR / f"{task}.{part}.jsonl"
