"""What happens around FlashAttention 4 where there is no GPU: that it is found, and that a broken one is told of."""

from __future__ import annotations

import subprocess
import sys

import pytest

ASK = """
import os
from loratune.ops import flash
package, why = flash._found()
print(None if package is None else package.flash_attn_func(), why, os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
"""


def asked(folder, monkeypatch, source):
    if source is not None:
        (folder / "flash_attn" / "cute").mkdir(parents=True)
        (folder / "flash_attn" / "cute" / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "None None"),
        ("def flash_attn_func(): return 'attends'", "attends None"),
        (
            "import no_such_library",
            "None flash-attn-4 is installed but cannot be imported, so slower attention runs: "
            "ModuleNotFoundError(\"No module named 'no_such_library'\")",
        ),
        ("raise OSError('libcute.so: cannot open')", "OSError('libcute.so: cannot open')"),
    ],
)
def test_a_package_is_found_or_said_to_be_of_no_use(tmp_path, monkeypatch, source, said):
    found = asked(tmp_path, monkeypatch, source)
    assert said in found
    assert found.endswith(" /somewhere/loratune/flash_attention")
