"""Clocks, memory and roofline: figures for work whose cost is known."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import bench_tools as tools
import pytest
import torch
from torch import Tensor

from benchmarks.harness import baselines, cuda_clock, machine, memory, roofline, timing
from benchmarks.harness.cases import Case, select
from benchmarks.harness.problem import Problem, Stack, turns
from benchmarks.harness.timing import COLD, WARM, Work


def work(name: str, case: Case | None = None, copies: int = 1) -> timing.Work:
    problem = Problem(case or tools.case(), tools.CPU)
    return timing.Work(problem, baselines.IMPLEMENTATIONS[name].build(problem, copies))


def doing(action: Callable[[int], object], copies: int = 3) -> timing.Work:
    """Work that does something in the forward of each layer."""
    problem = Problem(tools.case(), tools.CPU)

    def forward(i: int) -> Tensor:
        action(i)
        return problem.x @ problem.bank.weight.view(-1)[: 20 * 24].view(20, 24)

    problem.bank.weight.data = torch.randn(60, 8)
    return timing.Work(problem, Stack(copies, forward, lambda i: [problem.bank.weight]))


def peak_of(made: timing.Work, kind: str) -> memory.Peak:
    return memory.peak(lambda: made.prepare(kind, WARM), made.problem.device)


def test_cold_takes_layers_in_turn_and_warm_the_first() -> None:
    order: list[int] = []
    made = doing(order.append)
    for kind in ("forward", "backward", "full", "forward"):
        made.prepare(kind, timing.COLD)()
    assert order == [1, 2, 0, 1]
    order.clear()
    for kind in ("forward", "backward", "full"):
        made.prepare(kind, timing.WARM)()
    assert order == [0, 0, 0]


def test_waiting_counts_as_wall_time_only_and_a_forward_is_no_part_of_its_backward() -> None:
    clock = timing.CpuClock(threads=1, shortest=0.0)
    made = doing(lambda i: time.sleep(0.02))
    forward, backward, full = (
        clock.sample(made, kind, timing.COLD) for kind in ("forward", "backward", "full")
    )
    assert forward["wall"] > 0.02 > 4 * forward["process"]
    assert full["wall"] > 0.02
    assert backward["wall"] < 0.02
    assert clock.headline == "process"
    assert timing.CpuClock(threads=2).headline == "wall"


def test_short_calls_are_repeated_within_a_sample() -> None:
    calls: list[int] = []
    clock = timing.CpuClock(threads=1, shortest=0.05)
    made = doing(lambda i: (calls.append(i), time.sleep(0.005)))
    clock.sample(made, "forward", timing.WARM)
    calls.clear()
    clock.sample(made, "forward", timing.WARM)
    assert 3 <= len(calls) <= 10


@pytest.mark.parametrize(
    ("name", "saved"), [("dense", 0), ("published", 16), ("unpack", 4), ("rpg-reference", 0)]
)
def test_bytes_saved_per_virtual_weight(name: str, saved: int) -> None:
    """int64 index, float32 sign and float32 weight as published; nothing with ours."""
    made = work(name)
    left_out = (made.problem.x, *made.stack.trained(0))
    assert memory.saved(lambda: made.stack.forward(0), left_out) == saved * 24 * 20


def test_persistent_bytes_with_adam() -> None:
    weights, dof = 24 * 20, 200
    step = 4  # Adam counts steps in one float per tensor
    dense, ours, tables = (
        memory.with_adam(stack.trained(0), stack.tables)
        for stack in (work(name).stack for name in ("dense", "rpg-reference", "published"))
    )
    assert dense.total == 16 * weights + step
    assert ours.total == 16 * dof + step
    assert (tables.tables, tables.total) == (12 * weights, 16 * dof + 12 * weights + step)


def test_peak_and_largest_of_a_known_sequence_of_allocations() -> None:
    def allocate(i: int) -> None:
        first = torch.empty(30_000)
        second = torch.empty(10_000)
        del first
        assert second.numel() == torch.empty(10_000).numel()

    peak = peak_of(doing(allocate), "forward")
    assert peak.largest == 120_000
    assert peak.peak == 160_000


def test_gradients_are_part_of_the_peak_of_full_but_not_of_forward() -> None:
    case = tools.case(batch=1)
    forward, full = (peak_of(work("dense", case), kind) for kind in ("forward", "full"))
    assert forward.peak < 4 * 24 * 20 <= full.peak
    assert full.largest == 4 * 24 * 20


CEILINGS = roofline.Ceilings(copy=100.0, matrix={"float32": 1000.0}, gather={(800, 32): 50.0})


def test_floors_by_hand() -> None:
    case = tools.case(batch=3, dof=200, granularity=8)  # x 3 x 20, weight 24 x 20, y 3 x 24
    x, y, weight, bank = 240, 288, 1920, 800
    operations = 2 * 3 * 24 * 20
    forward = roofline.floor(case, "forward", True, CEILINGS)
    assert (forward.bytes, forward.operations) == (x + y + weight, operations)
    assert (forward.seconds, forward.bound) == ((x + y + weight) / 100, "copy")
    ours = roofline.floor(case, "forward", False, CEILINGS)
    assert (ours.bytes, ours.gathered_bytes) == (x + y + bank, weight)
    assert (ours.seconds, ours.bound) == (weight / 50, "gather")
    backward = roofline.floor(case, "backward", False, CEILINGS)
    assert backward.bytes == x + y + x + bank + bank
    assert backward.gathered_bytes == 2 * weight
    full = roofline.floor(case, "full", False, CEILINGS)
    assert full.bytes == ours.bytes + backward.bytes
    assert full.operations == 3 * operations
    slow = roofline.Ceilings(1e9, {"float32": 1.0}, {(800, 32): 1e9})
    assert roofline.floor(case, "full", True, slow).bound == "matrix"


def test_an_embedding_moves_its_rows_only_until_a_dense_gradient_is_written() -> None:
    case = tools.case("embedding", batch=3, granularity=8)
    tokens, y, weight = 3 * 8, 3 * 12 * 4, 50 * 12 * 4
    assert roofline.floor(case, "forward", True, CEILINGS).bytes == tokens + 2 * y
    assert roofline.floor(case, "backward", True, CEILINGS).bytes == tokens + y + weight
    ours = roofline.floor(case, "forward", False, CEILINGS)
    assert (ours.bytes, ours.gathered_bytes) == (tokens + 2 * y, y)


def test_ceilings_are_measured_for_every_case() -> None:
    cases = [tools.case(), tools.case(granularity=1), tools.case("conv2d", dof=400)]
    measured = roofline.measure(cases, tools.CPU, cache_bytes=1 << 16)
    assert set(measured.gather) == {(800, 32), (800, 4), (1600, 32)}
    assert set(measured.matrix) == {"float32"}
    assert min(measured.copy, *measured.matrix.values(), *measured.gather.values()) > 1e6


def test_environment_is_json_and_names_the_machine() -> None:
    record = machine.environment(tools.CPU, commit_given="abc")
    assert json.loads(json.dumps(record)) == record
    assert record["commit"] == "abc"
    assert record["device_name"]
    assert record["cache_bytes"] >= 1 << 16


def test_where_the_system_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    monkeypatch.setattr(machine, "_CPU_CACHE", Path("/nowhere"))
    monkeypatch.setattr(machine, "_MEMINFO", Path("/nowhere"))
    assert machine.cache_bytes(tools.CPU) == 32 << 20
    assert machine.memory_bytes() == 0
    assert machine.available_bytes(tools.CPU) > 0


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)

    def reasons(load: float, wait: float, spread: float, threads: int = 1) -> list[str]:
        return machine.busy_reasons(load, [wait] * 5, [("a/1", spread)] * 5, threads)

    assert reasons(1.9, 1.01, 0.1) == []
    assert reasons(3.0, 1.01, 0.1) == ["load average 3.0 before the run"]
    assert reasons(0.2, 1.50, 0.1) == ["wall time was 1.50 times process time"]
    assert reasons(0.2, 0.60, 0.1, threads=2) == []
    assert reasons(0.2, 1.00, 0.9) == ["samples of a/1 spread over 90% of their median"]
    assert machine.busy_reasons(0.0, [], [], 1) == []
    quiet, disturbed = [("a/1", 0.1)] * 9, [("b/1", 0.4)] * 3
    assert machine.busy_reasons(0.0, [], [*quiet, *disturbed], 1) == [
        "samples of b/1 spread over 40% of their median"
    ]


def test_an_embedding_is_looked_up_with_other_tokens_when_cold() -> None:
    (case,) = select(["llama-3-8b.embed_tokens/16"])
    small = replace(case, layer=replace(case.layer, weight=(50, 8)))
    problem = Problem(small, torch.device("cpu"), 0)
    problem.take_turns(3)
    seen: list[Tensor] = []
    stack = Stack(1, lambda i: (seen.append(problem.x), torch.zeros(1))[1], lambda i: [])
    work = Work(problem, stack)
    for state in (COLD, COLD, COLD, WARM, WARM):
        work.prepare("forward", state)()
    assert seen[3] is seen[4] is problem.turns[0]
    assert len({id(x) for x in seen[:3]}) == 3
    assert not torch.equal(seen[0], seen[1])
    assert turns(case, 32 << 20) > 1


class FakeCuda:
    """torch.cuda as far as the clock uses it: everything runs at once, and every event counts a
    millisecond more than the one before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Exception | None = None) -> None:
        self.now = 0.0
        self.captured: list[str] = []
        self.replayed: list[object] = []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.time = 0.0

            def record(self) -> None:
                fake.now += 1.0
                self.time = fake.now

            def elapsed_time(self, other: Event) -> float:
                return other.time - self.time

        class Graph:
            def replay(self) -> None:
                fake.replayed.append(self)

            def pool(self) -> str:
                return "pool"

        @contextlib.contextmanager
        def graph(made: Graph, pool: str | None = None) -> Iterator[None]:
            fake.captured.append("graph" if pool is None else pool)
            yield
            if fails is not None:
                raise fails

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                pass

        fakes: dict[str, object] = {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": Stream,
            "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda: None,
        }  # fmt: skip
        for name, value in fakes.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_the_logic_of_the_cuda_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    clock = cuda_clock.CudaClock()
    order: list[int] = []
    made = doing(order.append, copies=3)
    sample = clock.sample(made, "forward", timing.COLD)
    # Warm-up: 3 calls of one layer forward and full, then every layer; 2 captures of 8 calls.
    assert order[:6] == [1] * 6
    assert order[6:12] == [1, 1, 2, 2, 0, 0]
    assert order[12:28] == [1, 2, 0, 1, 2, 0, 1, 2] * 2
    assert fake.captured == ["graph", "graph", "pool"]
    assert sample["eager"] == pytest.approx(1e-3)
    assert sample["graph"] == pytest.approx(1e-3 / 8)
    graphs = clock._graphs[id(made), timing.COLD]
    assert graphs is not None
    assert set(map(id, fake.replayed)) == {id(graphs.forward)}
    fake.replayed.clear()
    clock.sample(made, "backward", timing.COLD)
    assert set(map(id, fake.replayed)) == {id(graphs.backward)}
    fake.replayed.clear()
    clock.sample(made, "full", timing.COLD)
    assert fake.replayed[:2] == [graphs.with_grad, graphs.backward]
    assert len(fake.captured) == 3  # captured once
    assert clock.note(made) is None
    clock.forget()
    assert not clock._graphs
    assert clock.headline == "graph"


