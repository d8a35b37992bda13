"""What happens around FlashAttention 4 where there is no GPU: that it is found, and that a broken one is told of."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from loratune.ops import attention, flash

ASK = """
import os
from loratune.ops import flash
package, why = flash._found()
print(None if package is None else package.flash_attn_func(), why)
print(os.environ.get("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"))
"""


def asked(folder, monkeypatch, source):
    if source is not None:
        (folder / "flash_attn" / "cute").mkdir(parents=True)
        (folder / "flash_attn" / "cute" / "__init__.py").write_text(source)
        (folder / "flash_attn_4-4.0.0b36.dist-info").mkdir()
        (folder / "flash_attn_4-4.0.0b36.dist-info" / "METADATA").write_text(
            "Name: flash-attn-4\nVersion: 4.0.0b36\n"
        )
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
    found, cache = asked(tmp_path, monkeypatch, source).splitlines()
    assert said in found
    assert cache == ("None" if source is None else "/somewhere/loratune/flash_attention")


def test_another_package_of_the_name_is_not_taken_for_it(tmp_path, monkeypatch):
    """flash-attn 2 has a folder of this name in some versions."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("import no_such_library")
    assert asked(tmp_path, monkeypatch, None).splitlines()[0] == "None None"


def attention_of(query, key, value, scaling, window, cu_seqlens, longest):
    out, _ = attention.document_attention(
        None, query, key, value, None, scaling=scaling, sliding_window=window, cu_seq_lens_q=cu_seqlens
    )
    return out


def wrong(query, *rest):
    return attention_of(query.detach() + 0 * query, *rest)


def broken(*_):
    raise AssertionError("Unsupported compute capability")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (attention_of, None),
        (wrong, "with 4 and 2 heads of 16 it is 1 from what PyTorch's kernel gives"),
        (broken, "AssertionError('Unsupported compute capability')"),
    ],
)
def test_it_is_tried_against_pytorch_s_kernel_before_it_is_used(monkeypatch, kernel, said):
    monkeypatch.setattr(attention, "_flash4", kernel)
    monkeypatch.setattr(attention, "_pytorch", attention_of)
    monkeypatch.setattr(flash, "_REFUSED", [])
    monkeypatch.setattr(flash, "_fits", lambda device: True)
    with torch.inference_mode():
        assert attention._agrees.__wrapped__(torch.device("cpu"), torch.bfloat16, 4, 2, 16) == (said is None)
    notes = flash.why_not(torch.device("cpu"))
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]
