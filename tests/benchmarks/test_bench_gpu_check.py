"""The check on a GPU, as far as it can be tested without one: orchestration, parsing, sources."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_tools as tools
import pytest
import torch

from benchmarks.harness import repeat
from benchmarks.harness.baselines import IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "benchmarks" / "gpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check, gpu_parts = load("gpu_check"), load("gpu_parts")


def part(name: str, code: str, budget: float = 20.0, summarise: Any = None, **options: Any) -> Any:
    command = (sys.executable, "-c", code)
    return check.Part(name, command, budget, summarise or check.last_line, **options)


def test_each_part_survives_the_failure_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "extra_module.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # kept behind the checkout
    pids = tmp_path / "pids"
    # A part that hangs, with a child that would outlive it.
    hang = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(900)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "print('so far', flush=True)\n"
        "time.sleep(900)"
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "tests.xml").write_text("<testsuites/>")
    report = check.run_parts(
        [
            part("good", "import rpg_kernels, extra_module; print('fine')"),
            part("crash", "import os; print('last words', flush=True); os.abort()"),
            part("exit", "raise SystemExit(3)"),
            part("hang", hang, budget=6.0),
            part("none", "print('no kernels'); raise SystemExit(75)"),
            part("five", "raise SystemExit(5)", nothing=5),
            part("broken", "print('no json')", summarise=check.last_json),
            part("old", "", summarise=check.tests),  # must not read an earlier check's file
            part("after", "print('still here')"),
        ],
        out,
    )
    statuses = {name: done["status"] for name, done in report.items()}
    assert statuses == {
        "good": "passed", "crash": "failed", "exit": "failed", "hang": "timed out",
        "none": "nothing to do", "five": "nothing to do", "broken": "failed", "old": "failed",
        "after": "passed",
    }  # fmt: skip
    assert report["crash"]["summary"] == "last words"
    assert report["hang"]["summary"] == "so far"
    assert report["exit"]["summary"] == "printed nothing"
    assert report["broken"]["summary"] == "no result: no json"
    assert report["old"]["summary"] == "no result: printed nothing"
    for pid in map(int, pids.read_text().split()):
        assert not alive(pid)
    assert json.loads((out / "gpu_check.json").read_text()) == report
    log = (out / "log.txt").read_text()
    assert "==== good" in log
    assert "still here" in log
    lines = check.table(report).splitlines()
    assert len(lines) == 9
    assert re.fullmatch(r"hang +timed out +\d\.\d s  so far", lines[3])


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_limit_holds_for_all_parts_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "LEAST", 0.2)
    parts = [part(f"sleep{i}", "import time; time.sleep(900)", budget=0.6) for i in range(3)]
    report = check.run_parts(parts, tmp_path, limit=1.0)
    assert {done["status"] for done in report.values()} == {"timed out"}
    # 0.6 of its own; of the 0.4 that are left all but what the last one keeps; that.
    given = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert given == pytest.approx([0.6, 0.2, 0.2], abs=0.1)


def test_budgets_fit_a_call_of_nine_minutes() -> None:
    assert check.LIMIT + 20 <= 9 * 60
    assert len(check.parts(Path("/x"))) * check.LEAST < check.LIMIT
    files = {"gpu_check.json", "log.txt", "tests.xml", "bench.json"}
    commands = " ".join(word for p in check.parts(Path("/x")) for word in p.command)
    assert {Path(word).name for word in re.findall(r"/x/\S+", commands)} < files


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == (
        "gpu-check: this torch sees no CUDA device; it needs one, and nothing was checked\n"
    )
    assert not (tmp_path / "out").exists()


def test_unknown_parts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--out", str(tmp_path), "--parts", "micro", "mirco"]) == 2
    assert "got part 'mirco', wanted one of machine, build, tests" in capsys.readouterr().out


def test_counting_tests(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="x"/>'
        '<testcase classname="a" name="y"><failure message="m">t</failure></testcase>'
        '<testcase classname="b" name="z"><error/></testcase>'
        '<testcase classname="b" name="s"><skipped/></testcase></testsuite></testsuites>'
    )
    summary, data = check.tests("", tmp_path)
    assert summary == "1 passed, 2 failed, 1 skipped, a.y, b.z"
    assert data == {"passed": 1, "failed": ["a.y", "b.z"]}


def test_summaries_of_json_lines(tmp_path: Path) -> None:
    def record(**values: Any) -> str:
        fields = {"deterministic": True, "output": 0, "gradients": 0}
        return json.dumps(fields | values)

    output = "\n".join(
        [
            "noise", record(), record(deterministic=False, gradients=3),
            record(gradients=1), record(deterministic=False, error="E: x"), '{"cut off',
        ]
    )  # fmt: skip
    summary, data = check.repeat(output, tmp_path)
    assert summary == "of 2 cases 1 differ in deterministic mode, 1 otherwise, 1 raised: E: x"
    assert len(data) == 4

    lines = [
        {"tool": "memcheck", "program": "gather", "clean": True, "verdict": "0 errors"},
        {"tool": "racecheck", "program": "gather", "clean": False, "verdict": "2 hazards"},
    ]
    text = "\n".join([*map(json.dumps, lines), "note: no kernels"])
    assert check.findings(text, tmp_path)[0] == (
        "1 runs without findings, 1 with; racecheck of gather: 2 hazards; note: no kernels"
    )
    figure = {"name": "gather 128 B from 4 MB", "value": 1.0, "unit": "TB/s"}
    summary, data = check.figures(json.dumps(figure), tmp_path)
    assert (summary, data) == ("1 figures", [figure])


def test_the_benchmark_in_short(tmp_path: Path) -> None:
    tools.run("dense", "rpg-reference", "rz_linear", out=tmp_path / "bench.json")
    summary, data = check.benchmark("", tmp_path)
    assert summary == "2 ok, 1 skipped"
    assert [line["name"] for line in data] == [
        "tiny.linear/3 200 g8 element dense",
        "tiny.linear/3 200 g8 element rpg-reference",
    ]
    report = {"bench": {"status": "passed", "seconds": 1.0, "summary": summary, "data": data}}
    assert len(check.table(report).splitlines()) == 3


def test_machine_in_short(tmp_path: Path) -> None:
    e = {"device_name": "G", "torch": "2", "triton": "3", "cuda": "13"}
    line = json.dumps({"environment": e, "nvidia_smi": ""})
    assert check.last_json(f"x\n{line}", tmp_path)[0] == "G, torch 2, triton 3, CUDA 13"


def test_sanitizer_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stand-in for compute-sanitizer that finds something in one program."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n"
        'case "$*" in *bad*) echo "========= ERROR SUMMARY: 1 error"; exit 9;;'
        ' *silent*) exit 0;; *) echo "========= ERROR SUMMARY: 0 errors";; esac\n'
    )
    tool.chmod(0o755)
    clean = [
        gpu_parts.sanitized(str(tool), "memcheck", [name]) for name in ("good", "bad", "silent")
    ]
    assert clean == [True, False, False]
    records = check.json_lines(capsys.readouterr().out)
    assert [r["verdict"] for r in records] == [
        "ERROR SUMMARY: 0 errors", "ERROR SUMMARY: 1 error", "no verdict, exit status 0",
    ]  # fmt: skip


def test_memory_is_not_cached_under_a_sanitizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inside a block of PyTorch's cache, memcheck would find nothing out of bounds."""
    tool = tmp_path / "tool"
    tool.write_text('#!/bin/sh\necho "SUMMARY: caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\n')
    tool.chmod(0o755)
    assert gpu_parts.sanitized(str(tool), "memcheck", ["program"])
    (record,) = check.json_lines(capsys.readouterr().out)
    assert record["verdict"] == "SUMMARY: caching off: 1"


