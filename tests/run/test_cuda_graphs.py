"""``CudaGraphs`` against a stand-in for ``torch.cuda``: what is called with what, in which order, without a card."""

import contextlib
import dataclasses

import pytest
import torch
from unit_fast_kernels.shared import capture as _capture

from unit_fast import ops
from unit_fast.run import step_graph
from unit_fast.run.step_graph import CudaGraphs


class Driver:
    """Notes calls; tensors stay on the CPU."""

    def __init__(self):
        self.calls: list = []
        self.live = 0
        """Bytes alive in the newest pool."""
        self.pools = 0
        driver = self

        class Stream:
            cuda_stream = 7

            def __init__(self, device=None):
                assert device is None or device.index is not None
                driver.calls.append(("stream", device))

            def wait_stream(self, other):
                driver.calls.append("wait")

        class MemPool:
            def __init__(self):
                driver.pools += 1
                self.id = (0, driver.pools)

            def snapshot(self):
                blocks = [{"size": driver.live, "state": "active_allocated"}, {"size": 99, "state": "inactive"}]
                return [{"blocks": blocks}]

        class CUDAGraph:
            def replay(self):
                driver.calls.append("replay")

        self.Stream, self.MemPool, self.CUDAGraph = Stream, MemPool, CUDAGraph

    def note(self, *call):
        @contextlib.contextmanager
        def block():
            self.calls.append(("enter", *call))
            try:
                yield
            finally:
                self.calls.append(("leave", *call))

        return block()

    def use_mem_pool(self, pool, device):
        assert device.index is not None, "torch takes no device without a number here"
        return self.note("pool", pool.id)

    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        return self.note("capture", pool)


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    for name in ("Stream", "MemPool", "CUDAGraph", "use_mem_pool", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.Stream())
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.note("device", device.index))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: made.note("on stream"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.calls.append("empty cache"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: made.calls.append(("state", state)))
    monkeypatch.setattr(ops, "reserve", lambda device: made.calls.append(("reserve", device.index)))
    ones = torch.ones
    monkeypatch.setattr(step_graph.torch, "ones", lambda *size, device=None, **options: ones(*size, **options))
    return made


@dataclasses.dataclass
class Found:
    value: torch.Tensor


def test_an_eager_step_takes_the_pool_and_its_result_leaves_it(driver):
    graphs = CudaGraphs(torch.device("cuda"))
    assert graphs.device == torch.device("cuda", 3)
    del driver.calls[:]
    inside = torch.zeros(2)

    def step():
        assert _capture.in_graph_memory(torch.device("cpu"))
        assert not torch.autograd.is_multithreading_enabled()
        driver.calls.append("step")
        return Found(inside)

    found = graphs.eager(step)
    assert torch.equal(found.value, inside)
    assert found.value.data_ptr() != inside.data_ptr()
    calls = [c for c in driver.calls if c[0] != "stream"]
    assert calls == [
        "wait", ("enter", "on stream"), ("reserve", 3), ("enter", "pool", (0, 1)), "step", ("leave", "pool", (0, 1)),
        ("leave", "on stream"), "wait",
    ]  # fmt: skip
    assert torch.autograd.is_multithreading_enabled()
    assert not _capture.in_graph_memory(torch.device("cpu"))
    assert graphs.left_behind() is None


def test_what_a_step_leaves_in_the_pool_ends_the_pool(driver):
    graphs = CudaGraphs(torch.device("cuda", 1))

    def leaking():
        driver.live += 512
        return Found(torch.zeros(1))

    graphs.eager(leaking)
    assert graphs.left_behind() == (
        "an eager step left 512 bytes in the graphs' memory; eager steps take theirs elsewhere from now on"
    )
    assert graphs.pool.id == (0, 2)
    del driver.calls[:]
    graphs.eager(leaking)
    assert not any("pool" in c for c in driver.calls)
    assert graphs.left_behind() is None


def test_a_capture_has_what_it_needs_made_before(driver):
    graphs = CudaGraphs(torch.device("cuda", 1))
    del driver.calls[:]
    replay, found = graphs.capture(lambda: driver.calls.append("step") or Found(torch.zeros(1)))
    assert driver.calls == [
        ("enter", "on stream"), ("reserve", 1), ("leave", "on stream"), ("enter", "capture", (0, 1)), "step",
        ("leave", "capture", (0, 1)),
    ]  # fmt: skip
    replay()
    assert driver.calls[-1] == "replay"
    assert isinstance(found, Found)


def test_released_memory_is_another_pool_and_the_same_random_numbers(driver):
    graphs = CudaGraphs(torch.device("cuda", 1))
    graphs.release("a state")
    assert graphs.pool.id == (0, 2)
    assert driver.calls[-2:] == ["empty cache", ("state", "a state")]
