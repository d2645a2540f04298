"""The check on a GPU, as far as it can be tested without one: parts, times, what is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_tools as tools
import processes
import pytest
import torch

from tools.gpu_check import __main__ as command
from tools.gpu_check import plan, running, summaries
from tools.gpu_check.running import Part, run_parts, share

ROOT = Path(__file__).resolve().parents[2]
LONG = 600.0  # seconds that nothing here takes
HANG = "import time; time.sleep(900)"


def part(name: str, code: str, budget: float = 20.0, summarise: Any = None, **options: Any) -> Part:
    words = (sys.executable, "-c", code)
    return Part(name, words, budget, summarise or summaries.said, **options)


def soon(seconds: float = LONG) -> float:
    return time.monotonic() + seconds


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_each_part_survives_the_failure_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "extra_module.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # kept behind the checkout
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.jsonl").write_text('{"item": "a", "outcome": "passed"}\n')
    old = summaries.of_file("old.jsonl", ["passed"])
    report = run_parts(
        [
            part("good", "import rpg_kernels, extra_module; print('fine')"),
            part("crash", "import os; print('last words', flush=True); os.abort()"),
            part("exit", "raise SystemExit(3)"),
            part("none", "print('no kernels'); raise SystemExit(75)"),
            part("broken", "print('no json')", summarise=summaries.machine),
            part("old", "print('nothing new')", summarise=old, writes=("old.jsonl",)),
            part("after", "print('still here')"),
        ],
        out,
        soon(),
    )
    statuses = {name: done["status"] for name, done in report.items()}
    assert statuses == {
        "good": "passed", "crash": "failed", "exit": "failed", "none": "nothing to do",
        "broken": "failed", "old": "passed", "after": "passed",
    }  # fmt: skip
    assert report["exit"]["summary"] == "printed nothing"
    assert report["broken"]["summary"] == "no result: no json"
    assert report["old"]["summary"] == "nothing new"  # not an earlier check's file
    assert json.loads((out / "gpu_check.json").read_text()) == report
    log = (out / "log.txt").read_text()
    assert "==== good" in log
    assert "last words" in log
    lines = summaries.table(report).splitlines()
    assert len(lines) == 7
    assert re.fullmatch(r"after +passed +\d+\.\d s  still here", lines[-1])


@pytest.fixture(params=["heeded", "ignored"])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """As in a terminal, and as behind ``nohup ... &``."""
    handler = signal.default_int_handler if request.param == "heeded" else signal.SIG_IGN
    kept = signal.signal(signal.SIGINT, handler)
    yield
    signal.signal(signal.SIGINT, kept)


@pytest.mark.usefixtures("interrupts")
def test_time_is_over_but_what_was_found_out_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes until it is interrupted; a child in a group of its own does not outlive it."""
    path = tmp_path / "part.jsonl"
    code = (
        "import json, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {HANG!r}], process_group=0)\n"
        f"file = open({str(path)!r}, 'w')\n"
        "def write(**record): print(json.dumps(record), file=file, flush=True)\n"
        "try:\n"
        "    write(planned=5)\n"
        "    write(item='a', outcome='passed', pid=child.pid)\n"
        "    time.sleep(900)\n"
        "except KeyboardInterrupt:\n"
        "    write(item='b', outcome='interrupted')\n"
    )

    def time_is_over(process: Any, seconds: float, stopping: Any) -> None:
        while not path.exists() or path.read_text().count("\n") < 2:
            time.sleep(0.01)

    monkeypatch.setattr(running, "_wait", time_is_over)
    monkeypatch.setattr(running, "GRACE", LONG)  # it ends by itself, however busy the machine is
    summarise = summaries.of_file("part.jsonl", ["passed"])
    report = run_parts([part("hang", code, LONG, summarise)], tmp_path, soon())
    assert report["hang"]["status"] == "timed out"
    assert report["hang"]["summary"].startswith("1 passed, 1 interrupted, 3 not run; b: ")
    (first,) = (r for r in map(json.loads, path.open()) if "pid" in r)
    assert not alive(first["pid"])


