"""The CUDA kernels for small batches: which calls they get, and on a GPU what they compute."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import brute_force as brute
import pytest
import small_batches as small
import torch
from small_batches import (
    DTYPES,
    GATHERED,
    RING,
    WINDOW,
    WINDOWS,
    drawn,
    made,
    needs_simt,
    of_fill,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cuda import rules
from rpg_kernels.backends.triton import rules as triton
from rpg_kernels.law.placement import Placement

needs_cuda_build = pytest.mark.skipif(
    not native.build_info().get("cuda"), reason="the native module has no CUDA kernels"
)
GPU = torch.device("cuda", 0)
of_triton = triton.unsupported_kind  # the fixture below takes it away
FILLS = [WINDOW, RING, GATHERED]


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A machine with an H200 and a library for it; the record of the build, to be changed."""
    build = {"cuda": "13.0", "cuda_architectures": "80-real 90a-real 120"}
    monkeypatch.setattr("rpg_kernels.settings._PROVE", "0")
    monkeypatch.setattr(native, "build_info", lambda: build)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    # Layouts are those of the sources for the CPU: the same code.
    monkeypatch.setattr(rules, "kernels", lambda on: native.module().simt)
    monkeypatch.setattr(triton, "unsupported_kind", lambda *call: "")
    remembered = (rules._cuda_gpu, rules._unsupported_gpu, rules._plan)
    for function in remembered:
        function.cache_clear()
    yield build
    for function in remembered:
        function.cache_clear()


def explained(
    batch: int, dtype: torch.dtype = torch.bfloat16, **bank: object
) -> dispatch.Explanation:
    """Of a layer on a CUDA device that need not be there."""
    with FakeTensorMode():
        options = {"window": 256, "laps": 4, "dtype": dtype, "device": GPU, **bank}
        layer = rpg.nn.Linear(
            4096,
            4096,
            bias=False,
            bank=brute.unit_bank(2_000_000, **options),  # type: ignore[arg-type]
        )
        return rpg.explain(layer, torch.empty(batch, 4096, device=GPU, dtype=torch.bfloat16))


@needs_simt
def test_small_batches_are_theirs(h200: dict[str, str]) -> None:
    for batch in (1, 16, 32):
        assert explained(batch).backend == "cuda"
        assert explained(batch, torch.float32).backend == "cuda"
    assert explained(64).backend == "cuda"
    left = explained(65)
    assert left.backend == "triton"
    assert "of linear in torch.bfloat16 are for batches of 1 to 64, not of 65" in left.reason
    assert explained(16, window=None, laps=None).backend == "cuda"
    left = explained(17, window=None, laps=None)
    assert left.backend == "triton"
    assert "block by block, predicted to be slower beyond batches of 16" in left.reason
    with rpg.scratch_limit(1 << 20):
        left = explained(1, torch.float32)
        assert left.backend == "triton"
        assert "scratch_limit: got 1048576 bytes, wanted at least 4000000" in left.reason
    with rpg.backend("triton"):
        forced = explained(1)
    assert forced.backend == "triton"
    assert "CUDA kernels" not in forced.reason
    with rpg.backend("cuda"), pytest.raises(RuntimeError, match="blocks of 32 or 64 elements"):
        explained(1, granularity=8, window=None, laps=None)
    with rpg.backend("cuda"):
        assert explained(1000).backend == "cuda"


@needs_simt
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cuda": ""}, "was built without CUDA kernels; `rpg-kernels doctor` says why"),
        (
            {"cuda_architectures": "80-real 89-real 100-real 120"},
            "were built for 80-real 89-real 100-real 120, and cuda:0 has compute capability 9.0: "
            "install again without RPG_KERNELS_CUDA_ARCHITECTURES",
        ),
    ],
)
def test_libraries_that_do_not_serve_this_gpu(
    change: dict[str, str], sentence: str, h200: dict[str, str]
) -> None:
    h200.update(change)
    left = explained(1)
    assert left.backend == "triton"
    assert sentence in left.reason
    with rpg.backend("cuda"), pytest.raises(RuntimeError) as error:
        explained(1)
    assert sentence in str(error.value)
    h200["cuda_architectures"] += " 90-virtual"  # PTX serves it
    rules._unsupported_gpu.cache_clear()
    assert (explained(1).backend == "cuda") is bool(h200["cuda"])


@needs_simt
@pytest.mark.parametrize("name", rules.PRODUCTS)
def test_weights_of_tables_are_left_to_others(name: str, h200: dict[str, str]) -> None:
    table = rpg.TableGenerator(4096, 4096 * 64, "0" * 64)
    spec = Placement(table, 0, 0, (64, 64), 1.0).to_json()
    on = rules.gpu(GPU)
    reason = rules.why_slower(name, spec, torch.bfloat16, 4, on, None)
    assert reason == "the CUDA kernels read weights of a packing law, not of a table"


def test_a_build_without_the_simulator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(build_info=lambda: {"simt": False})
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "module", lambda: module)
    reason = rules.unsupported_kind("linear", torch.device("cpu"), torch.float32, "simt")
    assert "development builds" in reason
    module.simt = SimpleNamespace()
    assert rules.unsupported_kind("linear", torch.device("cpu"), torch.float32, "simt") == ""


@needs_simt
def test_a_gpu_that_is_too_old_runs_the_reference(
    h200: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "unsupported_kind", of_triton)
    monkeypatch.setattr(triton, "_installed", lambda: True)
    for module in (torch.cuda, triton):
        name = "_capability" if module is triton else "get_device_capability"
        monkeypatch.setattr(module, name, lambda device: (7, 5))
    left = explained(1)
    assert left.backend == "reference"
    assert "and cuda:0 has compute capability 7.5" in left.reason
    assert "the Triton kernels need a GPU of compute capability 8.0 or later" in left.reason