def test_without_nvcc_only_the_microbenchmarks_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, str]] = []

    def sanitized(tool: str, name: str, command: Any) -> bool:
        ran.append((name, command[-1]))
        return True

    def which(name: str) -> str | None:
        return "/bin/true" if name == "compute-sanitizer" else None

    monkeypatch.setattr(gpu_parts.shutil, "which", which)
    monkeypatch.setattr(gpu_parts, "architecture", lambda: "")
    monkeypatch.setattr(gpu_parts, "sanitized", sanitized)
    monkeypatch.setattr(repeat, "chosen", lambda device, names: [("triton", None)])
    assert gpu_parts.compiler() is None
    assert gpu_parts.micro() == 75
    assert gpu_parts.sanitizer() == 0
    assert ran == [("memcheck", "triton"), ("racecheck", "triton")]
    output = capsys.readouterr().out
    assert "no nvcc on this machine\n" in output
    assert "note: no nvcc, the microbenchmarks are left out" in output


def test_a_test_file_that_cannot_be_imported_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    (tmp_path / "tests" / "test_a.py").write_text("import not_installed_here\n")
    (tmp_path / "tests" / "test_b.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n"
    )
    (made,) = [p for p in check.parts(tmp_path) if p.name == "tests"]
    done = subprocess.run(made.command, cwd=tmp_path, capture_output=True, text=True)
    summary, data = check.tests(done.stdout, tmp_path)
    assert done.returncode == 1
    assert data["passed"] == 1
    assert len(data["failed"]) == 1
    assert "test_a" in summary


