"""The CUDA kernels' own sources, run on the CPU, against written-out weights in float64."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import brute_force as brute
import pytest
import small_batches as small
import torch
from small_batches import DTYPES, GATHERED, RING, WINDOW, WINDOWS, drawn, made, of_fill

import rpg_kernels as rpg
from rpg_kernels.backends.cuda import counters, launch, rules

pytestmark = small.needs_simt

CPU = torch.device("cpu")
H200 = rules.Gpu("simt", sms=132, shared_bytes=227 * 1024)
op = torch.ops.rpg_kernels


@pytest.mark.parametrize("window", WINDOWS)
def test_any_shape_against_the_written_out_weight(
    window: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(str(window))
    for order in range(11):
        monkeypatch.setattr(launch, "simt_order", order)
        drawn(rng, "simt", window).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [WINDOW, RING, GATHERED])
def test_every_order_of_threads_gives_the_same_bits(
    fill: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = of_fill(fill, "simt", dtype=dtype)
    for name in problem.operators:
        first = problem.run(name)
        for order in (1, 2, 3, 4):
            monkeypatch.setattr(launch, "simt_order", order)
            assert problem.run(name).equal(first)
        monkeypatch.setattr(launch, "simt_order", 0)


@pytest.mark.parametrize("fill", [WINDOW, RING, GATHERED])
def test_any_gpu_gives_results_and_parts_are_added_in_order(
    fill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = of_fill(fill, "simt", dtype=torch.bfloat16, batch=9)
    splits = set()
    for sms, kib in ((1, 48), (3, 100), (40, 227)):
        monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", sms, kib * 1024))
        problem.check()
        plan, _ = rules.plan("linear", problem.weight.spec, torch.bfloat16, 9, rules.SIMT, 0)
        splits.add(plan.splits)
    assert 1 in splits
    assert max(splits) > 1


def test_backward_keeps_the_back_end() -> None:
    problem = of_fill(WINDOW, "simt")
    x, exact = problem.x.clone().requires_grad_(), problem.exact()
    bank = problem.bank.clone().requires_grad_()
    with rpg.backend("simt"):
        y = op.linear(x, bank, None, problem.bias, problem.weight.spec, "simt")
    with mock.patch.object(launch, "run", wraps=launch.run) as run:
        y.backward(problem.dy)
    assert sorted(call.args[0] for call in run.call_args_list) == sorted(rules.PRODUCTS[1:])
    assert x.grad is not None
    assert bank.grad is not None
    small.close(x.grad, exact["linear_input_grad"], torch.float32, torch.float32)
    small.close(bank.grad, exact["linear_bank_grad"], torch.float32, torch.float32)


def test_bank_gradients_of_rings_and_of_signs_of_elements_are_left_to_others() -> None:
    for fill, sentence in ((RING, "of windows, not of a whole ring"), (GATHERED, "of windows")):
        with pytest.raises(RuntimeError, match=sentence):
            of_fill(fill, "simt").run("linear_bank_grad")
    problem = made((100, 64), "simt", window=(64, 4), reflect="element")
    with pytest.raises(RuntimeError, match="with one sign for a slot use"):
        problem.run("linear_bank_grad")


def test_writes_nothing_but_the_result() -> None:
    for fill in (WINDOW, RING, GATHERED):
        problem = of_fill(fill, "simt")
        p, batch = problem.weight.placement, problem.batch
        ((_, plan),) = rules.check("linear", p.to_json(), CPU, torch.float32, batch, problem.bank)
        memory = torch.full((batch * p.shape[0] + 128,), 7.0)
        y = memory[64:-64].view(batch, -1)
        launch.run(
            "linear", p, plan, batch, torch.float32, (problem.bank, problem.x, problem.bias, y)
        )
        small.close(y, problem.exact()["linear"], torch.float32, torch.float32)
        assert (memory[:64] == 7).all()
        assert (memory[-64:] == 7).all()


@pytest.mark.parametrize(
    ("fill", "dtype"),
    [
        (WINDOW, torch.bfloat16),
        (WINDOW, torch.float16),
        *((fill, dtype) for fill in (RING, GATHERED) for dtype in DTYPES),
    ],  # of windows in fp32: test_simt_windows.py
)
def test_unread_slots_and_padding_may_hold_anything(
    fill: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinities that no weight reads reach no result; NaNs of a row of x stay in that row."""
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", sms=4, shared_bytes=H200.shared_bytes))
    problem = {
        # The last window is read by half a lap.
        WINDOW: lambda: made((512, 170), "simt", window=(128, 3), before=64, dtype=dtype, batch=9),
        RING: lambda: made((50, 110), "simt", slots=130, before=0, dtype=dtype, batch=9),
        GATHERED: lambda: made((90, 110), "simt", reflect="element", dtype=dtype, batch=9),
    }[fill]()
    assert problem.fill() == fill
    p = problem.weight.placement
    # Without signs a slot's uses cannot cancel.
    spec = replace(p, generator=replace(p.generator, reflect="none")).to_json()
    read = op.pack(torch.ones(p.shape), None, spec, torch.float32, "reference")
    assert (read == 0).all(1).any()
    problem.bank[read == 0] = float("inf")
    problem.x[4] = problem.dy[4] = float("nan")
    for name in ("linear", "linear_input_grad"):
        y = problem.run(name)
        assert y[4].isnan().all()
        assert torch.cat((y[:4], y[5:])).isfinite().all()


