"""Kernels compile, on a machine without a GPU, as they are meant to: the interpreter forgives what Triton rejects."""

from __future__ import annotations

import importlib.util

import pytest

CONSTANTS = {
    "_narrow": {
        "TERMS_EACH": 256,
        "PIECES": 2,
        "TAIL": 1,
        "KEEP": 1,
        "COPY": 1,
        "SPARE": 64,
        "ROWS": 64,
        "TERMS": 128,
    },
    "_gradients": {"ROWS_EACH": 128, "PIECES": 2, "COLUMNS": 64, "ROWS": 64, "ALIGNED": 1},
    "_widen": {"MEMBERS": 3, "MOST": 64, "ROWS": 32, "COLUMNS": 128},
}
KINDS = {"partial_ptr": "*fp32", "counter_ptr": "*i32", "table_ptr": "*i64", "scale_ptr": "*fp32"}
KINDS |= {"row_ptr": "*i32", "parts_ptr": "*i32", "scale": "fp32"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform")
@pytest.mark.parametrize(
    ("name", "drop"), [("_narrow", 0), ("_narrow", 1), ("_gradients", 0), ("_gradients", 1), ("_widen", 1)]
)
def test_a_kernel_compiles_and_reads_whole_vectors(name, drop):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from loratune.ops import thin_kernels
    from loratune.ops.dropout import GOLDEN, LEVELS

    kernel, constants = getattr(thin_kernels, name), CONSTANTS[name] | {"RANKS": 16, "DROP": drop}
    constants |= {"GOLDEN": GOLDEN, "LEVELS": LEVELS, "thin_term" if drop else "thin_rank": 1}  # Aᵀ, or B
    signature, hints = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = KINDS.get(argument, "*bf16" if argument.endswith("_ptr") else "i32")
        if argument == "scale":
            continue
        hints[index,] = [["tt.divisibility", 16]]  # what a launch finds for widths that are multiples of 16
    if name == "_gradients":
        signature["out_ptr"] = "*fp32"
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, values, hints),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "num_stages": 3},
    )
    assert "cp.async.cg" in compiled.asm["ptx"], "the loads of the loop are not 16 bytes each, started in advance"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform")
@pytest.mark.parametrize("name", ["_square_sums", "_settle", "_update"])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_kernels_of_adamw_compile_and_read_four_numbers_at_once(name, aligned):
    """Addresses come out of a table, so that the compiler knows of their alignment only what it is told."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from loratune.ops import adamw_kernels

    kernel = getattr(adamw_kernels, name)
    constants = {"ALIGNED": aligned, "CHUNK": 4096, "BLOCK": 1024, "COLUMNS": 5}
    kinds = {"places_ptr": "*i32", "table_ptr": "*i64", "gradients_ptr": "*i64", "settings_ptr": "*fp64"}
    signature = {}
    for argument in kernel.arg_names:
        other = "fp32" if argument == "max_norm" else "*fp32" if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constants else kinds.get(argument, other)
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}
    )
    wide = "ld.global.v4.b32" in compiled.asm["ptx"]
    assert wide == (aligned and name != "_settle")
