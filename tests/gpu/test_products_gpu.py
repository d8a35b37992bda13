"""cuBLASLt's kernels for matrix products, and the choice among them (`ops.products`)."""

import pytest
import torch

from loratune.ops import products
from loratune.ops.products import ProductKernels

pytestmark = pytest.mark.gpu

N, K, M, PAD = 768, 512, 1024, 64


@pytest.fixture
def kernels():
    """The kernels of a forward before its first trial."""
    return ProductKernels()


@pytest.fixture
def _always_chosen(monkeypatch):
    """Makes the trial choose one of the candidates even if it is slower."""
    monkeypatch.setattr(products, "_FASTER", 100.0)
    monkeypatch.setattr(products, "_FASTER_IN_OTHER_BITS", 100.0)


def operands(kind, dtype):
    """Operands with padding columns, and the memory of the result or None."""
    torch.manual_seed(0)
    x = torch.randn(N, K + PAD, device="cuda", dtype=dtype)
    weight = torch.randn(M + PAD, K + PAD, device="cuda", dtype=dtype)
    wide = torch.empty(N, 2 * M, device="cuda", dtype=dtype)
    return {
        "forward, augmented": (x, weight[:M].T, None),
        "forward": (x[:, :K], weight[:M, :K].T, None),
        "backward": (torch.randn(N, M + PAD, device="cuda", dtype=dtype), weight[:, :K], None),
        "into columns": (x, weight[:M].T, wide[:, M:]),
        "of columns": (torch.randn(K, N, device="cuda", dtype=dtype).T, weight[:K, :M], None),
    }[kind]


KINDS = ["forward, augmented", "forward", "backward", "into columns", "of columns"]


@pytest.mark.usefixtures("_always_chosen")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chosen_kernel_is_as_exact_as_pytorchs(kernels, kind, dtype):
    a, b, out = operands(kind, dtype)
    wide = None if out is None else out._base.fill_(7)
    with kernels.choosing():
        kernels.mm(a, b, out)
    assert [kernel is not None for kernel in kernels._chosen.values()] == [True]
    for _ in range(2):
        if out is not None:
            out.fill_(torch.nan)
        exact = a.double() @ b.double()
        usual = (a @ b - exact).norm()
        assert (kernels.mm(a, b, out) - exact).norm() <= 1.01 * usual
        a.normal_()  # other operands than those of the trial
        b.normal_()
    assert len(kernels._chosen) == 1
    assert wide is None or (wide[:, :M] == 7).all()


@pytest.mark.usefixtures("_always_chosen")
def test_every_candidate_without_a_workspace_gives_the_same_bits():
    a, b, _ = operands("forward, augmented", torch.bfloat16)
    out = torch.empty(N, M, device="cuda", dtype=torch.bfloat16)
    results = []
    for kernel in products._candidates(a, b, out):
        out.fill_(torch.nan)
        assert kernel(a, b, out)
        assert not out.isnan().any()
        results.append(out.clone())
    assert len(results) > 1
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("_always_chosen")
def test_a_chosen_kernel_can_be_recorded(kernels):
    a, b, _ = operands("backward", torch.bfloat16)
    with kernels.choosing():
        expected = kernels.mm(a, b).clone()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = kernels.mm(a, b)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.usefixtures("_always_chosen")
def test_a_trial_needs_memory_for_a_few_rows_only(kernels):
    a, b, _ = operands("forward", torch.bfloat16)
    out = torch.empty(N, M, device="cuda", dtype=torch.bfloat16)
    torch.mm(a, b, out=out)  # PyTorch's own workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with kernels.choosing():
        kernels.mm(a, b, out)
    assert torch.cuda.max_memory_allocated() - before <= 1 << 16
    assert torch.cuda.memory_allocated() == before


def test_products_outside_of_a_trial_are_pytorchs(kernels, monkeypatch):
    """Outside of `choosing`, with deterministic algorithms, and for memory that is not aligned."""
    a, b, _ = operands("forward", torch.bfloat16)
    monkeypatch.setattr(products, "_fastest", lambda *_: pytest.fail("tried"))
    assert torch.equal(kernels.mm(a, b), a @ b)
    with kernels.choosing():
        odd = torch.randn(N, K + 3, device="cuda", dtype=torch.bfloat16)[:, 3:]
        assert torch.equal(kernels.mm(odd, b), odd @ b)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.equal(kernels.mm(a, b), a @ b)
        finally:
            torch.use_deterministic_algorithms(False)


def test_a_small_product_stays_with_pytorch(kernels):
    small = torch.randn(8, 8, device="cuda", dtype=torch.bfloat16)
    with kernels.choosing():
        assert torch.equal(kernels.mm(small, small), small @ small)
    assert list(kernels._chosen.values()) == [None]