@pytest.mark.parametrize("window", [(64, 1), (64, 4), (128, 3), (256, 2)])
def test_an_infinity_of_x_reaches_only_what_is_read(window: tuple[int, int]) -> None:
    problem = made((130, 128), "simt", window=window, before=64)
    problem.x[1, 5] = float("inf")
    spec = problem.weight.spec
    wanted = op.linear_bank_grad(problem.dy, problem.x, None, spec, problem.bank.dtype, "reference")
    assert not wanted.isfinite().all()
    got = problem.run("linear_bank_grad")
    assert got.isfinite().equal(wanted.isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8, 16, 33])
@pytest.mark.parametrize(
    ("window", "granularity", "before"),
    [((256, 4), 64, 0), ((256, 4), 32, 64), ((128, 8), 64, 64), ((512, 4), 32, 0)],
)
def test_windows_of_hundreds_of_slots(
    window: tuple[int, int],
    granularity: int,
    before: int,
    batch: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a large layer has them: laps of 128 rows and more to a warp, 7 rounds of the law."""
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", sms=4, shared_bytes=H200.shared_bytes))
    problem = made(
        (1100, 2 * granularity - 6),
        "simt",
        slots=1500,
        granularity=granularity,
        window=window,
        dtype=dtype,
        batch=batch,
        before=before,
    )
    rows = 1024 if batch <= 16 else 512  # of a tile, which must be more than a window's slots
    if dtype != torch.float32 and before == 0 and window[0] < rows:
        assert problem.fill() == WINDOW
    problem.check()


def test_a_bank_that_is_misaligned_or_strided_is_copied() -> None:
    problem = of_fill(WINDOW, "simt")
    wanted = problem.run("linear")
    odd = small.surrounded(problem.bank, 1)
    strided = problem.bank.t().contiguous().t()
    for bank in (odd, strided):
        assert rules.copied(bank, torch.float32) == 4 * bank.numel()
        problem.bank = bank
        assert problem.run("linear").equal(wanted)
        with rpg.scratch_limit(100), pytest.raises(RuntimeError, match="scratch_limit: got 100 by"):
            problem.run("linear")


def test_scratch_bounds_the_workspace() -> None:
    problem = of_fill(WINDOW, "simt", dtype=torch.float16)
    spec, wanted = problem.weight.spec, problem.exact()["linear"]
    plan, _ = rules.plan("linear", spec, torch.float16, 3, rules.SIMT, 0)
    assert plan.workspace > 0
    for limit in (4 * plan.workspace, 4 * plan.workspace - 1, 0):
        with rpg.scratch_limit(limit):
            fewer, _ = rules.plan("linear", spec, torch.float16, 3, rules.SIMT, 0)
            assert 4 * fewer.workspace <= limit
            small.close(problem.run("linear"), wanted, torch.float16, torch.float16)
    problem = of_fill(WINDOW, "simt", dtype=torch.float16, bank_dtype=torch.float32)
    copy = rules.copied(problem.bank, torch.float16)
    with rpg.scratch_limit(copy):
        small.close(problem.run("linear"), problem.exact()["linear"], torch.float16, torch.float16)
    sentence = rf"got {copy - 1} bytes, wanted at least {copy}, with a copy of the bank in torch.fl"
    with rpg.scratch_limit(copy - 1), pytest.raises(RuntimeError, match=sentence):
        problem.run("linear")


@pytest.mark.parametrize("window", [(64, 4), None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_gradient_that_exceeds_scratch_runs_some_rows_at_a_time(
    window: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    """Its workspace grows with the batch, whatever the number of processors."""
    slots = 704 if window else 2500  # a ring that does not fit
    problem = made((600, 200), "simt", slots=slots, window=window, dtype=dtype, batch=41)
    spec, wanted = problem.weight.spec, problem.exact()["linear_input_grad"]
    ((_, whole),), _ = rules.parts("linear_input_grad", spec, dtype, 41, rules.SIMT, 0)
    one, _ = rules.plan("linear_input_grad", spec, dtype, 1, rules.SIMT, 0)
    for limit, parts in ((4 * whole.workspace - 1, 2), (2 * whole.workspace, 3)):
        with rpg.scratch_limit(limit):
            cut, reason = rules.parts("linear_input_grad", spec, dtype, 41, rules.SIMT, 0)
            assert not reason
            assert len(cut) == parts
            assert [row for part, _ in cut for row in range(part.start, part.stop)] == [*range(41)]
            assert all(part.start % 16 == 0 for part, _ in cut)
            assert all(4 * plan.workspace <= limit for _, plan in cut)
            small.close(problem.run("linear_input_grad"), wanted, dtype, dtype)
    with rpg.scratch_limit(4 * one.workspace - 1):
        sentence = f"scratch_limit: got {4 * one.workspace - 1} bytes, wanted at least"
        with pytest.raises(RuntimeError, match=sentence):
            problem.run("linear_input_grad")


def test_strided_and_empty_inputs_and_a_bias_of_another_dtype() -> None:
    weight = brute.unit_bank(64 * 500, window=64, laps=2).place((300, 128))
    x, bias = torch.randn(128, 6).t(), torch.randn(300)
    with rpg.backend("simt"):
        y = rpg.functional.linear(x, weight)
        assert y.equal(rpg.functional.linear(x.contiguous(), weight))
        assert rpg.functional.linear(x[:0], weight).shape == (0, 300)
        assert (
            op.linear_input_grad(y[:0], weight.bank.weight, None, weight.spec, "simt").numel() == 0
        )
        dw = op.linear_bank_grad(y[:0], x[:0], None, weight.spec, torch.float32, "simt")
        assert dw.equal(torch.zeros_like(weight.bank.weight))
        deep = rpg.functional.linear(torch.randn(2, 3, 128)[:, ::2], weight)
        assert deep.shape == (2, 2, 300)
        low = rpg.functional.linear(x.bfloat16(), weight, bias)
    assert low.dtype == torch.bfloat16
    assert (low.float() - y - bias).abs().max() < 0.1


def test_refusals() -> None:
    x = torch.randn(2, 64)
    good = brute.unit_bank(64 * 512, window=64, laps=4).place((1000, 64))
    blocks = rpg.ParameterBank(64 * 512, 8).place((100, 64))
    with rpg.backend("simt"):
        with pytest.raises(RuntimeError, match="'simt' for linear, which cannot run: the CUDA ker"):
            rpg.functional.linear(x, blocks)
        with pytest.raises(RuntimeError, match="whole weights, not a part"):
            rpg.functional.linear(x, good.narrow(0, 1, 10))
        with pytest.raises(RuntimeError, match=r"not in torch\.float64"):
            op.linear(x.double(), good.bank.weight.double(), None, None, good.spec, "simt")
        with pytest.raises(RuntimeError, match="the CUDA kernels have no embedding"):
            rpg.functional.embedding(torch.tensor([1]), good)
        layer = rpg.nn.Linear(64, 100, bank=blocks.bank)
        with pytest.raises(RuntimeError, match="blocks of 32 or 64 elements, not of 8"):
            rpg.explain(layer, x)
        layer = rpg.nn.Linear(64, 90, bank=good.bank)
        assert rpg.explain(layer, x).backend == "simt"
        rpg.quantize(layer, "int8")
        for call in (layer, lambda x: rpg.explain(layer, x)):
            with pytest.raises(RuntimeError, match="read float banks, not one stored as int8"):
                call(x)
        rpg.dequantize(layer)
    with rpg.backend("cuda"), pytest.raises(RuntimeError, match="there the back end simt runs"):
        rpg.functional.linear(x, good)
    tiny = rules.Gpu("simt", 1, 8 * 1024)
    _, reason = rules.plan("linear", good.spec, torch.float32, 1, tiny, 0)
    assert reason.startswith("shared memory: got 8192 bytes")


def test_never_taken_on_cpu_tensors_unless_asked_for() -> None:
    layer = rpg.nn.Linear(64, 1024, bank=brute.unit_bank(64 * 512, window=64, laps=4))
    for batch in (1, 16, 64):
        assert rpg.explain(layer, torch.empty(batch, 64)).backend == "cpu"


def test_where_it_is_predicted_to_win() -> None:
    """As on an H200."""
    windows = brute.unit_bank(2_000_000, window=256, laps=4)
    weight = windows.place((4096, 4096))
    ring = rpg.ParameterBank(2_000_000).place((4096, 4096))
    small_ring = rpg.ParameterBank(45_000).place((14336, 4096))
    signs = rpg.ParameterBank(45_000, reflect="element").place((4096, 4096))

    def why(w: rpg.VirtualWeight, batch: int, dtype: torch.dtype = torch.bfloat16) -> str:
        bank = w.bank.weight.detach().to(dtype)
        return rules.why_slower("linear", w.spec, torch.bfloat16, batch, H200, bank)

    for batch in (1, 16, 32):
        assert why(weight, batch) == why(small_ring, batch) == ""
    assert why(weight, 64) == ""
    assert "batches of 1 to 32 of rings, not of 33" in why(small_ring, 33)
    assert why(weight, 32, torch.float32) == ""  # its copy is 4 MB
    assert why(ring, 16) == ""
    slower = "block by block, predicted to be slower"
    assert f"{slower} beyond batches of 16" in why(ring, 17)
    assert slower in why(signs, 1)
    given = ("linear", ring.spec, torch.float32, 1, H200, ring.bank.weight.detach())
    assert slower in rules.why_slower(*given)
    assert "in torch.bfloat16 are for batches of 1 to 64, not of 65" in why(weight, 65)
    assert "batches of 1 to 64, not of 0" in why(weight, 0)
    bank = windows.weight.detach()
    for dtype, most in ((torch.float16, 32), (torch.float32, 8)):
        for batch, wins in ((1, True), (most, True), (most + 1, False)):
            given = ("linear_input_grad", weight.spec, dtype, batch, H200, bank.to(dtype))
            assert (rules.why_slower(*given) == "") is wins
    with rpg.scratch_limit(1 << 20):
        assert why(weight, 1) == ""
        assert "wanted at least" in why(weight, 1, torch.float32)


class Stream:
    """What counters ask of one."""

    device_index, device = 0, CPU

    def __init__(self, number: int) -> None:
        self.cuda_stream = number

    def synchronize(self) -> None:
        pass


def test_counters_of_streams_and_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams share none, captured launches never any."""
    gpu, capturing, stream = torch.device("cuda", 0), [False], [Stream(1)]
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(counters, "_of_stream", {})
    monkeypatch.setattr(counters, "_reserved", {})
    monkeypatch.setattr(counters, "RESERVED", 100)
    monkeypatch.setattr(counters, "_lasting", lambda n, stream: zeros(n, dtype=torch.int32))
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))

    def addresses(count: int) -> set[int]:
        got = counters.zeros(count, gpu)
        assert got.numel() >= count
        assert not got.any()
        held.append(got)
        return {got.data_ptr() + 4 * i for i in range(count)}

    held: list[torch.Tensor] = []
    capturing[0] = True
    early = addresses(10)  # nothing was reserved yet
    capturing[0] = False
    one = addresses(10)
    assert addresses(10) == one
    assert one < addresses(600)
    stream[0] = Stream(2)
    other = addresses(600)
    capturing[0] = True
    captured = [addresses(40), addresses(40), addresses(40)]  # the last does not fit
    capturing[0] = False
    stream[0] = Stream(1)
    every = [early, addresses(600), other, *captured]
    assert len(set().union(*every)) == sum(map(len, every))


