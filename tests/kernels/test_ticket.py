"""Tickets: whose counters a launch gets, that they are back at 0, and what the last program sees, on a card too."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode
from unit_fast_kernels.assembly import assemble as _assemble
from unit_fast_kernels.assembly import budgets as _budgets
from unit_fast_kernels.assembly import record as _record
from unit_fast_kernels.shared import ticket as _ticket
from unit_fast_kernels.shared.registration import REGISTERED
from unit_fast_kernels.shared.triton import INTERPRETING, jit, tl

from tests.kernels.program_order import ORDERS, permute_programs
from tests.planted_kernels import needs_compiler

CPU = torch.device("cpu")
LIKE = torch.zeros(1)


@pytest.fixture
def stream(monkeypatch):
    """Nothing was launched yet; what a test puts here is the current stream and whether it is captured."""
    for name in ("_of_stream", "_for_graphs", "_taken"):
        monkeypatch.setattr(_ticket, name, {})
    now = {"number": 1, "capturing": False}
    monkeypatch.setattr(_ticket, "_stream", lambda device: (now["number"], now["capturing"]))
    return now


def addresses(*found):
    return {x.data_ptr() + 4 * i for x in found for i in range(len(x))}


def test_a_stream_keeps_its_counters_and_shares_them_with_none(stream):
    first = _ticket.counters(LIKE, 6)
    assert (first.dtype, first.count_nonzero(), len(first) >= 6) == (torch.int32, 0, True)
    assert _ticket.counters(LIKE, 3).data_ptr() == first.data_ptr()
    stream["number"] = 2
    second = _ticket.counters(LIKE, 6)
    assert not addresses(first) & addresses(second)
    stream["number"] = 1
    more = _ticket.counters(LIKE, len(first) + 1)
    assert len(more) > len(first)
    assert more.count_nonzero() == 0
    assert not addresses(more) & addresses(second)


def test_every_captured_call_has_its_own_counters(stream):
    eager = _ticket.counters(LIKE, 6)
    stream.update(number=7, capturing=True)  # a capture may use another stream than its warm-up
    captured = [_ticket.counters(LIKE, count) for count in (6, 1, 40, 6)]
    stream["capturing"] = False
    found = [eager, *captured, _ticket.counters(LIKE, 6)]
    assert len(addresses(*found)) == sum(map(len, found))
    assert [len(x) for x in captured] == [6, 1, 40, 6]
    assert all(x.count_nonzero() == 0 for x in found)
    # Triton compiles again for a pointer that is not divisible by 16, which a capture must not do.
    assert all((x.data_ptr() - captured[0].data_ptr()) % 128 == 0 for x in captured)


def test_a_capture_before_any_eager_call_raises(stream):
    stream["capturing"] = True
    with pytest.raises(RuntimeError, match="captured on cpu, but no counters are left.*run the same step once eagerly"):
        _ticket.counters(LIKE, 1)
    stream["capturing"] = False
    _ticket.counters(LIKE, _ticket.BLOCK)
    stream["capturing"] = True
    assert len(_ticket.counters(LIKE, _ticket.BLOCK)) == _ticket.BLOCK  # as many as the eager call had


def test_eager_calls_set_more_aside_before_captures_run_out(stream):
    calls = _ticket.BLOCK // _ticket.LINE
    captured = []
    for _ in range(3):
        stream["capturing"] = False
        _ticket.counters(LIKE, 6)
        stream["capturing"] = True
        captured += [_ticket.counters(LIKE, 6) for _ in range(calls // 2)]
    assert len(addresses(*captured)) == 6 * len(captured)
    kept = {block.untyped_storage().data_ptr() for block in _ticket._for_graphs[CPU]}
    assert {x.untyped_storage().data_ptr() for x in captured} <= kept  # graphs hold their addresses
    left = len(_ticket._for_graphs[CPU][-1]) - _ticket._taken[CPU]
    assert len(_ticket.counters(LIKE, left)) == left
    with pytest.raises(RuntimeError, match="no counters are left"):
        _ticket.counters(LIKE, 1)


def test_recorded_launches_keep_nothing(stream):
    with FakeTensorMode():
        found = _ticket.counters(torch.empty(3, device="cuda:0"), 5)
    assert (found.shape, found.dtype, found.device.type) == ((5,), torch.int32, "cuda")
    assert not _ticket._of_stream
    assert not _ticket._for_graphs


def test_an_interrupted_launch_of_the_interpreter_is_told_once(stream):
    _ticket.counters(LIKE, 2)[1] = 3
    with pytest.raises(RuntimeError, match="a launch was interrupted in Triton's interpreter"):
        _ticket.counters(LIKE, 2)
    assert _ticket.counters(LIKE, 2).count_nonzero() == 0


# --- The last program -------------------------------------------------------------------------------------------------


@jit
def _sum(x_ptr, partials_ptr, counter_ptr, out_ptr, BLOCK: tl.constexpr):
    """One program a number; the last adds what all of them left and counts itself."""
    number, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(partials_ptr + number, tl.load(x_ptr + number))
    if _ticket.is_last(counter_ptr, programs):
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, programs, BLOCK):
            place = start + tl.arange(0, BLOCK)
            total += tl.load(partials_ptr + place, mask=place < programs, other=0.0, cache_modifier=".cg")
        tl.store(out_ptr, tl.sum(total, 0))
        tl.store(out_ptr + 1, tl.load(out_ptr + 1) + 1)


def total_of(x, block=8):
    counter = _ticket.counters(x, 1)
    out = torch.zeros(2, device=x.device)
    _sum[(len(x),)](x, torch.full_like(x, float("nan")), counter, out, BLOCK=block)
    assert out[1] == 1  # one program was the last
    assert counter[0] == 0
    return out[0]


@pytest.mark.skipif(not INTERPRETING, reason="a kernel runs in the interpreter")
@pytest.mark.parametrize("order", ORDERS)
def test_the_sum_does_not_depend_on_who_comes_last(order, monkeypatch):
    values = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 300, 7, 300)]
    plain = [total_of(x) for x in values]
    permute_programs(monkeypatch, order)
    assert [total_of(x) for x in values] == plain
    for found, x in zip(plain, values):
        torch.testing.assert_close(found, x.sum())


@pytest.mark.gpu
def test_the_last_program_sees_everything_on_a_gpu():
    """Many programs on all multiprocessors, many times; the sum of whole numbers is exact whatever its order."""
    x = torch.arange(4096, device="cuda", dtype=torch.float32) % 64
    assert {total_of(x, block=256).item() for _ in range(200)} == {x.sum().item()}


# --- Graphs, on a GPU -------------------------------------------------------------------------------------------------

OPS = ["set_loss", "attribute_loss"]


def _forward(op, shape):
    here = _budgets.module(op)
    name, arguments = here.launches(here.SHAPES[shape], torch.float32, "cuda")[0]
    return lambda: REGISTERED[name].op(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_two_graphs_and_a_stream_at_once(op):
    """Captured on one stream, replayed on two while a third runs the same eagerly: the bits of a call alone."""
    forward = _forward(op, "unit_vg")
    expected = forward()
    graphs, streams = [], [torch.cuda.Stream() for _ in range(3)]
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = forward()
        graphs.append((graph, result))
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, _) in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = forward()
        torch.cuda.synchronize()
        for found in (*(result for _, result in graphs), eager):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- The machine code -------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("arch", _assemble.ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_the_ticket_is_taken_between_two_barriers(op, arch, tmp_path, monkeypatch):
    """Stores, barrier, an acquire-release atomic of the whole card, barrier, and then loads past the L1 cache."""
    here = _budgets.module(op)

    def forward():
        name, arguments = here.launches(here.SHAPES["unit_vg"], torch.bfloat16, "cuda:0")[0]
        REGISTERED[name].launch(*arguments)

    (launch,) = _record.record(forward, _assemble.ARCHITECTURES[arch][0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # it is compiled, whatever was before
    found = _assemble.assemble(launch, arch, triton_cache=str(tmp_path / "triton")).instructions
    (path,) = (tmp_path / "triton").glob(f"*/{launch.name}.ptx")
    access = r"^\s+(?:@!?%p\d+ )?((?:ld|st)\.global|atom|red(?=\.)|bar\.sync)([\w.]*)"
    code = [a + b for a, b in re.findall(access, path.read_text(encoding="utf-8"), re.M)]
    (ticket,) = (i for i, name in enumerate(code) if name.startswith(("atom", "red")))
    assert code[ticket] == "atom.global.gpu.acq_rel.add.u32"
    assert code[ticket - 1] == code[ticket + 1] == "bar.sync"
    cached = [i for i, name in enumerate(code) if name.startswith("ld.global.cg")]
    assert cached
    assert min(cached) > ticket
    # ptxas: a fence before it, and the L1 cache is emptied behind it.
    assert found["ATOMG.E.ADD.STRONG.GPU"] == found["MEMBAR.ALL.GPU"] == found["CCTL.IVALL"] == 1
    assert found["LDG.E.STRONG.GPU"] >= len(cached)
