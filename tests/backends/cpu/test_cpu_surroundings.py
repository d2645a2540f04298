"""The compiled CPU kernels where they are called from: processes, threads, settings, addresses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import brute_force as brute
import processes
import pytest
import torch
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.cpu import factored
from rpg_kernels.backends.cpu.memory import workspace
from rpg_kernels.law.placement import parse

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

ROOT = Path(__file__).parents[3]
op = torch.ops.rpg_kernels
FORKS = hasattr(os, "fork")


class Problem:
    """A layer of 1000 rows and 110 columns, as a product and as a table, and what they give."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        random = torch.Generator().manual_seed(0)
        bank = brute.unit_bank(64 * 300, 64, window=64, laps=4, init_std=1.0, dtype=dtype)
        with torch.no_grad():
            bank.weight.normal_(generator=random)
        self.spec = bank.place((1000, 110), scale=0.5).spec
        self.bank = bank.weight.detach()
        self.x = torch.randn(6, 110, generator=random).to(dtype)
        self.dy = torch.randn(6, 1000, generator=random).to(dtype)
        self.bias = torch.randn(1000, generator=random).to(dtype)
        # Few enough that torch's own operators take one thread: they too hang after a fork.
        self.indices = torch.randint(1000, (200,), generator=random)
        self.rows = torch.randn(200, 110, generator=random).to(dtype)

    def results(self, backend: str = "cpu") -> list[Tensor]:
        bank, spec, dtype = self.bank, self.spec, self.bank.dtype
        return [
            op.linear(self.x, bank, None, self.bias, spec, backend),
            op.linear_input_grad(self.dy, bank, None, spec, backend),
            op.linear_bank_grad(self.dy, self.x, None, spec, dtype, backend),
            op.embedding(bank, None, self.indices, spec, backend),
            op.embedding_bank_grad(self.rows, self.indices, None, spec, dtype, backend),
        ]


def check(threads: int) -> None:
    """Against the reference on one thread; also the program of the processes below."""
    torch.set_num_threads(1)
    problem = Problem()
    wanted = problem.results("reference")
    torch.set_num_threads(threads)
    for got, exact in zip(problem.results(), wanted, strict=True):
        assert got.isfinite().all()
        assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


class Lookups(torch.utils.data.Dataset[Tensor]):
    """Items that a worker computes: one of each of the results."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(2)  # a loader's workers are given one
        return torch.cat([result.flatten()[index:][:1] for result in Problem().results()])


def load_in_forked_workers() -> None:
    """Workers of a loader, forked after the kernels have started threads here."""
    torch.set_num_threads(2)
    problem = Problem()
    wanted = [result.flatten() for result in problem.results()]
    loader = torch.utils.data.DataLoader(
        Lookups(), num_workers=2, multiprocessing_context="fork", timeout=processes.HANGS
    )
    for index, item in enumerate(loader):
        one = torch.stack([result[index] for result in wanted])
        assert (item[0] - one).abs().max() < 1e-3
    for before, after in zip(wanted, problem.results(), strict=True):
        assert before.equal(after.flatten())  # the parent goes on as it was


def fork() -> None:
    """A bare fork, and one in it, whose children compute with the parent's setting of threads."""
    torch.set_num_threads(2)
    problem = Problem()
    wanted = problem.results()

    def child(depth: int) -> None:
        if pid := os.fork():
            assert os.waitpid(pid, 0)[1] == 0
            return
        signal.alarm(processes.HANGS)  # nobody else would end a child that hangs
        try:
            assert native.threads() == 1
            for got, exact in zip(problem.results(), wanted, strict=True):
                assert (got - exact).abs().max() < 1e-3
            if depth:
                child(depth - 1)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)

    child(1)
    assert native.threads() == 2


