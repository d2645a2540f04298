"""The microbenchmarks of benchmarks/gpu: they compile, and say what is missing without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tools.gpu_check import programs

SOURCES = programs.SOURCES
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
@pytest.mark.parametrize("program", programs.PROGRAMS)
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
    assert {path.stem for path in SOURCES.glob("*.cu")} == set(programs.PROGRAMS)
