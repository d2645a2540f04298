"""The CUDA sources: what compilers make of them, and what they compute where there is a GPU."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import clean_room
import pytest
import torch
from small_batches import needs_simt

from rpg_kernels import native
from rpg_kernels.law.ring import LayerLaw
from rpg_kernels.law.unit import UnitLaw
from tools.reports import cuda_sass as sass

ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
POINTS: dict[str, Any] = {
    f"law {number}, {name}": entry
    for number in (1, 3)
    for name, entry in json.loads(
        (ROOT / "tests" / "golden" / f"law{number}.json").read_text("utf-8")
    )["entries"].items()
    if "points" in entry
}

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
needs_cuda_build = pytest.mark.skipif(
    not native.build_info().get("cuda"), reason="the native module has no CUDA kernels"
)


def test_there_are_sources() -> None:
    assert SOURCES


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(cubin, what ptxas says) of a source and an architecture.

    Those of the released wheel, where its tests build one; otherwise compiled when asked for, as
    is what only development builds have.
    """
    folder = kept = tmp_path_factory.mktemp("cubins")
    if any(item.path.name == "test_install_release.py" for item in request.session.items):
        kept = clean_room.release(tmp_path_factory) / "cubins"

    def build(source: str, architecture: str) -> tuple[Path, str]:
        for cubin in kept.glob(f"{source}.compute_{architecture}.*cubin"):
            return cubin, said_of(kept, source, architecture)
        out = folder / f"{source}.{architecture}.cubin"
        log = out.with_suffix(".log")
        if not log.exists():
            log.write_text(sass.compile_source(sass.CUDA / f"{source}.cu", architecture, out))
        return out, log.read_text()

    return build


def said_of(cubins: Path, source: str, architecture: str) -> str:
    """What ptxas said of a source for an architecture while the release was built."""
    said = "".join(path.read_text("utf-8") for path in cubins.glob("*.log"))
    kernels = re.split(r"(?=ptxas info\s*: Compiling entry function)", said)
    name = f"_{source}_cu_"  # in a kernel's, of its anonymous namespace
    return "".join(text for text in kernels if name in text and f"for 'sm_{architecture}'" in text)


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills_or_local_memory(
    source: Path, architecture: str, built: Any
) -> None:
    out, log = built(source.stem, architecture)
    assert out.stat().st_size > 0
    usage = sass.usage_of(log)
    assert usage
    assert {name: spills for name, (_, spills) in usage.items() if spills} == {}


@needs_nvcc
@needs_simt
@pytest.mark.skipif(sass.nvdisasm() is None, reason="there is no nvdisasm")
@pytest.mark.parametrize("architecture", ["80", "90a", "120"])
@pytest.mark.parametrize("op", ["linear", "linear_input_grad"])
def test_products_keep_to_their_instructions(op: str, architecture: str, built: Any) -> None:
    from tools.reports import cuda_report as report

    kernels = sass.kernels(built(op, architecture)[0])
    page = report.PAGE.read_text("utf-8")
    same_compiler = f"nvcc {report.nvcc_version()}." in page
    for batch in (1, 8, 16):
        name = f"{op}_kernel<Bfloat16, {batch}>"
        kernel = kernels[name]
        body = report.column_loop(kernel).body
        parts = report.per_weight(kernel, report.case_of(name))
        whole, without_entries = report.BUDGETS[op]
        assert sum(parts.values()) <= whole
        assert sum(parts.values()) - parts["entries"] <= without_entries
        if op == "linear":  # the other one's entries are what it multiplies with
            assert parts["entries"] <= report.TABLE_BUDGET
        # Wide accesses: operands, the bank, sums of 4 rows for each of a thread's 4.
        # Of the input gradient, one for each loop over places: none is unrolled.
        assert kernel.count(report.KINDS["LDSM x4"], body) >= (4 if op == "linear" else 2)
        assert kernel.count(report.KINDS["LDGSTS.128"], body) >= 4
        if op == "linear" and batch > 1:
            assert kernel.count(report.KINDS["LDS.128"], body) >= batch
        if same_compiler and architecture in report.COUNTED:
            row = report.weight_row(name, architecture, kernel)
            assert row in page, "run python -m tools.reports.cuda_report"


def test_what_never_runs_takes_its_surroundings_along() -> None:
    """0 branches to 3 past 1 and 2; 3 to 6 past 4 and 5; 4 is known not to run."""
    texts = [
        "@P0 BRA `(.L_3) ",
        "NOP ",
        "NOP ",
        "@P1 BRA `(.L_6) ",
        "STS [R0], R1 ",
        "NOP ",
        "EXIT ",
    ]
    instructions = [sass.Instruction(text, ()) for text in texts]
    kernel = sass.Kernel("k", instructions, {".L_3": 3, ".L_6": 6})
    assert sass.never_run(kernel, {4}) == {4, 5}
    assert sass.never_run(kernel, {2}) == {1, 2}
    assert sass.never_run(kernel, set()) == set()
    assert sass.never_run(kernel, {6}) == set(range(7))  # every way leads there


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    from rpg_kernels.native import _native

    law = native.layer_law(LayerLaw(0, 0, 6, 10, 8, 20, 3, "vector", True))
    for count in (0, 1):  # the addresses are never looked at
        with pytest.raises(RuntimeError, match="CUDA could not find a device: "):
            _native.cuda.law(law, 0, 0, 0, count, 0, 0, 0)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("name", POINTS)
def test_the_device_evaluates_the_golden_vectors(name: str) -> None:
    from rpg_kernels.native import _native

    entry = POINTS[name]
    config = entry["config"]
    law = (UnitLaw if "laps" in config else LayerLaw)(**config)
    handle = native.layer_law(law)
    words = 1 if law.reflect == "vector" else law.words
    sign_words = entry.get("sign words", [None] * len(entry["slots"]))  # without signs: none
    for (row, block), slot, wanted in zip(entry["points"], entry["slots"], sign_words, strict=True):
        n = torch.tensor([row], device="cuda")
        b = torch.tensor([block], device="cuda")
        slots = torch.full((1,), -1, device="cuda")
        signs = torch.full((1, words), -1, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        _native.cuda.law(
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
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize(("rows", "blocks"), [(4096, 64), (20011, 1), (997, 13), (1728, 12)])
def test_the_device_agrees_on_whole_layers(rows: int, blocks: int, units: bool) -> None:
    from rpg_kernels.native import _native

    law: LayerLaw = LayerLaw(3, 4, rows, blocks, 128, 31250, 77, "element", True)
    if units:
        law = UnitLaw(3, 4, rows, blocks, 128, 31250, 63, "element", True, 3, 256, 1, 1)
    n, b = (
        t.contiguous()
        for t in torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    )
    far_n, far_b = n.flatten().cuda(), b.flatten().cuda()
    slots = torch.full_like(far_n, -1)
    signs = torch.full((rows * blocks, 4), -1, device="cuda")
    _native.cuda.law(
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
