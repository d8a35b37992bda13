"""What ships inside the package: a small pretrained chat model and two little data sets to try LoRA on.

`tools/pocket/` in the repository made both; its README says how, and what the model can and cannot do.
"""

from pathlib import Path

BOX_DIR = Path(__file__).parent
MODEL_DIR = BOX_DIR / "model"
DATA_DIR = BOX_DIR / "data"
TASKS = ("dates", "orders")


def data_file(task: str, part: str) -> Path:
    """The bundled JSONL file of a task ("dates" or "orders") and part ("train" or "heldout")."""
    return DATA_DIR / f"{task}.{part}.jsonl"
