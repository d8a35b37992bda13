"""Draws docs/demo.svg from a real run of the demo: python docs/make_pictures.py"""

import io
from pathlib import Path

from rich.console import Console

from loratune.demo import demo

console = Console(record=True, width=94, file=io.StringIO(), color_system="truecolor", highlight=False)
demo(None, console)
console.save_svg(str(Path(__file__).parent / "demo.svg"), title="loratune demo")
