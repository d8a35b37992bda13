"""The table of precisions: names of `--precision`, and the code behind each name.

Settings and the command line need the names before PyTorch is loaded, so this module imports nothing.
`precision.contract` imports an entry when it is first used.
"""

from __future__ import annotations

QUANTISED = {
    "nf4": "loratune.precision.nf4_format:Nf4Format",
    "fp8": "loratune.precision.fp8_format:Fp8Format",
}
"""Name -> "module:class" of a `precision.contract.WeightFormat`."""

DENSE = "loratune.precision.dense:DenseFormat"
"""The format of Parameters in floating point."""

DENSE_NAMES = ("auto", "float32", "bfloat16", "float16")
"""Choices that quantise nothing. "auto" is the dtype of the files on a GPU and float32 on a CPU."""

NAMES = (*DENSE_NAMES, *QUANTISED)
"""Choices of `--precision`."""