def test_what_does_not_heed_an_interrupt_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "GRACE", 0.2)
    monkeypatch.setattr(running, "LEAST", 0.5)
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {HANG}"
    report = run_parts([part("deaf", code), part("after", "")], tmp_path, soon(0.5))
    assert report["deaf"]["status"] == "timed out"
    assert report["deaf"]["code"] in (-signal.SIGKILL, -signal.SIGINT)  # before it was deaf


def test_budgets_go_on_to_later_parts() -> None:
    parts = [part(str(b), "", float(b)) for b in (10, 20, 30)]
    assert share(parts, 60.0) == 10.0
    assert share(parts[1:], 55.0) == 25.0  # 5 seconds were left
    assert share(parts[2:], 40.0) == 40.0
    assert share(parts, 30.0) == 5.0  # all become smaller
    assert share(parts[1:], -3.0) == running.LEAST


def test_nothing_runs_when_the_time_of_all_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "LEAST", 0.1)
    report = run_parts([part(f"sleep{i}", HANG, 1.0) for i in range(3)], tmp_path, soon(1.2))
    assert {done["status"] for done in report.values()} == {"timed out"}
    given = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert 0.1 <= given[0] <= 0.4
    assert max(given) <= 1.2


@pytest.mark.parametrize("longer", [False, True])
def test_a_check_fits_one_command_and_what_comes_back(longer: bool) -> None:
    limit = {False: 420, True: 180}[longer]
    assert limit == (plan.LONGER_LIMIT if longer else plan.LIMIT)
    parts = (plan.longer_parts if longer else plan.parts)(Path("/x"), jobs=16)
    assert sum(p.budget for p in parts) + plan.RESERVE <= limit
    files = [running.REPORT, running.LOG, *(name for p in parts for name in p.writes)]
    assert len(set(files)) == len(files) <= 8
    assert running.LOG_BYTES < 16 << 20
    names = [p.name for p in parts]
    assert names[:2] == ["machine", "build"]
    if not longer:
        assert names[2:] == ["agree", "tests", "repeat", "compile", "bench", "micro", "sanitizer"]
    for p in parts:
        assert processes.run(*p.command[:3], "--help", cwd=ROOT).returncode == 0, p.name