def process(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import test_cpu_surroundings as t; {program}; print('right')"
    return processes.python(code, **environment)


def assert_right(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.skipif(not FORKS, reason="no fork")
@pytest.mark.parametrize("program", ["fork", "load_in_forked_workers"])
def test_forked_after_threads_have_started(program: str) -> None:
    """GNU's OpenMP would wait for the parent's threads for ever."""
    assert_right(process(f"t.{program}()", OMP_NUM_THREADS="2"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("OMP_NUM_THREADS", "0"), ("OMP_NUM_THREADS", "many"), ("OMP_THREAD_LIMIT", "1")],
)
def test_settings_of_openmp(variable: str, value: str) -> None:
    """Also fewer threads than a call asks for."""
    assert_right(process("t.check(t.torch.get_num_threads()); t.check(3)", **{variable: value}))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_a_processor_with_less(isa: str) -> None:
    if isa not in native.build_info()["isas"]:
        pytest.skip(f"{isa} is not compiled in")
    done = process("t.check(2)", RPG_KERNELS_ISA=isa)
    if f"RPG_KERNELS_ISA: got {isa}" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert_right(done)


@pytest.fixture
def set_threads() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_calls_from_several_threads_at_once(
    threads: int, set_threads: Callable[[int], None]
) -> None:
    problem = Problem()
    set_threads(threads)

    def call(_: int) -> list[Tensor]:
        set_threads(threads)  # each thread has its own number
        return problem.results()

    wanted = problem.results()
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(call, range(24)):
            for got, exact in zip(results, wanted, strict=True):
                assert got.equal(exact)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_calls_inside_torchs_own_threads(set_threads: Callable[[int], None]) -> None:
    """Functions that torch runs aside."""
    set_threads(2)
    problem = Problem()
    wanted = problem.results()[0]

    @torch.jit.script
    def product(x: Tensor, bank: Tensor, bias: Tensor, spec: str) -> Tensor:
        return torch.ops.rpg_kernels.linear(x, bank, None, bias, spec, "cpu")

    aside = [
        torch.jit.fork(product, problem.x, problem.bank, problem.bias, problem.spec)
        for _ in range(8)
    ]
    for future in aside:
        assert (torch.jit.wait(future) - wanted).abs().max() < 1e-4


def test_other_threads_run_meanwhile(set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    problem = Problem()
    problem.x = problem.x.repeat(500, 1)
    spec = rpg.ParameterBank(64 * 300, 64).place((1000, 110)).spec
    law = native.layer_law(parse(spec).law)
    step = factored.check("linear", spec, len(problem.x))
    y, memory = problem.x.new_empty(len(problem.x), 1000), workspace(step.workspace)
    arguments = (native.given_bank(problem.bank), problem.x.data_ptr(), 1, 0, y.data_ptr())
    arguments += (len(problem.x), 110, 1.0, 1, step.batch_tile, step.tiles, memory.data_ptr())
    ticks, stop, interval = [0], [False], sys.getswitchinterval()

    def tick() -> None:
        while not stop[0]:
            ticks[0] += 1
            time.sleep(0)

    other = threading.Thread(target=tick)
    try:
        sys.setswitchinterval(1000)  # nobody is interrupted: who waits, waits for a release
        other.start()
        for _ in range(200):
            before = ticks[0]
            law.linear(*arguments)
            if ticks[0] > before:
                return
        pytest.fail("a call holds the interpreter's lock")
    finally:
        stop[0] = True
        other.join()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["x", "dy", "bias", "bank", "rows"])
def test_memory_that_is_not_aligned(name: str, dtype: torch.dtype) -> None:
    """Views from an odd element, and copies whose rows lie apart."""
    problem = Problem(dtype)
    wanted, tensor = problem.results(), getattr(problem, name)
    apart = tensor.new_full((*tensor.shape, 2), torch.nan)[..., 1]
    shifted = tensor.new_full((tensor.numel() + 1,), torch.nan)[1:].view(tensor.shape)
    for other in (shifted, apart):
        setattr(problem, name, other.copy_(tensor))
        assert other.data_ptr() % 64
        for got, exact in zip(problem.results(), wanted, strict=True):
            assert got.equal(exact)


def test_empty_batches() -> None:
    problem = Problem()
    for shape in ((0,), (0, 3), (3, 0)):
        problem.x = torch.empty(*shape, 110)
        problem.dy = torch.empty(*shape, 1000)
        problem.indices = torch.empty(shape, dtype=torch.int32)
        problem.rows = torch.empty(*shape, 110)
        y, dx, dw, rows, drows = problem.results()
        assert y.shape == (*shape, 1000)
        assert dx.shape == rows.shape == (*shape, 110)
        assert not dw.any()
        assert not drows.any()
