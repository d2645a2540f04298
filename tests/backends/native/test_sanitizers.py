"""sanitizers.cpp: the CPU kernels on several threads, watched for races and bad accesses."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[3]
UNITS = ("unit_linear", "unit_linear_grads", "unit_conv2d", "unit_conv2d_grads")
KERNELS = ("unpack", "linear", "tile_linear", "tile_linear_grads", "conv2d", *UNITS)
FLAGS = ["-std=c++17", "-Og", f"-I{ROOT / 'csrc'}", "-DRPG_ISA=baseline"]
SANITIZERS = ("thread", "address,undefined")


def compiler() -> str:
    """GCC, whose names for OpenMP the program knows, with the sanitizer's library."""
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("no g++")
    asked = processes.run(gcc, "--version")
    if "Free Software Foundation" not in asked.stdout:
        pytest.skip("g++ is not GCC")
    return gcc


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels with their driver, in a folder of the sanitizer's name."""
    gcc, folder = compiler(), tmp_path_factory.mktemp("sanitized") / request.param
    folder.mkdir()
    flags = [*FLAGS, f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    trivial = folder / "trivial.cpp"
    trivial.write_text("int main() {}\n", "utf-8")
    built = subprocess.run([gcc, *flags, str(trivial), "-o", f"{folder}/trivial"])
    if built.returncode:
        pytest.skip(f"the compiler comes without the sanitizer: {request.param}")
    ran = processes.run(folder / "trivial")
    if ran.returncode:  # addresses are laid out as the sanitizer does not know them
        pytest.skip(f"the sanitizer does not run here: {ran.stderr.strip()[:200]}")
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in KERNELS]
    sources.append(Path(__file__).with_name("sanitizers.cpp"))
    compiling = [
        subprocess.Popen(
            [gcc, *flags, "-fopenmp", "-Wno-psabi", "-c", str(source), "-o", f"{source.stem}.o"],
            cwd=folder,
        )
        for source in sources
    ]
    assert [process.wait() for process in compiling] == [0] * len(sources)
    objects = [f"{source.stem}.o" for source in sources]
    # Without -fopenmp: what GCC calls of OpenMP is the program's own.
    sanitize = f"-fsanitize={request.param}"
    subprocess.run([gcc, sanitize, *objects, "-o", "program"], cwd=folder, check=True)
    return folder / "program"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = "halt_on_error=1:exitcode=66"
    return processes.run(program, *arguments, env={**os.environ, "TSAN_OPTIONS": options})


def test_kernels_are_clean(program: Path) -> None:
    done = run(program)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr[:4000]
    assert done.stdout == "928 calls\n"


@pytest.mark.parametrize("program", ["thread"], indirect=True)
def test_the_sanitizer_sees_through_the_barriers(program: Path) -> None:
    """Without them it complains: what the other test does not find is not hidden from it."""
    done = run(program, "without-barriers")
    assert done.returncode == 66, done.stdout
    assert "data race" in done.stderr
