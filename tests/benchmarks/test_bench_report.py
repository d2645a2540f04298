"""Tables and plots come from result files and nothing else, and a stale one is noticed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import bench_tools as tools
import pytest

from benchmarks.harness import report

ROOT = Path(__file__).resolve().parents[2]
MARKS = "".join(f"<!-- report:{name} -->\nold\n<!-- /report -->\n\n" for name in report.BLOCKS)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return tools.run("dense", "published", "rpg-reference", memory_limit=10**9)


@pytest.fixture
def record(measured: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(measured)


@pytest.fixture
def root(tmp_path: Path, record: dict[str, Any]) -> Path:
    """A checkout with one result file and one page of every table."""
    (tmp_path / "docs").mkdir()
    (tmp_path / report.RESULTS).mkdir(parents=True)
    (tmp_path / "docs" / "page.md").write_text(f"before\n{MARKS}after\n")
    (tmp_path / "README.md").write_text("no table here")
    save(tmp_path, "one.json", record)
    return tmp_path


def save(root: Path, name: str, record: dict[str, Any]) -> None:
    (root / report.RESULTS / name).write_text(json.dumps(record))


def run(root: Path, *options: str) -> int:
    return report.main(["--root", str(root), *options])


def test_the_repositorys_own_pages_are_not_stale() -> None:
    stale = report.stale(ROOT)
    assert not stale, f"make report would change {[str(p.relative_to(ROOT)) for p in stale]}"
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in ("speed", "memory", "plots", "schema", "cases"):
        assert f"<!-- report:{name} -->" in page


def test_tables_show_what_was_measured(root: Path, record: dict[str, Any]) -> None:
    for row in record["results"]:
        for clocks in row["times"]["full"].values():
            clocks["process"] = {"q10_s": 1.0, "q90_s": 1.0, "samples": 3,
                                 "median_s": {"dense": 2e-3, "published": 8e-3}.get(row["impl"], 1e-3)}  # fmt: skip # noqa: E501
    save(root, "one.json", record)
    assert run(root) == 0
    page = (root / "docs" / "page.md").read_text()
    line = (
        "| tiny.linear/3 | 200 g8 element fp32 | 2 ms | 8 ms | not measured | 1 ms | 0.50 | 0.12 |"
    )
    assert line in page
    assert "(../benchmarks/results/one.json)" in page
    assert "| 16.00 B | 0.00 B | 16.02 B |" in page  # saved as published and ours, stays per DoF
    assert page.startswith("before\n<!-- report:speed -->\n\nCPU: ")
    assert page.endswith("not measured\n\n<!-- /report -->\n\nafter\n")
    assert "old" not in page.split()
    assert (root / "README.md").read_text() == "no table here"


def test_what_no_run_produced_is_not_measured(root: Path, record: dict[str, Any]) -> None:
    run(root)
    page = (root / "docs" / "page.md").read_text()
    assert page.count("GPU: not measured.") == 3
    assert page.count("\nnot measured\n") == 12  # files of other formats are not there
    shutil.rmtree(root / "benchmarks")
    run(root)
    assert (root / "docs" / "page.md").read_text().count("CPU: not measured.") == 3


def test_wrong_and_out_of_memory_are_shown_as_such(root: Path, record: dict[str, Any]) -> None:
    for row, status in zip(record["results"], ("ok", "wrong", "out of memory"), strict=True):
        row.update(status=status, reason=status)
        if status != "ok":
            row.update(times={}, memory=None)
    save(root, "one.json", record)
    run(root)
    page = (root / "docs" / "page.md").read_text()
    assert "| wrong | not measured | out of memory |  |  |" in page


def test_check_fails_until_the_report_is_written(
    root: Path, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, "--check") == 1
    assert "docs/page.md: stale" in capsys.readouterr().out
    assert "old" in (root / "docs" / "page.md").read_text()
    assert run(root) == 0
    assert run(root, "--check") == 0
    record["results"][0]["times"]["full"]["cold"]["process"]["median_s"] *= 1.5
    save(root, "one.json", record)
    assert run(root, "--check") == 1
    assert run(root) == 0
    image = root / report.IMAGES / "bench_speed_cpu_dark.svg"
    image.write_text(image.read_text() + " ")
    capsys.readouterr()
    assert run(root, "--check") == 1
    assert "bench_speed_cpu_dark.svg: stale" in capsys.readouterr().out


def test_the_newest_complete_file_of_a_device_counts(root: Path, record: dict[str, Any]) -> None:
    save(root, "older.json", {**record, "created": "2000-01-01T00:00:00Z"})
    save(root, "cut.json", {**record, "created": "3000-01-01T00:00:00Z", "complete": False})
    save(root, "law.json", {"benchmark": "law"})
    assert {d: p.name for d, (p, _) in report.newest(root).items()} == {"cpu": "one.json"}
    save(root, "bad.json", {**record, "load": {}})
    with pytest.raises(ValueError, match=r"bad\.json: file\.load: got keys"):
        report.newest(root)
    assert run(root) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- report:sped -->\n<!-- /report -->", "report: got 'sped', wanted one of 'speed'"),
        ("<!-- report:law -->", "got no <!-- /report --> after report:law"),
        ("<!-- report:law -->\n<!-- report:law -->", "got '<!-- report:law -->', wanted a pair"),
        ("<!-- /report -->", "got '<!-- /report -->', wanted a pair"),
        ("<!-- report -->", "got '<!-- report -->', wanted a pair"),
    ],
)
def test_bad_marks_are_refused(text: str, message: str, root: Path) -> None:
    with pytest.raises(ValueError, match=message):
        report.page(text, root)


def test_older_results_give_the_tables_that_pages_show(tmp_path: Path) -> None:
    shutil.copytree(ROOT / report.RESULTS, tmp_path / report.RESULTS)
    made = {name: report.BLOCKS[name](tmp_path) for name in report.BLOCKS}
    assert (
        "| 2,000,000 | **24.2 MB** | 0.01 MB | **106** | 378 s | 52.9 % | **63.8 %** |"
        in "".join(made["cifar10-resnet18"])
    )
    assert "| init_std 1 (unit variance) | 97.0 ± 1.0 |" in made["bank-training"]
    assert made["law"][0].startswith("| rows x blocks | permutation |")


def test_files_of_others_are_passed_over_and_broken_ones_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root) == 0
    (root / report.RESULTS / "list.json").write_text("[1]")
    assert run(root, "--check") == 0
    (root / report.RESULTS / "cut.json").write_text('{"schema": ')
    assert run(root, "--check") == 1
    assert "cut.json: Expecting value" in capsys.readouterr().err
