"""The parts of a check on a GPU, each on the CPU or with stand-ins for what is missing here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import bench_tools as tools
import pytest
import torch

from benchmarks.harness import repeat
from benchmarks.harness.baselines import IMPLEMENTATIONS
from rpg_kernels import native
from tools.gpu_check import agree, machine, pool, programs, repeats

HAS_SIMT = native.available() and hasattr(native.module(), "simt")
needs_simt = pytest.mark.skipif(not HAS_SIMT, reason="needs a development build, `make test`")


def test_a_module_that_serves_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "module_lacks", lambda: "")
    monkeypatch.setattr(machine, "module_is", lambda: "g++ 13, CUDA 13.0 for 90a-real")
    monkeypatch.setattr(machine.subprocess, "run", None)  # it would be called
    assert machine.native_module() == (
        0, "a module that was compiled before serves: g++ 13, CUDA 13.0 for 90a-real",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "after", "status", "said"),
    [
        ("print(sys.argv[1:])", "", 0, "built: it"),
        ("sys.exit('error: rpg-kernels: pybind11 is missing')", "", 1,
         "the build failed: error: rpg-kernels: pybind11 is missing"),
        ("", "the native module has no CUDA kernels", 1,
         "built, but the native module has no CUDA kernels"),
    ],
)  # fmt: skip
def test_building(
    script: str, after: str, status: int, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "setup.py").write_text(f"import sys; {script}")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    lacks = iter(["the native module was not built", after])
    monkeypatch.setattr(machine, "module_lacks", lambda: next(lacks))
    monkeypatch.setattr(machine, "module_is", lambda: "it")
    monkeypatch.setattr(programs, "compiler", lambda: None)
    assert machine.native_module() == (status, said)
    output = capsys.readouterr().out
    assert "building, as the native module was not built" in output
    assert "no nvcc: the module will have no CUDA kernels" in output
    assert ("['build_ext', '--inplace']" in output) is (script == "print(sys.argv[1:])")


def test_a_version_without_sources_has_nothing_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.build() == 75
    assert "no csrc" in capsys.readouterr().out


def test_a_module_is_asked_in_another_process() -> None:
    """Here there is no GPU, so a module with CUDA kernels cannot be asked about one."""
    assert machine.module_lacks()
    assert machine._asked("import os; os.abort()").startswith("the native module cannot be asked")
    assert machine._asked("answer = 'a  b'") == "a b"


def fake_nvcc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler whose programs print what they were called with; it counts its calls."""
    nvcc = folder / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {folder}/calls\n'
        'case "$*" in *reduce.cu*) echo no such thing >&2; exit 1;; esac\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'printf "#!/bin/sh\\necho ran $*\\n" > "$2"; chmod +x "$2"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setattr(programs, "compiler", lambda: str(nvcc))
    monkeypatch.setattr(programs, "architecture", lambda: "-arch=sm_90a")
    monkeypatch.setattr(programs, "COMPILED", folder / "compiled")
    return folder / "calls"


def test_microbenchmarks_are_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = fake_nvcc(tmp_path, monkeypatch)
    machine.compile_ahead()
    assert "reduce.cu does not compile" in capfd.readouterr().out
    assert programs.micro() == 1  # one does not compile
    assert capfd.readouterr().out.count("ran") == 2
    made = [line.split("/")[-1] for line in calls.read_text().splitlines()]
    assert sorted(made) == ["gather.cu", "reduce.cu", "reduce.cu", "shared.cu"]
    assert (
        programs.compiled("-arch=sm_100")["gather"] != programs.compiled("-arch=sm_90a")["gather"]
    )


def test_without_nvcc_there_are_no_microbenchmarks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "compiler", lambda: None)
    assert programs.micro() == 75
    assert capsys.readouterr().out == "no nvcc on this machine\n"
    machine.compile_ahead()


