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
}
POINTERS = {"partial_ptr": "*fp32", "counter_ptr": "*i32", "table_ptr": "*i64", "scale_ptr": "*fp32"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform")
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_kernel_compiles_and_reads_whole_vectors(name):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from loratune.ops import thin_kernels

    kernel, constants = getattr(thin_kernels, name), CONSTANTS[name] | {"RANKS": 16, "thin_rank": 1}
    signature, hints = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = POINTERS.get(argument, "*bf16") if argument.endswith("_ptr") else "i32"
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
@pytest.mark.parametrize(("arch", "limit"), [(90, 227), (89, 99)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_kernels_of_attention_compile_and_fit_the_memory_of_a_block(dim, arch, limit):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from loratune.ops import capped_kernels

    names = ("_forward", "_queries_part", "_keys_part")
    for name, tile in zip(names, capped_kernels._tiles(dim, roomy=arch == 90), strict=True):
        kernel = getattr(capped_kernels, name)
        constants = {"CAP": True, "SINKS": True, "DIM": dim, "WIDTH": dim, "ROWS": tile.queries, "COLUMNS": tile.keys}
        signature, hints = {}, {}
        for index, argument in enumerate(kernel.arg_names):
            pointer = "*i32" if argument == "spans_ptr" else "*fp32" if argument[:3] in ("lse", "del") else "*bf16"
            number = "fp32" if argument in ("scaling", "softcap") else "i32"
            signature[argument] = pointer if argument.endswith("_ptr") else number
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument.endswith(("_ptr", "_token", "_head")):
                hints[index,] = [["tt.divisibility", 16]]
        values = {(kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(kernel, signature, values, hints),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
        assert compiled.metadata.shared <= limit << 10, (name, tile)
        assert (arch == 90) == ("wgmma.mma_async" in compiled.asm["ptx"]), name


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
