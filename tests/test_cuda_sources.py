"""The CUDA sources: compiled for every architecture, and what they compute where there is a GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rpg_kernels import native
from rpg_kernels.law import LayerLaw
from rpg_kernels.window_law import WindowLaw

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
POINTS: dict[str, Any] = {
    f"law {number}, {name}": entry
    for number in (1, 2)
    for name, entry in json.loads(
        (ROOT / "tests" / "golden" / f"law{number}.json").read_text("utf-8")
    )["entries"].items()
    if "points" in entry
}

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
needs_cuda_build = pytest.mark.skipif(
    not native.build_info().get("cuda"), reason="the compiled half has no CUDA kernels"
)


def test_there_are_sources() -> None:
    assert SOURCES


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills_or_local_memory(
    source: Path, architecture: str, tmp_path: Path
) -> None:
    out = tmp_path / "kernel.cubin"
    command = ["nvcc", f"-arch=sm_{architecture}", "-std=c++17", "-O3", "-cubin", "-Xptxas=-v"]
    done = subprocess.run(
        [*command, "-Werror=all-warnings", "-o", str(out), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 0
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert spills
    assert set(spills) == {("0", "0", "0")}, done.stderr


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    from rpg_kernels import _native

    law = native.layer_law(LayerLaw(0, 0, 6, 10, 8, 20, 3, "vector", True))
    for count in (0, 1):  # the addresses are never looked at
        with pytest.raises(RuntimeError, match="CUDA could not find a device: "):
            _native.cuda_law(law, 0, 0, 0, count, 0, 0, 0)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("name", POINTS)
def test_the_device_evaluates_the_golden_vectors(name: str) -> None:
    from rpg_kernels import _native

    entry = POINTS[name]
    config = entry["config"]
    law = (WindowLaw if "window" in config else LayerLaw)(**config)
    handle = native.layer_law(law)
    words = 1 if law.reflect == "vector" else law.words
    sign_words = entry.get("sign words", [None] * len(entry["slots"]))  # without signs: none
    for (row, block), slot, wanted in zip(entry["points"], entry["slots"], sign_words, strict=True):
        n = torch.tensor([row], device="cuda")
        b = torch.tensor([block], device="cuda")
        slots = torch.full((1,), -1, device="cuda")
        signs = torch.full((1, words), -1, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        _native.cuda_law(
            handle,
            row // law.rows_per_band,
            n.data_ptr(),
            b.data_ptr(),
            1,
            slots.data_ptr(),
            signs.data_ptr(),
            stream,
        )
        assert slots.item() == slot
        assert wanted is None or signs[0].tolist() == wanted


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(("rows", "blocks"), [(4096, 64), (20011, 1), (997, 13), (1728, 12)])
def test_the_device_agrees_on_whole_layers(rows: int, blocks: int, windows: bool) -> None:
    from rpg_kernels import _native

    law: LayerLaw = LayerLaw(3, 4, rows, blocks, 128, 31250, 77, "element", True)
    if windows:
        law = WindowLaw(3, 4, rows, blocks, 128, 31250, 64, "element", True, 256, 3)
    n, b = (
        t.contiguous()
        for t in torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    )
    far_n, far_b = n.flatten().cuda(), b.flatten().cuda()
    slots = torch.full_like(far_n, -1)
    signs = torch.full((rows * blocks, 4), -1, device="cuda")
    _native.cuda_law(
        native.layer_law(law),
        0,
        far_n.data_ptr(),
        far_b.data_ptr(),
        rows * blocks,
        slots.data_ptr(),
        signs.data_ptr(),
        torch.cuda.current_stream().cuda_stream,
    )
    assert torch.equal(slots.cpu().view(rows, blocks), law.slot(n, b))
    assert torch.equal(signs.cpu().view(rows, blocks, 4), law.sign_words(n, b))