def test_build_says_when_there_is_nothing_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    assert gpu_parts.build() == 75
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("import sys; print(sys.argv[1:]); sys.exit(4)")
    assert gpu_parts.build() == 4
    assert "['build_ext', '--inplace']" in capfd.readouterr().out


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
    records = check.json_lines(capsys.readouterr().out)
    assert len(records) == 2 * 2 * len(repeat.CASES)


INSTRUCTIONS = {
    "gather": ("ld.global.nc.v4.u32",),
    "reduce": ("red.global.add.v4.f32", "cp.reduce.async.bulk.global.shared::cta"),
    "shared": ("ld.shared.v4.u32",),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each program with its PTX, the compiler's words and the program itself."""
    folder = tmp_path_factory.mktemp("gpu")
    options = ["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-keep"]
    running = []
    for name in INSTRUCTIONS:
        (folder / name).mkdir()
        command = ["nvcc", *options, "-Werror=all-warnings", "-o", "program"]
        with (folder / name / "log").open("w") as log:
            running.append(
                subprocess.Popen(
                    [*command, str(SOURCES / f"{name}.cu")], cwd=folder / name, stderr=log
                )
            )
    for process in running:
        process.wait()
    return folder


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("program", gpu_parts.PROGRAMS)
def test_microbenchmarks_compile_for_sm_90a_with_what_they_measure(
    program: str, compiled: Path
) -> None:
    folder = compiled / program
    log = (folder / "log").read_text()
    assert (folder / "program").exists(), log
    spills = re.findall(r"(\d+) bytes spill stores", log)
    assert spills
    assert set(spills) == {"0"}
    (ptx,) = folder.glob("*.ptx")
    text = ptx.read_text()
    for instruction in INSTRUCTIONS[program]:
        assert instruction in text
    if not torch.cuda.is_available():
        ran = subprocess.run([str(folder / "program")], capture_output=True, text=True)
        assert ran.returncode == 1  # it says what is missing instead of printing figures
        assert "common.cuh" in ran.stderr
        assert not ran.stdout


def test_every_cuda_file_is_run() -> None:
    assert {path.stem for path in SOURCES.glob("*.cu")} == set(gpu_parts.PROGRAMS)
    assert os.access(ROOT / "tools" / "gpu_check.py", os.R_OK)