def test_without_a_sanitizer_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs.shutil, "which", lambda name: None)
    monkeypatch.setattr(programs, "_beside_nvcc", lambda name: None)
    assert programs.sanitizer(tmp_path, 2) == 75
    assert capsys.readouterr().out == "no compute-sanitizer on this machine\n"


def test_sanitizers_look_at_our_cuda_kernels_first_and_at_memory_before_races() -> None:
    commands = programs.commands([Path("/x/gather-1a"), Path("/x/shared-2b")])
    named = [(tool, name) for tool, name, _ in commands]
    assert named[:4] == [
        ("memcheck", "cuda repeat.windows"), ("memcheck", "cuda repeat.linear"),
        ("memcheck", "cuda repeat.one_of_windows"), ("memcheck", "gather"),
    ]  # fmt: skip
    half = len(named) // 2
    assert [name for _, name in named[:half]] == [name for _, name in named[half:]]
    assert {tool for tool, _ in named[half:]} == {"racecheck"}
    known = {case.layer.names[0] for case in repeat.CASES}
    assert {case for _, case in programs.OURS} <= known


def test_verdicts_of_sanitizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for compute-sanitizer that finds something in one program."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n"
        'case "$*" in *bad*) echo "========= ERROR SUMMARY: 1 error"; exit 9;;'
        " *silent*) exit 0;; *none*) echo none of these runs; exit 75;;"
        ' *) echo "========= ERROR SUMMARY: caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(programs.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(programs, "compiler", lambda: None)
    names = ("good", "bad", "silent", "none")
    commands = [("memcheck", name, [name]) for name in names]
    monkeypatch.setattr(programs, "commands", lambda made: commands)
    assert programs.sanitizer(tmp_path, 2) == 1
    found = {r["item"]: r for r in pool.records(tmp_path / "sanitizer.jsonl") if "item" in r}
    assert {name: found[f"memcheck of {name}"]["outcome"] for name in names} == {
        "good": "clean", "bad": "findings", "silent": "no verdict", "none": "does not apply",
    }  # fmt: skip
    assert found["memcheck of good"]["message"] == "ERROR SUMMARY: caching off: 1"
    assert found["memcheck of silent"]["message"] == "no verdict, exit status 0"
    assert "note: no nvcc" in capsys.readouterr().out


def test_everything_is_asked_of_every_back_end() -> None:
    every = [item.split() for item in agree.every()]
    assert every[0][0] == "cuda"
    from rpg_kernels.backends.call import OPERATORS

    for name in ("cuda", "triton"):
        assert {op for backend, op, *_ in every if backend == name} == set(OPERATORS)
    assert {dtype for _, _, dtype, *_ in every} == {"bf16", "fp32", "fp16", "amp"}


@pytest.mark.parametrize("operator", sorted({i.split()[1] for i in agree.every()}))
def test_the_reference_agrees(operator: str) -> None:
    for item in agree.every():
        backend, op, *_ = item.split()
        if (backend, op) == ("reference", operator):
            record = agree.answer(item, "cpu")
            assert record["outcome"] == "agrees", (item, record)


@needs_simt
def test_the_cuda_sources_agree_where_they_apply() -> None:
    found = {}
    for item in agree.every():
        backend, *rest = item.split()
        if backend == "cuda" and rest[1] == "bf16":
            found[tuple(rest)] = agree.answer(" ".join(["simt", *rest]), "cpu")
    applies = {key[0] for key, record in found.items() if record["outcome"] == "agrees"}
    assert applies == {"linear", "linear_input_grad", "linear_bank_grad", "unpack", "pack"}
    assert {record["outcome"] for record in found.values()} == {"agrees", "does not apply"}
    assert "blocks of 32 or 64" in found["linear", "bf16", "linear", "5"]["message"]


