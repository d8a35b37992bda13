"""To be imported before any kernel is defined, in a process with TRITON_INTERPRET=1.

Triton 3.6's interpreter and NumPy 2.4 disagree about int() of one element, which is what a loop is bounded by.
"""

from __future__ import annotations

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_bounds(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_bounds