def test_a_log_is_cut_in_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "LOG_BYTES", 4000)
    code = "print('begins'); print('é' * 50_000); print('ends')"
    run_parts([part("much", code), part("more", code)], tmp_path, soon())
    log = (tmp_path / "log.txt").read_text()
    assert len(log.encode()) < 5000
    assert log.count("ends\n") == 2
    assert "bytes left out" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_check_writes_what_there_is(tmp_path: Path, number: int) -> None:
    code = (
        "import signal, sys, time, threading, os\n"
        "from pathlib import Path\n"
        "from tools.gpu_check import __main__ as command, plan\n"
        "from tools.gpu_check.running import Part\n"
        "from tools.gpu_check.summaries import said\n"
        "def parts(out, jobs):\n"
        "    def part(name, code): return Part(name, (sys.executable, '-c', code), 9.0, said)\n"
        f"    return [part('a', 'print(1)'), part('b', {HANG!r}), part('c', 'print(3)')]\n"
        "plan.parts = parts\n"
        "command.gpu_missing = lambda: ''\n"
        "sys.exit(command.main(['--out', sys.argv[1]]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("b "):
            break
    process.send_signal(number)
    output = process.stdout.read()
    assert process.wait() == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [done["status"] for done in report.values()] == ["passed", "interrupted"]
    assert re.search(r"^b +interrupted", output, re.M)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = processes.run(sys.executable, "-m", "tools.gpu_check", "--out", out, cwd=ROOT)
    assert done.returncode == 2
    assert re.fullmatch(
        r"gpu-check: this torch sees no CUDA device \(.+\); it needs one, and nothing was "
        r"checked\n",
        done.stdout,
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parts", "micro", "mirco"], "got part 'mirco', wanted one of machine, build, agree"),
        (["--longer", "--parts", "agree"], "got part 'agree', wanted one of machine, build, comp"),
        (["--limit", "0"], "limit: got 0, wanted a number of seconds above 0"),
        (["--limit", "nan"], "limit: got nan, wanted a number of seconds above 0"),
        (["--jobs", "0"], "jobs: got 0, wanted a number of processes from 1"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "gpu_missing", lambda: "")
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        assert command.main(["--out", str(tmp_path / name)]) == 2
        assert f"out: cannot write to {tmp_path / name}: " in capsys.readouterr().out


def test_a_python_without_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_ASK", "import no_such_module")
    assert command.gpu_missing() == f"{sys.executable} cannot import torch"


def test_a_driver_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "The NVIDIA driver on your system is too old (found version 11000)."
    (tmp_path / "torch.py").write_text(
        "class backends:\n    class cuda:\n        is_built = lambda: True\n"
        f"class cuda:\n    def init(): raise RuntimeError({said!r} + chr(10) + 'more')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert command.gpu_missing() == f"this torch sees no CUDA device ({said})"


def test_the_exit_status_is_that_of_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "gpu_missing", lambda: "")
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    good, nothing = part("good", ""), part("nothing", "raise SystemExit(75)")
    for parts, status in (([good, nothing], 0), ([good, part("bad", "1 / 0")], 1)):
        monkeypatch.setattr(plan, "parts", lambda out, jobs, parts=parts: parts)
        assert command.main(["--out", str(tmp_path)]) == status
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_what_is_not_good_is_named_with_its_reason() -> None:
    found: list[dict[str, Any]] = [
        {"item": "tests/a.py", "outcome": "skipped", "message": "missing package PIL"},
        {"planned": 4},
        {"item": "a", "outcome": "passed"},
        {"item": "b", "outcome": "failed", "message": "wrong\nby 3"},
        {"item": "c", "outcome": "skipped", "message": "missing package PIL"},
        {"left": 1},
    ]
    line, data = summaries.outcomes(found, ["passed", "skipped"])
    assert line == "2 skipped, 1 passed, 1 failed, 1 not run; b: wrong by 3"
    assert data["bad"] == [{"item": "b", "outcome": "failed", "message": "wrong by 3"}]
    assert data["skipped"] == {"missing package PIL": 2}


def test_the_benchmark_in_short(tmp_path: Path) -> None:
    assert summaries.benchmark("so far", tmp_path) == ("so far", None)
    tools.run("dense", "rpg-reference", "rz_linear", out=tmp_path / "bench.json")
    summary, data = summaries.benchmark('{"outcome": "crashed", "message": "m"}', tmp_path)
    assert summary == "2 ok, 1 does not apply; crashed: m"
    assert [line["name"] for line in data] == [
        f"tiny.linear/3 200 g8 element {name} {kind}"
        for name in ("dense", "rpg-reference")
        for kind in ("forward", "full")
    ]
    report = {"bench": {"status": "passed", "seconds": 1.0, "summary": summary, "data": data}}
    assert len(summaries.table(report).splitlines()) == 5


def test_machine_in_short(tmp_path: Path) -> None:
    e = {"device_name": "G", "torch": "2", "triton": "3", "cuda": "13"}
    line = json.dumps({"environment": e, "nvidia_smi": ""})
    assert summaries.machine(f"x\n{line}", tmp_path)[0] == "G, torch 2, triton 3, CUDA 13"
    figure = {"name": "gather 128 B from 4 MB", "value": 1.0, "unit": "TB/s"}
    assert summaries.figures(json.dumps(figure), tmp_path) == ("1 figures", [figure])
