"""Draws docs/demo.svg from a real run of the demo: python docs/make_pictures.py"""

import io
import re
from pathlib import Path

from rich.console import Console

from loratune.demo import demo

console = Console(record=True, width=94, file=io.StringIO(), color_system="truecolor", highlight=False)
demo(None, console)
picture = console.export_svg(title="loratune demo")
picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # the reader's own monospace font will do
(Path(__file__).parent / "demo.svg").write_text(picture)
