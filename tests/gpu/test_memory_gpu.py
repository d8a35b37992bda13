"""On a CUDA device: what layers keep changes memory and not a bit of the result, recorded or not."""

from __future__ import annotations

import gc

import pytest
import torch

from loratune.base.forward import prepare
from loratune.errors import TrainingError
from loratune.fused.policy import ActivationPlan, Level
from loratune.memory.budget import CONTEXT
from loratune.memory.fit import fit, memory_cap
from loratune.ops import layer
from loratune.ops.host import is_mapped
from loratune.training import loop as loop_module
from loratune.training.course import Evaluated, Rows
from loratune.training.graph import GraphStep
from loratune.training.loop import Loop, RunsSlower
from loratune.training.optim import adamw, masters_on_host, set_rate
from loratune.training.recordings import Recordings
from tests.gpu.test_step_gpu import ROWS, a_row, small, training
from tests.training.helpers import config, trainable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS = 4
PLANS = [ActivationPlan.uniform(level, LAYERS) for level in Level] + [
    ActivationPlan.mixed(Level.OFFLOAD, 3, Level.NONE, LAYERS),
    ActivationPlan.mixed(Level.STAGED, 2, Level.WIDE, LAYERS),
]
MIB = 1 << 20
SPLITS = 4 * MIB
"""A cached block of which less than 1 MiB would be left is given whole, and counts as a whole."""


def trained(name, plan, record, steps=12, fused=True, dropout=0.0):
    """Losses, the adapter behind the last step, and the peak of memory above what the model takes."""
    model = small(name, dropout=dropout)
    parameters = list(trainable(model).values())
    on_host = plan is not None and plan.optimizer_on_host
    if on_host:
        masters_on_host(parameters)
    optimizer = adamw(parameters, config())
    if on_host:
        optimizer.move_moments_to_host()
    forward = prepare(model)
    forward.plan = plan
    forward.fused = forward.fused if fused else None
    training(model)
    step = GraphStep(forward, parameters, optimizer, 1.0, record=record)
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # or only who comes first pays for them
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = []
    with forward.installed():
        for index in range(steps):
            set_rate(optimizer, 3e-4 * (1 + index % 3))
            found.append(step(ROWS[index % len(ROWS)], key=index).loss)
    assert step.why_not is None, step.why_not
    peak = torch.cuda.max_memory_allocated() - before
    return found, [p.detach().clone() for p in parameters], peak


@pytest.fixture
def _deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(
    ("name", "fused", "dropout"),
    [("llama", True, 0.0), ("qwen3", True, 0.0), ("llama", False, 0.0), ("llama", True, 0.1), ("llama", False, 0.1)],
)
def test_every_policy_learns_the_same_to_the_bit(name, fused, dropout):
    """Each plan recorded, against the plan that saves everything, launched kernel by kernel."""
    expected, adapter, most = trained(name, None, record=False, fused=fused, dropout=dropout)
    for plan in PLANS:
        for record in (False, True):
            losses, same, peak = trained(name, plan, record, fused=fused, dropout=dropout)
            assert losses == expected, (str(plan), record)
            assert all(torch.equal(a, b) for a, b in zip(adapter, same, strict=True)), (str(plan), record)
            assert peak <= most + SPLITS or record, (str(plan), peak, most)


def test_embeddings_and_optimizer_on_the_host_change_nothing():
    expected, adapter, _ = trained("llama", None, record=True)
    plan = ActivationPlan((Level.FULL,) * LAYERS, embeddings_on_host=True, optimizer_on_host=True)
    losses, same, _ = trained("llama", plan, record=True)
    assert losses == pytest.approx(expected, rel=2e-3)  # attention's usual backward adds in no fixed order
    for a, b in zip(adapter, same, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=2e-3)


def test_memory_stays_what_it_is_behind_the_second_step():
    """Rows of six layouts, again and again: what is allocated does not move by a byte."""
    model = small()
    parameters = list(trainable(model).values())
    optimizer = adamw(parameters, config())
    forward = prepare(model)
    step = GraphStep(forward, parameters, optimizer, 1.0)
    counts = []
    with forward.installed():
        for index in range(120):
            set_rate(optimizer, 1e-4)
            step(ROWS[index % len(ROWS)])
            counts.append(torch.cuda.memory_allocated())
    assert set(counts[12:]) == {counts[12]}, counts


@pytest.fixture
def _no_cap():
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def reserved_now():
    """Bytes that the allocator cannot do without."""
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def assert_as_it_was(stream, reserved):
    """Later work finds the device as it was: its stream, its generator, its memory, and recordings work."""
    assert torch.cuda.current_stream() == stream
    torch.rand(10, device="cuda")
    torch.cuda.get_rng_state()
    assert reserved_now() <= reserved + 8 * MIB
    expected, adapter, _ = trained("llama", None, record=False)
    losses, same, _ = trained("llama", None, record=True)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(adapter, same, strict=True))