def test_a_forward_alone_is_captured_without_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    made = doing(lambda i: None)
    made.passes = ("forward",)

    def backward(*arguments: object, **options: object) -> None:
        pytest.fail("a backward")

    monkeypatch.setattr(timing.Work, "backward", backward)
    assert set(cuda_clock.CudaClock().sample(made, "forward", timing.COLD)) == {"eager", "graph"}
    assert fake.captured == ["graph"]


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted when stream is capturing\nmore"),
              torch.OutOfMemoryError("CUDA out of memory")]
)  # fmt: skip
def test_what_cannot_be_captured_is_timed_as_launched(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda(monkeypatch, fails=error)
    clock = cuda_clock.CudaClock()
    made = doing(lambda i: None)
    assert set(clock.sample(made, "full", timing.WARM)) == {"eager"}
    assert clock.note(made) == f"timed as launched, no graph: {str(error).splitlines()[0]}"
    assert set(cuda_clock.CudaClock(graphs=False).sample(made, "full", "cold")) == {"eager"}
    figures = {"eager": 1.0}
    assert timing.quoted(figures, clock.headline) == figures["eager"]


def test_slow_calls_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)

    def slow(i: int) -> None:
        fake.now += 100.0

    clock = cuda_clock.CudaClock()
    made = doing(slow)
    assert clock.sample(made, "forward", timing.COLD)["eager"] == pytest.approx(0.101)
    assert clock.note(made) == "a call takes 201 ms: timed as launched"
    assert fake.captured == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "published", "unpack", "rpg-reference"])
def test_cuda_clock_times_calls_in_graphs_and_as_launched(name: str) -> None:
    problem = Problem(tools.case(dtype="bf16", batch=64), torch.device("cuda"))
    made = timing.Work(problem, baselines.IMPLEMENTATIONS[name].build(problem, 4))
    clock = cuda_clock.CudaClock()
    for kind in ("forward", "backward", "full"):
        for state in (timing.COLD, timing.WARM):
            sample = clock.sample(made, kind, state)
            assert sample["eager"] > 0
            assert clock.note(made) is not None or 0 < sample["graph"] < 0.1
    clock.forget()
    assert clock.note(made) is None


@pytest.mark.gpu
def test_cuda_peak_is_the_allocators() -> None:
    problem = Problem(tools.case(dtype="bf16", batch=4096), torch.device("cuda"))
    made = timing.Work(problem, baselines.IMPLEMENTATIONS["dense"].build(problem, 1))
    peak = peak_of(made, "forward")
    y = 4096 * 24 * 2
    assert y <= peak.largest <= peak.peak < y + (1 << 20)
