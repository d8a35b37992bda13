"""FlashAttention 4 without a GPU: it is found, and a broken installation is reported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from loratune.ops.attention import documents as attention
from loratune.ops.attention import flash

ASK = """
import os
from loratune.ops.attention import flash
before = dict(os.environ)
package, why = flash._package()
print(None if package is None else package.flash_attn_func(), why)
print(os.environ == before)
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
def test_the_package_is_found_or_the_reason_is_reported(tmp_path, monkeypatch, source, said):
    found, unchanged = asked(tmp_path, monkeypatch, source).splitlines()
    assert said in found
    assert unchanged == "True", "only a command line may change the environment"


def test_another_package_of_the_same_name_is_not_used(tmp_path, monkeypatch):
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
        (wrong, "with 4 and 2 heads of 16, its results differ from those of PyTorch's kernel by 1"),
        (broken, "AssertionError('Unsupported compute capability')"),
    ],
)
def test_it_is_compared_with_pytorchs_kernel_before_it_is_used(monkeypatch, kernel, said):
    monkeypatch.setattr(flash, "attend", kernel)
    monkeypatch.setattr(flash, "fits", lambda device, dim: True)
    monkeypatch.setattr(flash, "_is_hopper", lambda device: True)
    query, key = (torch.zeros(1, heads, 5, 16, dtype=torch.bfloat16) for heads in (4, 2))
    trials, others = flash.FlashTrials(), flash.FlashTrials()
    with torch.inference_mode():
        assert [trials.usable(query, key, attention_of) for _ in range(2)] == [said is None] * 2
    notes = trials.why_not(query.device)
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]
    assert not others.why_not(query.device), "the trials of another forward"


class Package:
    """The two functions of the package that we call, in plain PyTorch."""

    def __init__(self):
        self.asked = []

    def flash_attn_func(self, q, k, v, *, softmax_scale, causal, window_size, deterministic):
        assert causal
        self.asked.append("even")
        of_each = [self._document(*row, softmax_scale, window_size) for row in zip(q, k, v, strict=True)]
        return torch.stack(of_each), None

    def flash_attn_varlen_func(
        self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
        deterministic,
    ):  # fmt: skip
        assert causal
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        self.asked.append("uneven")
        parts = (t.split(cu_seqlens_q.diff().tolist()) for t in (q, k, v))
        return torch.cat(
            [self._document(*part, softmax_scale, window_size) for part in zip(*parts, strict=True)]
        ), None

    def _document(self, q, k, v, scale, window):
        """(n, heads, dim) each; a window is the number of visible tokens on the left and the right."""
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        left = None if window == (None, None) else window[0] + 1
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        return attention.explicit(q, k, v, scale, 0.0, left, None, None)[0].transpose(0, 1)


@pytest.mark.parametrize(("lengths", "path"), [([7, 7, 7], "even"), ([5, 1, 15], "uneven"), ([21], "even")])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_its_arguments_give_the_right_attention(monkeypatch, lengths, path, window):
    package = Package()
    monkeypatch.setattr(flash, "_package", lambda: (package, None))
    query, key, value = (torch.randn(1, heads, 21, 16) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    got = flash.attend(query, key, value, 0.3, window, cu_seqlens, max(lengths))
    torch.testing.assert_close(got, attention_of(query, key, value, 0.3, window, cu_seqlens, max(lengths)))
    assert package.asked == [path]