@needs_simt
def test_no_library_at_all(h200: dict[str, str]) -> None:
    with mock.patch.object(native, "_load", return_value=(None, "no C++ compiler was found")):
        left = explained(1)
    assert left.backend == "triton"
    assert "no C++ compiler was found" in left.reason


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("window", WINDOWS)
def test_any_shape_against_the_written_out_weight(window: tuple[int, int] | None) -> None:
    rng = random.Random(str(window))
    for _ in range(30):
        problem = drawn(rng, "cuda", window)
        problem.check()
        small.check_moves(problem)


def large_layers(backend: str, dtype: torch.dtype, batch: int) -> Iterator[small.Problem]:
    yield made((4096, 4096), backend, slots=31250, window=(256, 4), dtype=dtype, batch=batch)
    yield made((14336, 1024), backend, slots=704, dtype=dtype, batch=batch)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_layers(dtype: torch.dtype) -> None:
    for batch in (1, 16, 64):
        for problem in large_layers("cuda", dtype, batch):
            problem.check()


@needs_simt
def test_large_layers_fit_the_usual_scratch(h200: dict[str, str]) -> None:
    """Every launch of them, as laid out for an H200."""
    target, limit = rules.gpu(GPU), 16 << 20
    divided = set()
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 16, 64):
            for problem in large_layers("simt", dtype, batch):
                for name in problem.operators:
                    given = (name, problem.weight.spec, dtype, batch, target)
                    parts, reason = rules.parts(*given, 0)
                    assert not reason, given
                    assert sum(part.stop - part.start for part, _ in parts) == batch
                    assert all(4 * plan.workspace <= limit for _, plan in parts)
                    if len(parts) > 1:  # never by default: triton takes it
                        divided.add((name, dtype, batch))
                        assert "for batches of 1 to 8, not of 64" in rules.why_slower(*given, None)
    assert divided == {("linear_input_grad", torch.float32, 64)}


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", FILLS)
def test_same_bits_run_to_run_and_on_every_stream(fill: int, dtype: torch.dtype) -> None:
    problem = of_fill(fill, "cuda", dtype=dtype)
    for name in problem.operators:
        first = problem.run(name)
        for _ in range(20):
            assert problem.run(name).equal(first)
        streams, results = [torch.cuda.Stream() for _ in range(4)], []
        torch.cuda.synchronize()
        for _ in range(5):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(problem.run(name))
        torch.cuda.synchronize()
        assert all(result.equal(first) for result in results)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("fill", FILLS)
def test_misaligned_operands(fill: int) -> None:
    problem = of_fill(fill, "cuda", offset=8)
    wanted = problem.run("linear")
    problem.x = small.surrounded(problem.x, 1)
    assert problem.run("linear").equal(wanted)
    problem.bank = small.surrounded(problem.bank, 1)
    assert problem.run("linear").equal(wanted)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("fill", FILLS)
def test_captured_and_replayed(fill: int) -> None:
    """Two graphs, replayed one after the other and at the same time, with new inputs."""
    problem = of_fill(fill, "cuda", dtype=torch.bfloat16)
    op, spec = torch.ops.rpg_kernels, problem.weight.spec

    def call() -> torch.Tensor:
        result: torch.Tensor = op.linear(problem.x, problem.bank, None, problem.bias, spec, "cuda")
        return result

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graphs, results = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            results.append(call())
    for _ in range(3):
        problem.x.copy_(torch.randn_like(problem.x))
        wanted = call()
        for result in results:
            result.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph in graphs:
            with torch.cuda.stream(torch.cuda.Stream()):
                graph.replay()
        torch.cuda.synchronize()
        assert all(result.equal(wanted) for result in results)


@pytest.mark.gpu
@needs_cuda_build
def test_another_than_the_current_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    problem = of_fill(WINDOW, "cuda")
    far = torch.device("cuda", 1)
    wanted = problem.run("linear")
    assert problem.bias is not None
    problem.x, problem.bank = problem.x.to(far), problem.bank.to(far)
    problem.bias = problem.bias.to(far)
    assert torch.cuda.current_device() == 0
    assert problem.run("linear").cpu().equal(wanted.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@needs_cuda_build
def test_taken_by_default() -> None:
    layer = rpg.nn.Linear(
        512, 4096, bank=brute.unit_bank(200_000, window=256, laps=4, device="cuda")
    )
    x = torch.randn(3, 512, device="cuda")
    explanation = rpg.explain(layer, x)
    assert explanation.backend == "cuda", explanation
    with rpg.backend("cuda"):
        forced = layer(x)
    assert layer(x).equal(forced)
    with torch.autocast("cuda", torch.bfloat16):
        assert rpg.explain(layer, x).backend == "cuda"
        assert layer(x).dtype == torch.bfloat16


def test_calls_that_are_planned_alike_are_proved_together() -> None:
    """By plan.cpp a batch of 1, up to 8 and up to 16 has tiles of its own; more has whole ones."""
    spec = made((600, 200), "simt", window=(64, 4)).weight.spec

    def said(rows: int) -> str:
        call = Call("linear", torch.empty(rows, 200), spec)
        return rules.Cuda("cuda").configuration(call)

    kinds = [said(rows) for rows in range(1, 65)]
    assert len(set(kinds)) == 9
    for rows in (1, 8, 16):
        assert said(rows) != said(rows + 1)
