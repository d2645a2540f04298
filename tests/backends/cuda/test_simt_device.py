"""The SIMT shim finds the faults it is there to find: kernels of simt_device.cpp."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[3]
THREADS, CTAS, ORDERS = 64, 3, 6


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("simt") / "simt_device"
    sources = [Path(__file__).with_name("simt_device.cpp"), ROOT / "csrc" / "simt" / "device.cpp"]
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DRPG_SIMT"]
    command += [f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(out)]
    done = processes.run(*command)
    assert done.returncode == 0, done.stderr
    return out


def run(program: Path, kernel: str) -> list[list[float]]:
    """What a kernel wrote, [orders][CTAs * threads]."""
    done = processes.run(program, kernel)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(results) == ORDERS
    assert all(len(result) == CTAS * THREADS for result in results)
    return results


WANTED = {
    "exchange": [(t + 40) % THREADS for t in range(THREADS)],
    "exchange in warp": [t ^ 7 for t in range(THREADS)],
    "exchange by shuffle": [t ^ 7 for t in range(THREADS)],
    "reuse": [1] * THREADS,
    "copy": [4 * (THREADS - 1 - t) + 3 for t in range(THREADS)],
    "refill": [-1] * THREADS,
    "two copies": [4 * t for t in range(THREADS)],
    "early return": [2] * 32 + [1] * 32,
    "product bfloat16": [0] * THREADS,  # numbers that are wrong
    "product float16": [0] * THREADS,
}


@pytest.mark.parametrize("kernel", WANTED)
def test_right_kernels(program: Path, kernel: str) -> None:
    for result in run(program, kernel):
        assert result == WANTED[kernel] * CTAS


@pytest.mark.parametrize(
    "kernel",
    [
        "exchange without barrier",
        "exchange in warp without barrier",
        "reuse without barrier",
        "copy without wait",
        "copy without commit",
        "refill without barrier",
        "two copies, one waited for",
        "uninitialised",
    ],
)
def test_faults_that_change_results(program: Path, kernel: str) -> None:
    results = run(program, kernel)
    right = WANTED.get(kernel.partition(" without")[0].partition(",")[0], [1] * THREADS) * CTAS
    assert any(result != right for result in results)
    if "reuse" not in kernel and "refill" not in kernel:  # nobody had written what was read
        assert any(math.isnan(value) for result in results for value in result)


@pytest.mark.parametrize(
    ("kernel", "sentence"),
    [
        ("misaligned copy", "an asynchronous copy is not aligned to 16 bytes"),
        ("beyond the end", "shared memory: index 64 of 64"),
        ("before the beginning", "shared memory: index -1 of 64"),
        ("wide beyond the end", "shared memory: index 64 of 64"),
        ("too large", "an array of 17 elements at byte 4032 does not fit"),
        ("divergent", "threads of a CTA wait for each other at different places"),
        ("different operations", "lanes of a warp ask for different operations"),
    ],
)
def test_faults_that_stop_the_launch(program: Path, kernel: str, sentence: str) -> None:
    done = processes.run(program, kernel)
    assert done.returncode == 1
    assert sentence in done.stdout


def test_ctas_run_in_several_orders_and_the_last_is_told(program: Path) -> None:
    last = set()
    for result in run(program, "last CTA"):
        of_cta = [result[b * THREADS : (b + 1) * THREADS] for b in range(CTAS)]
        assert all(len(set(values)) == 1 for values in of_cta)
        (found,) = (b for b in range(CTAS) if of_cta[b][0])
        last.add(found)
    assert len(last) > 1
