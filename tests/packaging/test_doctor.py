"""The doctor: its report, that its self-tests find what is wrong, and that it never just ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brute_force as brute
import processes
import pytest
import torch
from doctor_tools import failing, run, run_json
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels import cli, doctor, native, settings
from rpg_kernels._tensors import DTYPES
from rpg_kernels.backends import dispatch, registry
from rpg_kernels.backends.call import OPERATORS, Call
from rpg_kernels.backends.reference import tiles
from rpg_kernels.doctor import law_check, report, selftest
from rpg_kernels.law.ring import LayerLaw
from rpg_kernels.law.unit import UnitLaw

GOLDEN = Path(__file__).parents[1] / "golden"


ON_CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not() or "built")


# The documented shape: part -> keys, of the part or of each of its lines.
KEYS = {
    "versions": "rpg_kernels commit sources law laws python torch torch_cuda packages",
    "machine": "system processor instruction_set cores threads",
    "devices": "cuda driver reason",
    "compilers": "c++ cmake nvcc",
    "build": "in_use why_not law compiler openmp instruction_sets instruction_set cuda "
    "cuda_architectures note advice gpus",
    "settings": "scratch_limit backend environment",
    "backends": "op device dtype backend reason",
    "self_tests": "test device dtype passed error bound message",
    "proved": "proving folder verdicts",
}


def implementation(op: str, backend: str) -> Callable[..., Tensor]:
    """The function of an operator in a back end."""
    return dispatch.implementation(Call(op, torch.empty(0), forced=backend))


def test_json_is_one_object_of_the_documented_shape(capsys: pytest.CaptureFixture[str]) -> None:
    status, record = run_json(capsys)
    assert status == 0
    assert record["format"] == 1
    assert record["ok"] is True
    assert record["failures"] == {}
    assert set(record) == {"format", "ok", "failures", *KEYS}
    for part, keys in KEYS.items():
        lines = record[part] if isinstance(record[part], list) else [record[part]]
        assert lines
        for line in lines:
            assert set(line) == set(keys.split()), part
    documented = doctor.__doc__ or ""
    for keys in KEYS.values():
        assert all(key in documented for key in keys.split())


def test_what_it_says_of_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    _, record = run_json(capsys)
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["rpg_kernels"] == rpg.__version__
    assert (record["versions"]["law"], record["versions"]["laws"]) == (1, [1, 3])
    assert record["versions"]["packages"]["numpy"] == pytest.importorskip("numpy").__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert len(record["devices"]["cuda"]) == torch.cuda.device_count()
    assert bool(record["devices"]["reason"]) is not torch.cuda.is_available()
    assert record["build"]["in_use"] is native.available()
    assert record["settings"]["scratch_limit"] == {"cpu": 4 << 20, "cuda": 16 << 20}
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    wanted = {(op, dtype) for op in OPERATORS for dtype in names}
    for part, key in (("backends", "op"), ("self_tests", "test")):
        found = [(t[key], t["dtype"]) for t in record[part] if t["device"] == "cpu" and t["dtype"]]
        assert set(found) == wanted
        assert len(found) == len(wanted)
    for line in record["backends"]:
        device, dtype = torch.device(line["device"]), getattr(torch, line["dtype"])
        call = Call(line["op"], torch.empty(0, dtype=dtype, device=device))
        chosen = dispatch.choose(call)
        assert line["backend"] == chosen.name
        head, _, others = line["reason"].removeprefix(chosen.summary).partition(" where ")
        assert line["reason"].startswith(chosen.summary)
        able = [n for n in ("cpu", "cuda") if not registry.find(n).unsupported(call)]
        assert head.removeprefix("; by ") == " or ".join(able)
        assert bool(others) is bool(able)
    laws = [test["test"] for test in record["self_tests"] if test["dtype"] is None]
    assert laws[:2] == ["law in PyTorch", "law in C++"][: 1 + native.available()]


def test_figures_are_within_their_bounds_and_are_not_all_zero(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, record = run_json(capsys)
    tests = [t for t in record["self_tests"] if t["dtype"] and t["device"] == "cpu"]
    assert all(0 <= test["error"] <= test["bound"] for test in tests)
    assert all(test["error"] > 0 for test in tests if test["dtype"] != "float64")
    limits = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}
    assert all(test["bound"] < limits[test["dtype"]] for test in tests)


def test_text_has_every_part_and_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys)
    assert status == 0
    for title in report.TITLES.values():
        assert f"{title}\n  " in out
    for op in OPERATORS:
        assert f"\n  {op} " in out
    assert "FAIL" not in out
    assert "None" not in out
    assert out.count("\n  packing laws         1, 3\n") == 1 + ("law" in native.build_info())
    tests = len(selftest.self_tests())
    assert out.endswith(f"ok: {tests} of {tests} self-tests pass\n")


def test_nothing_of_the_process_changes(capsys: pytest.CaptureFixture[str]) -> None:
    state, limit = torch.get_rng_state(), settings.scratch_bytes("cpu")
    run(capsys)
    assert torch.equal(torch.get_rng_state(), state)
    assert settings.scratch_bytes("cpu") == limit
    with torch.no_grad():
        assert run(capsys)[0] == 0
        assert not torch.is_grad_enabled()


def test_explicit_weights_are_those_of_the_brute_force_definition() -> None:
    for reflect in ("element", "vector", "none"):
        for shape in [*brute.MATRICES, *brute.KERNELS]:
            bank = brute.bank_of(640, granularity=16, reflect=reflect)
            bank.place((3, 5))
            weight = bank.place(shape)
            index, sign = selftest.explicit_map(weight.placement)
            wanted_index, wanted_sign = brute.index_and_sign(weight)
            assert torch.equal(index, wanted_index)
            assert torch.equal(sign, wanted_sign)


def test_law_values_are_the_committed_ones() -> None:
    committed_of = {
        kind: json.loads((GOLDEN / f"law{number}.json").read_text("utf-8"))["entries"]
        for number, kind in ((1, LayerLaw), (3, UnitLaw))
    }
    assert {type(golden.law) for golden in law_check.GOLDEN} == set(committed_of)
    for golden in law_check.GOLDEN:
        kind = type(golden.law)
        entry = committed_of[kind][golden.name]
        assert golden.law == kind(**entry["config"])
        committed = {
            tuple(point): (slot, tuple(words))
            for point, slot, words in zip(
                entry["points"], entry["slots"], entry["sign words"], strict=True
            )
        }
        for n, b, slot, words in golden.points:
            assert committed[n, b] == (slot, words)


def wrong(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, but for one element that is 5 % off."""

    def run(*arguments: Any, **more: Any) -> Tensor:
        result = function(*arguments, **more)
        if "total" not in more:  # which it was added to, and is read there
            result = result.clone()
        flat = result.view(-1)
        flat[flat.abs().argmax()] *= 1.05
        return result

    return run