def test_what_is_wrong_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    real = agree._call

    def last_bit(*arguments: Any) -> Any:
        (x, *operands), quantity = real(*arguments)
        return (x * 1.01, *operands), quantity

    monkeypatch.setattr(agree, "_call", last_bit)
    item = "reference linear fp32 linear 0"
    record = agree.answer(item, "cpu")
    assert record["outcome"] == "disagrees"
    assert record["setting"] == "5K g64 vector fp32 w64x2"


@pytest.mark.parametrize(
    ("differs", "outcome"),
    [(None, "same"), (True, "differs"), (False, "same"), ("raises", "raised")],
)
def test_runs_that_differ(differs: Any, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(case: Any, backend: str, device: Any, runs: int) -> dict[str, int]:
        if differs == "raises":
            raise RuntimeError("no")
        on = torch.are_deterministic_algorithms_enabled()
        return {"output": int(on is differs), "gradients": 0}

    monkeypatch.setattr(repeat, "compare", compare)
    item = "reference repeat.linear fp32"
    record = repeats.answer(item, "cpu", runs=2)
    assert record["outcome"] == outcome
    assert ("as it may" in record["message"]) is (differs is False)
    refused = "cuda repeat.linear fp32"
    assert repeats.answer(refused, "cpu")["outcome"] == "does not apply"


def test_the_cuda_kernels_are_compared_first() -> None:
    every = [item.split() for item in repeats.every()]
    assert every[0][:2] == ["cuda", "repeat.windows"]
    assert {name for name, *_ in every} == {"cuda", "triton", "reference"}


def test_repeated_calls_are_compared_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(build: Any) -> dict[str, int]:
        made = tools.implementation("rpg-reference", build)
        monkeypatch.setitem(IMPLEMENTATIONS, "rpg-reference", made)
        return repeat.compare(tools.case(), "reference", tools.CPU, runs=4)

    right = IMPLEMENTATIONS["rpg-reference"].build
    assert counts(right) == {"output": 0, "gradients": 0}
    calls = iter(range(100))
    last_bit = tools.changed(lambda y: y * (1 + 2e-7 * (next(calls) % 2)))
    assert counts(last_bit)["output"] == 2
    gradients = tools.changed(lambda y: y.detach() + (y - y.detach()) * (1 + next(calls) % 2))
    assert counts(gradients)["gradients"] > 0


def test_differences_fail_in_deterministic_mode_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {name for name, _ in repeat.chosen(tools.CPU)} >= {"reference"}
    with pytest.raises(ValueError, match="backend: got 'cublas', wanted one of "):
        repeat.chosen(tools.CPU, ["cublas"])
    with pytest.raises(ValueError, match="dtype: got 'int8', wanted one of "):
        repeat.chosen(tools.CPU, dtypes=["int8"])
    with pytest.raises(ValueError, match="case: got 'x', wanted one of "):
        repeat.every(cases=["x"])
    differs = {"mode": False}

    def compare(case: Any, backend: str, device: Any, runs: int) -> dict[str, int]:
        on = torch.are_deterministic_algorithms_enabled()
        return {"output": int(on is differs["mode"]), "gradients": 0}

    monkeypatch.setattr(repeat, "compare", compare)
    options = ["--backend", "reference", "--dtype", "fp32", "--runs", "2"]
    assert repeat.main(options) == 0
    differs["mode"] = True
    assert repeat.main(options) == 1
    assert not torch.are_deterministic_algorithms_enabled()
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(found) == 2 * 2 * len(repeat.CASES)
    assert repeat.main(["--backend", "cuda"]) == 75
    assert "none of these cases runs" in capsys.readouterr().out


def test_a_bound_that_torch_itself_makes_wide_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    real = agree._call

    def call(*arguments: Any) -> Any:
        operands, quantity = real(*arguments)
        return operands, dataclasses.replace(quantity, allowed=1e3)

    monkeypatch.setattr(agree, "_call", call)
    record = agree.answer("reference linear fp32 linear 0", "cpu")
    assert record["outcome"] == "no measure"
    assert record["outcome"] not in agree.GOOD
