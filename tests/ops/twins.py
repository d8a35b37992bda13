"""Runs programs that compare kernels with their references in Triton's interpreter, then compiles their launches.

The interpreter accepts code that Triton's compiler rejects. So each launch is recorded, and compiled for an H100 with
the same types, sizes and constants, except that float16 becomes bfloat16: the interpreter has no products in
bfloat16. Neither step needs a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest

H100 = 90
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform"
)


def compare(program):
    """Runs a program of assertions in the interpreter, then compiles all its launches."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "launches")
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "LAUNCHES": str(file)}
        whole = "import tests.ops.interpreted\n" + program
        done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        launches = pickle.loads(file.read_bytes())
        assert launches, "no kernel was launched"
        from triton.runtime import driver

        with patch.object(driver, "_active", _NoDriver()), patch.dict(os.environ, TRITON_CACHE_DIR=folder):
            for launch in launches:
                compile_launch(*launch)


def compile_launch(module, name, arguments, options):
    """Compiles one launch. An argument is (dtype, alignment) of a tensor, or a number."""
    kernel = getattr(importlib.import_module(module), name)
    described = [_Tensor(*a) if isinstance(a, tuple) else a for a in arguments]
    kernel.warmup(*described, grid=(1,), **options)


class _Tensor:
    def __init__(self, dtype, alignment):
        import torch

        self.dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        self._alignment = alignment

    def data_ptr(self):
        return self._alignment

    def ptr_range(self):
        return 0


class _NoDriver:
    """The part of a driver that compilation needs."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", H100, 32)