def test_a_failed_launch_leaves_no_counters_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its CTAs have counted is not taken for the next launch's."""
    gpu, stream, zeros = torch.device("cuda", 0), Stream(1), torch.zeros
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(counters, "_of_stream", {})
    monkeypatch.setattr(counters, "_reserved", {})
    monkeypatch.setattr(counters, "_lasting", lambda n, stream: zeros(n, dtype=torch.int32))
    problem = of_fill(WINDOW, "simt")
    p, made, forget = problem.weight.placement, counters.zeros, counters.forget
    ((_, plan),) = rules.check("linear", p.to_json(), CPU, torch.float32, 3, problem.bank)
    assert plan.counters > 0
    given: list[torch.Tensor] = []

    def of_gpu(count: int, device: torch.device) -> torch.Tensor:
        given.append(made(count, gpu))
        return given[-1]

    def failing(*arguments: object) -> None:
        given[-1][:2] = 1  # some CTAs arrived
        raise RuntimeError("launch a kernel: out of resources")

    monkeypatch.setattr(counters, "zeros", of_gpu)
    monkeypatch.setattr(counters, "forget", lambda device: forget(gpu))
    y = torch.empty(3, p.shape[0])
    operands = (problem.bank, problem.x, problem.bias, y)
    with monkeypatch.context() as broken:
        broken.setattr(rules, "kernels", lambda on: SimpleNamespace(linear=failing))
        with pytest.raises(RuntimeError, match="out of resources"):
            launch.run("linear", p, plan, 3, torch.float32, operands)
    launch.run("linear", p, plan, 3, torch.float32, operands)
    small.close(y, problem.exact()["linear"], torch.float32, torch.float32)
    assert not given[-1].any()
    kept = given[-1].data_ptr()
    launch.run("linear", p, plan, 3, torch.float32, operands)
    assert given[-1].data_ptr() == kept  # those of a launch that worked are used again
