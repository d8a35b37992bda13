"""Records the launches of a process with TRITON_INTERPRET=1. It is imported before any kernel (`tests.ops.twins`).

Writes each launch and its arguments to the file named by `LAUNCHES`. It also repairs one fault: Triton 3.6's
interpreter and NumPy 2.4 disagree about int() of a one-element array, which bounds the loops of kernels.
"""

from __future__ import annotations

import atexit
import os
import pickle
from pathlib import Path

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor
_run = interpreter.InterpretedFunction.run
_launches = {}


def _patch_with_bounds(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _run_and_note(self, *args, **kwargs):
    said = [(a.dtype, a.data_ptr() % 16) if hasattr(a, "data_ptr") else a for a in args]
    options = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
    launch = (self.fn.__module__, self.fn.__name__, said, options)
    _launches[repr(launch)] = launch
    return _run(self, *args, **kwargs)


@atexit.register
def _leave_launches():
    Path(os.environ["LAUNCHES"]).write_bytes(pickle.dumps(list(_launches.values())))


interpreter._patch_lang_tensor = _patch_with_bounds
interpreter.InterpretedFunction.run = _run_and_note
