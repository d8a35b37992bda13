"""The Triton kernels of a bank against their references, in Triton's interpreter, so that it needs no GPU.

The interpreter is chosen when kernels are defined, so the comparison runs in a process of its own.
"""

from __future__ import annotations

from tests.ops.twins import compare, needs_triton

COMPARE = """
import torch
from loratune.fused.structure import MlpActivation
from loratune.ops.bank import projection as bank
from loratune.ops.bank.pool import BankLayer, BankPool, Segment, SlotWeights
from loratune.ops.bank.projection import BankProjection
from loratune.ops.bank.kernels import BankTables
from loratune.ops.dropout import dropout_key, layer_salt
from loratune.ops.frozen import DenseWeight

torch.manual_seed(0)
half = torch.float16
D_IN, OUTS, SLOTS, TOKENS = 96, (64, 32, 48), 4, 334
RANKS = {0: (4, 4, 0), 1: (1, 40, 17), 3: (16, 16, 16)}  # a slot without adapter, a member without, unequal ranks

def a_pool():
    frozen = DenseWeight(torch.zeros(sum(OUTS), D_IN, dtype=half))
    capacity = 64 * 200
    pool = BankPool([slot * capacity for slot in range(SLOTS + 1)], 3, 48, torch.float32, frozen)
    rows, layers, at = [], [], 0
    for index, width in enumerate(OUTS):
        layers.append(BankLayer(index, layer_salt(f"layer.{index}"), D_IN, width))
        rows.append(slice(at, at + width))
        at += width
    pool.dropout = [0.0, 0.3, 0.0, 0.0]
    for slot, ranks in RANKS.items():
        end = 0
        def take(r, width):
            nonlocal end
            begin, end = end, end + -(-r * width // 64) * 64
            flats = [pool.slot(flat, slot) for flat in (pool.master, pool.gradient)]
            return [flat[begin:begin + r * width].view(r, width) for flat in flats]
        for layer, r in zip(layers, ranks):
            if r:
                (A, dA), (B, dB) = take(r, layer.d_in), take(r, layer.d_out)
                A.copy_(torch.randn(A.shape).to(half))
                B.copy_(torch.randn(B.shape).to(half))
                layer.parts[slot] = SlotWeights(A, B, dA, dB, 0.5 + slot)
    return pool, BankProjection(frozen, None, pool, layers, rows), layers, frozen

ACTIVATION = MlpActivation("silu", gated=True)
DROPPED = Segment(1, 64, 150, dropout_key(1, 2), 1000)
SEGMENTS = (Segment(3, 0, 64), DROPPED, Segment(3, 192, 220), Segment(0, 320, 334))

def run(p, x, dy):
    inner = bank.down_forward(p, x)
    y = bank.up_forward(p, inner)
    d_inner = bank.down_backward(p, dy)
    dx = bank.up_backward(p, d_inner)
    for _ in range(2):  # gradients are added to
        bank.add_gradients(p, dy, d_inner, x, inner)
    return y, dx, p.pool.gradient.clone()

pool, p, layers, frozen = a_pool()
pool.tables = None
pool.segments = SEGMENTS
padded = torch.randn(TOKENS, D_IN + 16).to(half)
x, dy = padded[:, :D_IN], torch.randn(TOKENS, sum(OUTS)).to(half)
for a, b in ((150, 192), (220, 320)):  # tokens between segments reach no loss
    dy[a:b] = 0
expected = run(p, x, dy)

def gate_up_and_down():
    # Members of one width, and the projection behind them.
    into, out_of = (DenseWeight(torch.zeros(n, k, dtype=half)) for n, k in ((128, D_IN), (D_IN, 64)))
    gate_up = BankProjection(into, None, pool, [layers[0], BankLayer(1, 5, D_IN, OUTS[0], twin_parts)],
                             [slice(0, 64), slice(64, 128)])
    return gate_up, BankProjection(out_of, None, pool, [back], [slice(0, D_IN)])

def run_swiglu():
    gate_up, down = gate_up_and_down()
    inner, d_inner = bank.down_forward(gate_up, x / 32), bank.down_backward(down, d_down / 32)
    wide, d_active = seed_wide.clone(), seed_active.clone()
    return (
        bank.swiglu(gate_up, wide, inner, ACTIVATION),
        *bank.swiglu_backward(gate_up, wide, inner, d_active, down, d_inner, ACTIVATION),
    )

# Adapters of the second half, and a projection back, from the existing weights.
twin_parts = {s: SlotWeights(q.A, layers[0].parts[s].B, q.dA, q.dB, q.scaling) for s, q in layers[0].parts.items()}
back_parts = {s: SlotWeights(q.B, q.A, q.dB, q.dA, q.scaling) for s, q in layers[0].parts.items()}
back = BankLayer(2, 77, 64, D_IN, back_parts)
seed_wide, seed_active, d_down = (torch.randn(TOKENS, n).to(half) for n in (128, 64, D_IN))
expected_swiglu = run_swiglu()

pool.gradient.zero_()
tables = pool.tables = BankTables(pool, 3, half)
for slot in range(SLOTS):
    tables.set_slot(pool, slot, layers)
pool.segments = tuple(Segment(0, start, start + 64) for start in range(0, 1280, 64))
tables.set_row(tables.prepare_row(pool, pool.segments))  # a longer row before leaves nothing behind
pool.segments = SEGMENTS
tables.set_row(tables.prepare_row(pool, pool.segments))
pool.refresh()
got = run(p, x, dy)

keep_layers = [layers[0], BankLayer(1, 5, D_IN, 64, twin_parts), back]
for slot in range(SLOTS):
    tables.set_slot(pool, slot, keep_layers)
got_swiglu = run_swiglu()
for slot in range(SLOTS):
    tables.set_slot(pool, slot, layers)

written = torch.zeros(TOKENS, dtype=torch.bool)
for s in SEGMENTS:
    written[s.start:s.stop] = True
for name, a, b in zip(("y", "dx", "gradient"), got, expected):
    a, b = (a, b) if name == "gradient" else (a[written], b[written])
    error = float((a.double() - b.double()).norm() / b.double().norm())
    assert error < 2e-3, (name, error)  # a few roundings of float16, 4.9e-4 each
for name, a, b in zip(("active", "d_gate_up", "active again"), got_swiglu, expected_swiglu):
    a, b = a[written], b[written]
    error = float((a.double() - b.double()).norm() / b.double().norm())
    assert error < 2e-3, (name, error)
assert not got[0][256:320].any(), "a block that is nobody's gets something"
assert not got[1][256:320].any()
partial = BankProjection(frozen, None, pool, layers[:1], p.rows[:1])  # only the first of the members has a layer
low = bank.up_forward(partial, bank.down_forward(partial, x))
assert torch.equal(low[written][:, :64], got[0][written][:, :64]) and not low[:, 64:].any()

sound = got
pool.slot(pool.master, 1).fill_(float("nan"))
pool.gradient.zero_()
pool.refresh()
sick = run(p, x, dy)
others = torch.ones(TOKENS, dtype=torch.bool)
others[64:192] = False
assert torch.equal(sick[0][others], sound[0][others]) and torch.equal(sick[1][others], sound[1][others])
assert sick[0][64:150].isnan().any()
for slot in (0, 2, 3):
    assert torch.equal(pool.slot(sick[2], slot), pool.slot(sound[2], slot))

from loratune.ops.bank import kernels as bank_kernels
from loratune.ops.bank.adamw import IDLE, SlotUpdate, bank_adamw
starts = torch.tensor([0, 5000, 5064, 12000, 12800])
flats = [torch.randn(12800) for _ in range(3)] + [torch.rand(12800)]
flats[1][5063] = float("nan")  # a gradient that is not finite
due = SlotUpdate(1.0, 1e-2, 0.9, 0.99, 1e-8, 0.1, 1.0, 1 - 0.9**3, (1 - 0.99**3) ** 0.5)
settings = torch.tensor([due, due, IDLE, due._replace(max_norm=float("inf"))])
losses = torch.zeros(4)
copies = [flat.clone() for flat in flats]
twins = [flat.clone() for flat in flats]
expected = bank_adamw(copies[0], copies[1], (copies[2], copies[3]), starts, 6936, settings, losses)
got = bank_kernels.bank_adamw(twins[0], twins[1], (twins[2], twins[3]), starts, 6936, settings, losses)
torch.testing.assert_close(got, expected, rtol=1e-5, atol=0, equal_nan=True)
for a, b in zip(twins, copies, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
for untouched in (slice(5000, 5064), slice(5064, 12000)):
    for flat in (0, 2, 3):
        assert torch.equal(twins[flat][untouched], flats[flat][untouched])
assert not twins[1][:5064].any() and torch.equal(twins[1][5064:12000], flats[1][5064:12000])
"""


@needs_triton
def test_kernels_equal_their_references_and_keep_slots_apart():
    compare(COMPARE)