@pytest.mark.parametrize("op", OPERATORS)
def test_an_operator_that_computes_something_else_fails(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The compiled kernels take rows that are looked up, if they are there.
    compiled = op.startswith("embedding") and native.available()
    function = implementation(op, "cpu" if compiled else "reference")
    monkeypatch.setattr(sys.modules[function.__module__], op, wrong(function))
    status, record = run_json(capsys)
    assert status == 1
    assert record["ok"] is False
    assert failing(record) == {op}
    bad = [t for t in record["self_tests"] if t["test"] == op and t["device"] == "cpu"]
    assert len(bad) == len(DTYPES)
    for test in bad:
        assert test["passed"] is False, test
        assert test["error"] > test["bound"]
        assert test["message"] == "the error exceeds the bound"


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (lambda y: torch.full_like(y, torch.nan), "the result holds values that are not finite"),
        (lambda y: y.clone().index_fill_(0, torch.tensor([3], device=y.device), torch.inf), ""),
        (lambda y: y.double().float() if y.dtype != torch.float32 else y.double(), "got torch."),
        (lambda y: y[:1], "wanted torch."),
    ],
)
def test_results_that_are_not_numbers_or_not_of_the_right_kind_fail(
    replace: Callable[[Tensor], Tensor],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    function = implementation("unpack", "reference")
    module = sys.modules[function.__module__]
    monkeypatch.setattr(module, "unpack", lambda *arguments: replace(function(*arguments)))
    status, record = run_json(capsys)  # not a number is no JSON
    assert status == 1
    bad = [t for t in record["self_tests"] if t["test"] == "unpack" and t["device"] == "cpu"]
    assert len(bad) == len(DTYPES)
    assert all(not test["passed"] and test["error"] is None for test in bad)
    assert all(message in test["message"] for test in bad)


def test_an_operator_that_raises_is_reported_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> Tensor:
        raise RuntimeError("the kernel did not start\nCompile with this and that")

    function = implementation("conv2d", "reference")
    monkeypatch.setattr(sys.modules[function.__module__], "conv2d", broken)
    status, out = run(capsys)
    assert status == 1
    # Gradients of a forward that does not run are not there either.
    for op in ("conv2d", "conv2d_input_grad", "conv2d_bank_grad"):
        line = f"  FAIL {op} on cpu in float32: RuntimeError: the kernel did not start\n"
        assert line in out
    assert "FAIL linear" not in out
    assert "Compile with" not in out
    tests = len(selftest.self_tests())
    bad = 12 * (1 + torch.cuda.device_count())
    assert out.endswith(f"NOT OK: {tests - bad} of {tests} self-tests pass, {bad} FAIL\n")


@needs_native
@pytest.mark.parametrize("name", ["unpack", "pack"])
def test_a_wrong_compiled_unpack_or_pack_fails(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = getattr(native, name)

    def off(law: LayerLaw, source: Tensor, result: Tensor, *rest: Any) -> None:
        true(law, source, result, *rest)
        result[result.abs().sum(1).argmax()].neg_()  # one block's sign

    monkeypatch.setattr(native, name, off)
    status, record = run_json(capsys)
    assert status == 1
    forward = {"linear", "linear_input_grad", "conv2d", "conv2d_input_grad", "embedding", "unpack"}
    assert failing(record) == (forward if name == "unpack" else set(OPERATORS) - forward)
    monkeypatch.setattr(native, "_enabled", False)  # then it is not used
    assert run(capsys, "--json")[0] == 0


@needs_native
@pytest.mark.parametrize("name", ["slots", "sign_words"])
def test_a_wrong_compiled_law_fails(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = getattr(native, name)
    monkeypatch.setattr(native, name, lambda *arguments: true(*arguments) ^ 1)
    status, record = run_json(capsys)
    assert status == 1
    assert failing(record) == {"law in C++"}
    (test,) = (test for test in record["self_tests"] if not test["passed"])
    assert name.replace("_", " ") + " of layer 'prime, 7': got [" in test["message"]
    assert (test["dtype"], test["error"], test["bound"]) == (None, None, None)


def test_a_wrong_law_in_pytorch_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = LayerLaw.slot

    def shifted(law: LayerLaw, n: Tensor, b: Tensor) -> Tensor:
        return (true(law, n, b) + 1) % law.slots

    monkeypatch.setattr(LayerLaw, "slot", shifted)
    status, record = run_json(capsys)
    assert status == 1
    assert "law in PyTorch" in failing(record)


def test_a_wrong_law_with_laps_in_pytorch_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = UnitLaw.slot
    monkeypatch.setattr(UnitLaw, "slot", lambda law, n, b: (true(law, n, b) + 8) % law.slots)
    status, record = run_json(capsys)
    assert status == 1
    assert failing(record) == {"law in PyTorch"}
    (test,) = (test for test in record["self_tests"] if not test["passed"])
    assert "slots of layer 'worked example': got [" in test["message"]


def test_wrong_signs_of_the_pytorch_path_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "_enabled", False)
    monkeypatch.setattr(tiles, "sign_bits", lambda element: 31 - element % 32)
    status, record = run_json(capsys)
    assert status == 1
    assert failing(record) == set(OPERATORS)  # by the cases that reflect elements


@ON_CPU_ONLY
def test_a_torch_that_cannot_do_it_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (operation,) = (o for o in selftest.OPERATIONS if "linear" in o.operators.values())
    true = operation.torchs

    def no_half(x: Tensor, w: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            raise NotImplementedError('"addmm" not implemented for half')
        return true(x, w)

    other = selftest.Operation(
        operation.weight, operation.x, no_half, operation.ours, operation.operators
    )
    monkeypatch.setattr(selftest, "OPERATIONS", (other,))
    status, record = run_json(capsys)
    assert status == 1
    bad = [test for test in record["self_tests"] if not test["passed"]]
    assert {(test["test"], test["dtype"]) for test in bad} == {
        (op, "float16") for op in operation.operators.values()
    }
    assert bad[0]["message"].startswith('torch itself: NotImplementedError: "addmm"')


@pytest.mark.parametrize("name", ["triton", "cuda", "simt"])
def test_a_forced_back_end_that_cannot_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(registry.find(name)), "unsupported", lambda self, call: "not today")
    with rpg.backend(name):
        status, record = run_json(capsys)
    assert status == 1
    assert record["settings"]["backend"] == name
    assert all(line["backend"] is None for line in record["backends"])
    assert f"backend: got '{name}' for linear on cpu" in record["backends"][0]["reason"]
    assert failing(record) >= set(OPERATORS)


@pytest.mark.parametrize("part", doctor.PARTS)
def test_a_part_that_raises_is_reported_as_failed(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise OSError("no such luck\nsecond line")

    monkeypatch.setitem(doctor.PARTS, part, broken)
    status, record = run_json(capsys)
    assert status == 1
    assert record["ok"] is False
    assert record["failures"] == {part: "OSError: no such luck"}
    assert record[part] is None
    assert all(record[other] is not None for other in doctor.PARTS if other != part)
    status, out = run(capsys)
    assert status == 1
    assert f"{report.TITLES[part]}\n  FAILED: OSError: no such luck\n" in out
    assert f"could not be examined: {report.TITLES[part]}\n" in out


def test_build_info_that_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("rpg_kernels was compiled for another machine")

    monkeypatch.setattr(native, "build_info", broken)
    status, record = run_json(capsys)
    assert status == 1
    assert record["failures"] == {
        "build": "RuntimeError: rpg_kernels was compiled for another machine"
    }
    assert not failing(record)


def test_a_process_of_its_own_prints_json_only_and_never_a_traceback() -> None:
    command = [sys.executable, "-m", "rpg_kernels.cli", "doctor", "--json"]
    env = {**os.environ, "RPG_KERNELS_ISA": "mmx", "RPG_KERNELS_BACKEND": "reference"}
    env.pop("RPG_KERNELS_NATIVE", None)
    done = processes.run(*command, env=env)
    record = json.loads(done.stdout)
    assert done.stderr == ""
    if "reason" not in native.build_info():  # it is compiled, but not for that
        assert done.returncode == 1
        assert set(record["failures"]) == {"build", "self_tests"}
        assert all("RPG_KERNELS_ISA: got mmx" in said for said in record["failures"].values())
    else:
        assert done.returncode == 0
    assert record["settings"]["environment"]["RPG_KERNELS_ISA"] == "mmx"


def test_a_terminal_without_unicode() -> None:
    command = [sys.executable, "-m", "rpg_kernels.cli", "doctor"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "RPG_KERNELS_TEXT": "Ŵ"}
    done = processes.run(*command, env=env)
    assert done.returncode == 0, done.stderr
    assert "RPG_KERNELS_TEXT     \\u0174" in done.stdout


def test_help_asks_for_bug_reports(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert "bug report" in capsys.readouterr().out


@pytest.mark.gpu
def test_every_cuda_device_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    status, record = run_json(capsys)
    assert status == 0, [test for test in record["self_tests"] if not test["passed"]]
    for index in range(torch.cuda.device_count()):
        tests = {t["test"] for t in record["self_tests"] if t["device"] == f"cuda:{index}"}
        assert tests >= {"law in PyTorch", *OPERATORS}
        assert ("law in CUDA" in tests) is bool(record["build"]["cuda"])