@pytest.mark.usefixtures("_deterministic")
def test_a_recording_of_work_that_waits_for_the_device_leaves_it_as_it_was():
    x = torch.ones(1000, device="cuda")
    stream, reserved, seen = torch.cuda.current_stream(), reserved_now(), []
    recordings = Recordings()
    for _ in range(3):
        recordings.run("work", 0, lambda: seen.append((x * 2).sum().item()))
    assert seen == [2000.0] * 3  # as it is, then after the recording has failed, then without another try
    assert recordings.why_not is not None
    assert not recordings.out_of_memory
    assert_as_it_was(stream, reserved)


@pytest.mark.usefixtures("_deterministic", "_no_cap")
@pytest.mark.parametrize("joined", [True, False])
def test_a_recording_that_runs_out_of_memory_leaves_the_device_as_it_was(joined):
    """Also where a second stream has not come back, so that the recording cannot even be ended."""
    side = torch.cuda.Stream()
    stream, reserved, counts = torch.cuda.current_stream(), reserved_now(), iter([1, 100, 1])
    whole = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((reserved + 512 * MIB) / whole)
    done = []

    def work():
        held = [torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            held[0].add_(1)
        if joined:
            torch.cuda.current_stream().wait_stream(side)
        held += [torch.zeros_like(held[0]) for _ in range(next(counts))]
        torch.cuda.current_stream().wait_stream(side)
        done.append(len(held))

    recordings = Recordings()
    for _ in range(2):
        recordings.run("work", 0, work)
    assert done == [2, 2]
    assert recordings.out_of_memory
    assert "out of memory" in str(recordings.why_not)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert_as_it_was(stream, reserved)


def test_a_recording_made_before_one_that_failed_still_replays():
    good, bad = Recordings(), Recordings()
    x, total = torch.ones(10, device="cuda"), torch.zeros(10, device="cuda")
    for _ in range(2):
        good.run("good", 0, lambda: total.add_(x))
        bad.run("bad", 0, lambda: x.sum().item())
    good.run("good", 0, lambda: total.add_(x))
    assert bad.why_not is not None
    assert good.why_not is None
    assert total.tolist() == [3.0] * 10


def test_rows_of_a_second_layout_do_not_take_the_memory_of_both():
    """The first row of a layout runs without a recording: the recordings before it must free memory for it."""
    tokens = 16384
    kinds = [[a_row((9000, 7000), tokens=tokens)], [a_row((400,) * 40, tokens=tokens)]]
    peaks = []
    for used in (kinds[1:], kinds):
        model = small()
        parameters = list(trainable(model).values())
        optimizer, forward = adamw(parameters, config()), prepare(model)
        before = reserved_now()
        torch.cuda.reset_peak_memory_stats()
        step = GraphStep(forward, parameters, optimizer, 1.0)
        with forward.installed():
            for row in [row for row in used for _ in range(3)]:
                set_rate(optimizer, 1e-4)
                step(row)
            assert step.why_not is None, step.why_not
            assert step._graphs
        peaks.append(torch.cuda.max_memory_reserved() - before)
        del step, forward, optimizer, parameters, model
    assert peaks[1] < 1.4 * peaks[0], peaks


def test_held_out_rows_take_the_place_of_recordings_where_memory_is_too_small_for_both(monkeypatch):
    model = small()
    rows = Rows(lambda epoch: [row for (row,) in ROWS[:2]], [a_row((200, 300), 99)])
    loop = Loop(prepare(model), "default", trainable(model), rows, config(max_steps=8, eval_every_steps=4), None)
    held, honest = [], loop_module.evaluate_loss

    def evaluate(*args):
        held.append(len(loop._graph._graphs))
        if held[-1]:
            raise torch.OutOfMemoryError("no memory")
        return honest(*args)

    monkeypatch.setattr(loop_module, "evaluate_loss", evaluate)
    events = list(loop.run())
    assert len([e for e in events if isinstance(e, Evaluated)]) == 2
    assert held[0] > 0
    assert set(held[1:]) == {0}
    assert not [e for e in events if isinstance(e, RunsSlower)]
    assert loop._graph._graphs == {}  # the second evaluation came after the last step


@pytest.mark.usefixtures("_no_cap")
def test_a_row_that_does_not_fit_is_an_error_after_one_step_that_says_by_how_much():
    model = small()
    settings = config(memory="700MiB")
    with pytest.raises(TrainingError, match=r"a row of 131072 tokens takes .* are missing. Set "):
        fit(prepare(model), trainable(model), settings, 131072)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("_no_cap")
def test_auto_takes_the_frugal_plan_only_where_it_has_to():
    model = small()
    forward = prepare(model)
    before = {path: p.detach().clone() for path, p in trainable(model).items()}
    generator = torch.cuda.get_rng_state()
    assert fit(forward, trainable(model), config(), 1024).plan.levels == (Level.NONE,) * LAYERS
    tight = fit(forward, trainable(model), config(memory="1600MiB"), 32768)
    assert tight.plan.levels[0] > Level.NONE
    assert tight.expected is not None
    assert tight.tried <= tight.expected.allocated <= tight.limit
    assert torch.equal(generator, torch.cuda.get_rng_state())
    assert all(torch.equal(before[path], p) for path, p in trainable(model).items())


@pytest.mark.usefixtures("_no_cap")
def test_what_fit_has_chosen_is_recorded_and_keeps_to_the_limit():
    """Rows of several layouts under the cap of the run; the dry step itself leaves nothing behind."""
    model, tokens = small(), 32768
    forward, parameters = prepare(model), trainable(model)
    before = reserved_now()
    settings = config(memory="1900MiB")
    found = fit(forward, parameters, settings, tokens)
    assert reserved_now() <= before + 64 * MIB  # a row takes ten times that; weights may lie less close
    assert found.plan.levels[0] > Level.NONE
    assert forward.record
    torch.cuda.reset_peak_memory_stats()
    values = list(parameters.values())
    optimizer = adamw(values, config())
    if found.plan.optimizer_on_host:
        optimizer.move_moments_to_host()
    step = GraphStep(forward, values, optimizer, 1.0)
    with forward.installed(), memory_cap(settings, torch.device("cuda")):
        for lengths in [(20000, 12000)] * 3 + [(500,) * 60] * 3 + [(20000, 12000)] * 2:
            set_rate(optimizer, 1e-4)
            step([a_row(lengths, tokens=tokens)])
    assert step.why_not is None, step.why_not
    assert step._graphs
    assert torch.cuda.max_memory_reserved() + CONTEXT <= found.limit


@pytest.mark.usefixtures("_no_cap")
@pytest.mark.parametrize("memory", [None, "1900MiB"])
def test_a_cap_of_the_users_own_stays(memory):
    """`fit` and the cap of a run change it for --memory alone, and never upwards."""
    model, device = small(), torch.device("cuda")
    torch.cuda.set_per_process_memory_fraction(0.4)
    settings = config(memory=memory)
    found = fit(prepare(model), trainable(model), settings, 1024)
    assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(0.4)
    assert found.limit <= 0.4 * torch.cuda.mem_get_info()[1] + CONTEXT
    with memory_cap(settings, device):
        inside = torch.cuda.get_per_process_memory_fraction()
        assert inside == pytest.approx(0.4) if memory is None else inside < 0.4
    assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(0.4)


@pytest.mark.usefixtures("_no_cap")
def test_a_plan_without_memory_for_its_recording_runs_without_one(monkeypatch):
    """Recording fails for want of memory under every plan: the first that fits is taken, kernel by kernel."""

    def no_room(self, part, layout, work):
        self.out_of_memory, self.why_not = True, "out of memory"
        return False

    monkeypatch.setattr(Recordings, "record", no_room)
    model = small()
    forward = prepare(model)
    assert fit(forward, trainable(model), config(), 1024).plan.levels == (Level.NONE,) * LAYERS
    assert not forward.record
    assert not any(is_mapped(p) for p in trainable(model).values())  # though a plan with them on the host was tried
    assert GraphStep.for_device(forward, list(trainable(model).values()), None, 1.0) is None


def test_heads_that_lie_a_row_apart_are_found_beyond_31_bits():
    """40 heads, each 2^26 elements behind the one before, as attention of a very long row may store its gradients."""
    tokens, queries, keys, dim, apart = 4, 40, 8, 64, 1 << 26
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    memory = torch.empty((queries - 1) * apart + tokens * dim, dtype=torch.bfloat16, device="cuda")
    d_query = memory.as_strided((tokens, queries, dim), (dim, apart, 1))
    d_query.copy_(random(tokens, queries, dim))
    d_key, d_value = random(tokens, keys, dim), random(tokens, keys, dim)
    cos, sin = random(tokens, dim), random(tokens, dim)
    heads = layer.HeadSpec(queries, keys, dim, dim)
    far = layer.rotate_heads_backward(d_query, d_key, d_value, cos, sin, None, heads)
    near = layer.rotate_heads_backward(d_query.contiguous(), d_key, d_value, cos, sin, None, heads)
    assert torch.equal(far, near)
