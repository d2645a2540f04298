"""The stand-in CUDA runtime as far as it needs no CUDA build of torch: its library, its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.cuda_stand_in import __main__ as command
from tools.cuda_stand_in import library

# Asked in a process of its own, since a library of that name is for good. Prints what calls return.
QUESTIONS = """
import ctypes, json, sys

cuda, said = ctypes.CDLL(sys.argv[1]), {}
count, pointer, context = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
left, total, kernel = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
allocate = lambda size: cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size))
said["flags"] = cuda.cuInit(1)
said["init"] = cuda.cuInit(0)
said["counted"] = cuda.cuDeviceGetCount(ctypes.byref(count))
said["count"] = count.value
said["no context"] = allocate(256)
said["no device"] = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 2)
cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1)
cuda.cuCtxSetCurrent(context)
said["no size"] = allocate(0)
said["too much"] = allocate(1 << 31)
said["enough"] = allocate(1 << 20)
cuda.cuMemGetInfo_v2(ctypes.byref(left), ctypes.byref(total))
said["used"] = total.value - left.value
said["free"] = cuda.cuMemFree_v2(pointer)
said["free again"] = cuda.cuMemFree_v2(pointer)

host = ctypes.c_char()
register = cuda["__cudaRegisterFunction"]
register(None, ctypes.byref(host), None, b"kernel", 512, None, None, None, None, None)
cuda["__cudaGetKernel"](ctypes.byref(kernel), ctypes.byref(host))


def launch(grid=1, threads=32, z=1, shared=0):
    return cuda.cuLaunchKernel(kernel, grid, 1, 1, threads, 1, z, shared, None, None, None)


said["launch"] = launch()
said["no grid"] = launch(grid=0)
said["block"] = launch(threads=2048)
said["deep block"] = launch(threads=1, z=65)
said["bound"] = launch(threads=1024)
said["shared"] = launch(shared=50000)
said["more shared than there is"] = cuda.cuFuncSetAttribute(kernel, 8, 200000)
said["reserve"] = cuda.cuFuncSetAttribute(kernel, 8, 160000)
said["shared, reserved"] = launch(shared=160000)
said["no kernel"] = cuda.cuLaunchKernel(None, 1, 1, 1, 1, 1, 1, 0, None, None, None)
said["stub"] = cuda.cuNotThere()
print(json.dumps(said))
"""
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INVALID_DEVICE = 0, 1, 2, 101
INVALID_CONTEXT, INVALID_HANDLE, OUT_OF_RESOURCES, NOT_SUPPORTED = 201, 400, 701, 801


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], str, str]:
    """What the calls returned, what was written to stderr, and the log."""
    if not library.compiler() or not library.includes():
        pytest.skip("no C++ compiler, or no headers of CUDA")
    folder = tmp_path_factory.mktemp("stand_in")
    path, log = folder / library.NAME, folder / "log"
    library.compile_library(path, ["cuNotThere"], "-O0", "-Werror")
    settings = {"CAPABILITY": "8.0", "DEVICES": "2", "MEMORY": str(1 << 30), "LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", QUESTIONS, path],
        env={f"CUDA_STAND_IN_{name}": value for name, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, log.read_text("utf-8")


def test_calls_return_what_cuda_documents(answers: tuple[dict[str, int], str, str]) -> None:
    assert answers[0] == {
        "flags": INVALID_VALUE,
        "init": SUCCESS,
        "counted": SUCCESS,
        "count": 2,
        "no context": INVALID_CONTEXT,
        "no device": INVALID_DEVICE,
        "no size": INVALID_VALUE,
        "too much": OUT_OF_MEMORY,
        "enough": SUCCESS,
        "used": 1 << 20,
        "free": SUCCESS,
        "free again": INVALID_VALUE,
        "launch": SUCCESS,
        "no grid": INVALID_VALUE,
        "block": INVALID_VALUE,
        "deep block": INVALID_VALUE,
        "bound": OUT_OF_RESOURCES,
        "shared": INVALID_VALUE,
        "more shared than there is": INVALID_VALUE,
        "reserve": SUCCESS,
        "shared, reserved": SUCCESS,
        "no kernel": INVALID_HANDLE,
        "stub": NOT_SUPPORTED,
    }


def test_what_is_refused_is_said_and_launches_are_logged(
    answers: tuple[dict[str, int], str, str],
) -> None:
    _, said, log = answers
    assert "violation: launch of kernel; an impossible block" in said
    assert "missing: cuNotThere" in said
    assert "launch: " not in said
    assert log.count("launch: grid 1 1 1, block 32 1 1, shared 0 + 0") == 1


def test_the_command_becomes_what_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[Any] = []
    monkeypatch.setattr(library, "library", lambda: tmp_path)
    monkeypatch.setattr(library, "native", lambda capability: tmp_path / capability)
    monkeypatch.setattr(command.os, "execvpe", lambda *words: became.extend(words))
    command.main(["--capability", "8.0", "--assert", "soft", "--", "python", "-m", "pytest"])
    file, words, environment = became
    assert (file, words) == ("python", ["python", "-m", "pytest"])
    assert environment["LD_PRELOAD"] == str(tmp_path / library.NAME)
    assert environment["CUDA_STAND_IN_CAPABILITY"] == "8.0"
    assert environment["CUDA_STAND_IN_NATIVE"] == str(tmp_path / "8.0")
    assert environment["PYTEST_ADDOPTS"] == "--assert=plain"


def test_a_command_without_a_library_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "compiler", lambda: None)
    monkeypatch.setattr(library, "BUILD", Path("nowhere"))
    assert command.main(["--", "true"]) == 1
    assert "needs a C++ compiler and CUDA's headers" in capsys.readouterr().err


@pytest.mark.parametrize("soft", [True, False])
def test_soft_assertions_are_evaluated_only(soft: bool, tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "case.py").write_text("print('begin')\nassert print('asked')\nprint('end')\n")
    done = subprocess.run(
        [sys.executable, "-c", "import case"],
        env={
            "PYTHONPATH": f"{library.HERE / 'startup'}:{tests}",
            "CUDA_STAND_IN_SOFT": "1" if soft else "",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["begin", "asked", *(["end"] if soft else [])]
    assert done.returncode == (0 if soft else 1)
