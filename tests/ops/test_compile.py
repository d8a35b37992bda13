"""Kernels compile for a GPU, without one, to the intended code. Triton's interpreter accepts code that does not."""

from __future__ import annotations

import importlib.util
import re

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform"
)

CONSTANTS = {
    "_down_project": {
        "TERMS_EACH": 256,
        "PIECES": 2,
        "TAIL": 1,
        "KEEP": 1,
        "COPY": 1,
        "SPARE": 64,
        "ROWS": 64,
        "TERMS": 128,
    },
    "_gradients": {"ROWS_EACH": 256, "PIECES": 2, "ALIGNED": 1, "PAIRS": 6},
    "_up_project": {"MEMBERS": 3, "MOST": 64, "ROWS": 32, "COLUMNS": 128},
}
STAGES = 3
LIMITS = [(90, 227), (89, 99)]
"""Compute capability, and its KiB of shared memory per block."""
KINDS = {"partial_ptr": "*fp32", "counter_ptr": "*i32", "table_ptr": "*i64", "scale_ptr": "*fp32"}
KINDS |= {"row_ptr": "*i32", "parts_ptr": "*i32", "scale": "fp32"}


@pytest.fixture(autouse=True)
def nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, constants, kinds, num_warps=4, num_stages=STAGES, arch=90):
    """The kernel as a launch compiles it, for widths that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, hints = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = kinds.get(argument, "*bf16" if argument.endswith("_ptr") else "i32")
        if signature[argument] != "fp32":
            hints[index,] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names}
    return triton.compile(
        ASTSource(kernel, signature, values, hints),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )


def low_rank_kernel(name, drop, arch=90, **constants):
    """A kernel of `ops.low_rank_kernels` or `ops.low_rank_gradient_kernels`."""
    from loratune.ops import low_rank_gradient_kernels, low_rank_kernels
    from loratune.ops.dropout import GOLDEN, LEVELS

    constants = CONSTANTS[name] | {"RANKS": 16, "DROP": drop, "GOLDEN": GOLDEN, "LEVELS": LEVELS} | constants
    constants["factor_term" if drop else "factor_rank"] = 1  # Aᵀ, or B
    kinds = KINDS | ({"out_ptr": "*fp32"} if name == "_gradients" else {})
    stages = STAGES
    if name == "_gradients":
        constants["PAIRS"] = 2 if drop else constants["PAIRS"]
        constants["COLUMNS"], constants["ROWS"], stages = low_rank_gradient_kernels.TILES[constants["RANKS"]]
    return compiled(
        getattr(low_rank_gradient_kernels if name == "_gradients" else low_rank_kernels, name),
        constants,
        kinds,
        num_stages=stages,
        arch=arch,
    )


def augmented(ranks, rows, scaled, arch=90):
    """`augment_rows` of `precision.fp8_kernels`, as it is launched."""
    from loratune.ops import low_rank_kernels
    from loratune.precision import fp8_kernels

    terms, stages = fp8_kernels.TILES[scaled]
    constants = CONSTANTS["_down_project"] | {"SCALED": int(scaled), "RANKS": ranks, "matrix_rank": 1}
    constants |= {"ROWS": low_rank_kernels.tile_rows(rows), "TERMS": terms, "TERMS_EACH": 2 * terms}
    return compiled(fp8_kernels._augment, constants, OF_FP8, fp8_kernels.WARPS, stages, arch)


def overtaken(kernel, stages=STAGES):
    """True if an asynchronous copy may overwrite a tile that a running product still reads.

    While one product runs, the next tile is awaited and later ones are in flight, so each stage needs a buffer. A
    tile that is multiplied from registers has been read when the loop continues, and needs one buffer less.
    """
    code = kernel.asm["ttgir"]
    buffers = re.findall(r"(%\w+) = ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x", code)
    assert buffers, "nothing is copied ahead"
    runs_on = any(int(pending) for pending in re.findall(r"pendings = (\d+)", code))
    return runs_on and any(int(count) < stages for name, count in buffers if _multiplied(name, code))


def _multiplied(buffer, code):
    """True if a product reads tiles of this buffer in shared memory."""
    tiles = re.findall(rf"(%\w+) = ttg.memdesc_index {re.escape(buffer)}\[", code)
    readers = [line for line in code.splitlines() if re.search(r"warp_group_dot |memdesc_(trans|subslice) ", line)]
    return any(re.search(rf"{re.escape(tile)}\b", line) for tile in tiles for line in readers)


@pytest.mark.parametrize(
    ("name", "drop"),
    [("_down_project", 0), ("_down_project", 1), ("_gradients", 0), ("_gradients", 1), ("_up_project", 1)],
)
def test_a_kernel_reads_whole_vectors_ahead(name, drop):
    assert "cp.async.cg" in low_rank_kernel(name, drop).asm["ptx"], (
        "the loads of the loop are not 16 bytes each, in advance"
    )


@pytest.mark.parametrize("ranks", [16, 64])
@pytest.mark.parametrize("rows", [512, 4096])
@pytest.mark.parametrize("copied", [False, True])
def test_no_copy_overtakes_a_low_rank_product(copied, rows, ranks):
    """With the tile height that a launch selects for these rows."""
    from loratune.ops import low_rank_kernels

    kernel = low_rank_kernel("_down_project", 0, COPY=int(copied), RANKS=ranks, ROWS=low_rank_kernels.tile_rows(rows))
    assert not overtaken(kernel)
    assert ("wgmma" in kernel.asm["ptx"]) == (rows > 1024)


@pytest.mark.parametrize("ranks", [16, 32, 64])
@pytest.mark.parametrize("drop", [0, 1])
def test_no_copy_overtakes_the_products_of_gradients(drop, ranks):
    from loratune.ops import low_rank_gradient_kernels

    assert not overtaken(low_rank_kernel("_gradients", drop, RANKS=ranks), low_rank_gradient_kernels.TILES[ranks][2])


@pytest.mark.parametrize("ranks", [16, 64])
def test_no_copy_overtakes_a_low_rank_product_with_dropout(ranks):
    from loratune.ops import low_rank_kernels

    rows = low_rank_kernels.tile_rows(4096, hashed=True)
    assert not overtaken(low_rank_kernel("_down_project", 1, COPY=1, RANKS=ranks, ROWS=rows))


@pytest.mark.parametrize(("arch", "limit"), LIMITS)
@pytest.mark.parametrize("ranks", [16, 32, 64])
def test_low_rank_products_fit_in_shared_memory(ranks, arch, limit):
    from loratune.ops import low_rank_kernels

    kernels = [low_rank_kernel("_gradients", drop, arch, RANKS=ranks) for drop in (0, 1)]
    kernels += [
        low_rank_kernel("_down_project", 0, arch, RANKS=ranks, COPY=copy, ROWS=low_rank_kernels.tile_rows(4096))
        for copy in (0, 1)
    ]
    kernels += [augmented(ranks, 4096, scaled, arch) for scaled in (False, True)]
    assert max(kernel.metadata.shared for kernel in kernels) <= limit << 10


@pytest.mark.parametrize(("arch", "limit"), LIMITS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_kernels_of_attention_compile_and_fit_in_shared_memory(dim, arch, limit):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from loratune.ops.attention import capped_kernels

    names = ("_forward", "_queries_part", "_keys_part")
    for name, tile in zip(names, capped_kernels._tiles(dim, large=arch == 90), strict=True):
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


@pytest.mark.parametrize("name", ["_square_sums", "_settle", "_update"])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_kernels_of_adamw_compile_and_read_four_numbers_at_once(name, aligned):
    """The addresses come from a table, so the compiler knows their alignment only from `ALIGNED`."""
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


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("ranks", [16, 64])
def test_no_copy_overtakes_the_products_of_a_banks_gradients(ranks, side):
    from loratune.ops.bank import kernels as bank_kernels

    kernel = bank_kernels._add_gradients
    constants = {"SIDE": side, "RANK": ranks, "BLOCK": bank_kernels.BLOCK, "WIDTH": bank_kernels.GRADIENTS["width"]}
    constants |= bank_kernels.CONSTANTS
    pointers = {"gradient_ptr": "*fp32", "entries_ptr": "*i64", "scaling_ptr": "*fp32", "keep_ptr": "*fp32"}
    pointers |= {"blocks_ptr": "*i32", "starts_ptr": "*i32"}
    assert not overtaken(compiled(kernel, constants, pointers, bank_kernels.GRADIENTS["num_warps"]))


OF_FP8 = {
    "found_ptr": "*fp32", "factors_ptr": "*fp32", "out_ptr": "*fp8e4nv", "kind_ptr": "*fp8e4nv", "table_ptr": "*i64",
} | KINDS  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("ranks", [16, 64])
@pytest.mark.parametrize("rows", [512, 4096])
def test_no_copy_overtakes_a_low_rank_product_whose_rows_are_quantised(rows, ranks, scaled):
    from loratune.precision import fp8_kernels

    kernel = augmented(ranks, rows, scaled)
    assert not overtaken(kernel, fp8_kernels.TILES[scaled][1])
    assert "cp.async.cg" in kernel.asm["ptx"]
    assert "st.global.v4.b32" in kernel.asm["ptx"], "rows in 8 bits are not written 16 at a time"


@pytest.mark.parametrize("aligned", [False, True])
def test_adapter_columns_in_8_bits_are_written_sixteen_at_a_time(aligned):
    from loratune.precision import fp8_kernels

    constants = {"ALIGNED": aligned, "RANKS": 64, "BLOCK": 64}
    kernel = compiled(fp8_kernels._adapter_columns, constants, OF_FP8)
    assert ("st.global.v4.b32" in kernel.asm["ptx"]) == aligned


FLOATS = dict.fromkeys(("eps", "offset", "post_eps", "post_offset", "scale"), "fp32")
LLAMA = 1 + 4 + 32  # `form_of` an RMS norm with a weight that rounds first
NORM = {"FORM": LLAMA, "POST": 0, "ADD": 0, "SCALE": 0, "OUT": 1, "MEASURE": 0, "ROWS": 1, "BLOCK": 2048}
ACTIVATION = {"KIND": 0, "GATED": 1, "OUT": 1, "MEASURE": 0, "BLOCK": 2048}
HEADS = {
    "DIM": 128,
    "PAIRS": 64,
    "HALF": 64,
    "REST": 0,
    "ROTATE": 1,
    "INTERLEAVED": 0,
    "EACH": 0,
    "NORM": 0,
    "FORM": 0,
}


@pytest.mark.parametrize(
    ("module", "name", "constants", "loads", "stores"),
    [
        ("norm_kernels", "_norm", NORM, 2, 1),
        ("norm_kernels", "_norm", NORM | {"ADD": 1}, 3, 2),
        ("norm_kernels", "_norm_backward", NORM | {"RESIDUAL": 1}, 4, 2),
        ("activation_kernels", "_activation", ACTIVATION, 2, 1),
        ("activation_kernels", "_activation_backward", ACTIVATION, 3, 3),
        ("rotary_kernels", "_rotate_backward", HEADS | {"MEASURE": 0, "HEADS": 16}, 6, 2),
    ],
)
def test_a_pass_of_a_llama_layer_reads_and_writes_nothing_else(module, name, constants, loads, stores):
    """Features of other layers are compiled away.

    A thread takes 16 elements of a row, two vectors, or 8 of each half of the heads, one vector.
    """
    import importlib

    kernel = compiled(getattr(importlib.import_module(f"loratune.ops.{module}"), name), constants, FLOATS)
    vectors = 1 if module == "rotary_kernels" else 2
    found = [len(re.findall(rf"{kind}\.global(?:\.\w+)*\.v4\.b32", kernel.asm["ptx"])) for kind in ("ld", "st")]
    assert found == [vectors * loads, vectors * stores]
    assert len(re.findall(r"(?:ld|st)\.global", kernel.asm["ptx"])) == sum(found)
