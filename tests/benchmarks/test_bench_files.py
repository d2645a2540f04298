"""Result files: the format is checked field by field, and two of them can be compared."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import bench_tools as tools
import pytest

from benchmarks.harness import compare, schema
from benchmarks.harness.__main__ import main as harness_main


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return tools.run("dense", "rpg-reference", roofs=True)


@pytest.fixture
def record(measured: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(measured)


def test_other_files_and_other_versions_are_refused(record: dict[str, Any], tmp_path: Path) -> None:
    assert schema.validate(record) is record
    with pytest.raises(ValueError, match=r"version: got 2, wanted 1: the file was written by anot"):
        schema.validate({**record, "version": 2})
    for other in ({}, [], {"benchmark": "law"}, None, "text"):
        with pytest.raises(ValueError, match="schema: got no 'rpg-kernels/bench'"):
            schema.validate(other)
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: "):
        schema.load(path)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["complete"], 1, r"file\.complete: got 1, wanted bool"),
        (["created"], None, r"file\.created: got None, wanted text"),
        (["headline"], "cpu", r"file\.headline: got 'cpu', wanted text of \['process'"),
        (["environment", "cores"], 2.0, r"file\.environment\.cores: got 2\.0, wanted int"),
        (["environment", "cores"], True, r"cores: got True, wanted int"),
        (["load", "busy"], "no", r"file\.load\.busy: got 'no', wanted a list"),
        (["load", "busy"], [3], r"file\.load\.busy\[0\]: got 3, wanted text"),
        (["ceilings", "copy_bytes_per_s"], float("nan"), r"copy_bytes_per_s: got nan, wanted num"),
        (["ceilings", "matrix_per_s"], [], r"matrix_per_s: got \[\], wanted an object"),
        (["results", 0, "status"], "fine", r"results\[0\]\.status: got 'fine', wanted text of"),
        (["results", 0, "dof"], -1, r"results\[0\]\.dof: got -1, wanted int"),
        (["results", 1, "times"], {"inference": {}}, r"times: got 'inference', wanted keys of"),
        (["results", 1, "memory", "saved"], None, r"memory\.saved: got None, wanted int"),
        (["results", 0, "memory"], {}, r"results\[0\]\.memory: got keys \[\], wanted keys"),
        (["results", 0], [], r"file\.results\[0\]: got \[\], wanted an object"),
    ],
)
def test_a_wrong_field_is_named(
    record: dict[str, Any], where: list[Any], value: object, message: str
) -> None:
    inner: Any = record
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(ValueError, match=message):
        schema.validate(record)


def test_keys_that_are_missing_or_unknown_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"file\.options: got keys .*, wanted keys"):
        schema.validate({**record, "options": {**record["options"], "extra": 1}})
    del record["results"][0]["copies"]
    with pytest.raises(ValueError, match=r"results\[0\]: got keys"):
        schema.validate(record)


def test_every_field_is_described(record: dict[str, Any]) -> None:
    described = {name for name, _, _ in schema.describe()}
    for name in record:
        assert name in described
    for name in record["results"][0]:
        assert f"results[].{name}" in described
    assert "results[].times.*.*.*.median_s" in described
    assert "ceilings.gather[].bytes_per_s" in described
    assert all(kind and about for _, kind, about in schema.describe())


def slower(record: dict[str, Any], factor: float, impl: str = "dense") -> dict[str, Any]:
    """The same file with other times for one implementation."""
    changed = copy.deepcopy(record)
    for row in changed["results"]:
        if row["impl"] == impl:
            for states in row["times"].values():
                for clocks in states.values():
                    for figure in clocks.values():
                        for name in ("median_s", "q10_s", "q90_s"):
                            figure[name] *= factor
    return changed


def test_ratios_of_two_files(record: dict[str, Any]) -> None:
    ratios = compare.ratios(record, slower(record, 2.0))
    assert len(ratios) == 2 * 3 * 2
    for (case, setting, impl, _, _), r in ratios.items():
        assert (case, setting) == ("tiny.linear/3", "200 g8 element fp32")
        assert r.ratio == pytest.approx(2.0 if impl == "dense" else 1.0)
        assert r.differs == (impl == "dense" and r.noise < 1.0)
    assert not compare.Ratio(1.0, 1.1, noise=0.2).differs
    assert compare.Ratio(1.1, 1.0, noise=0.05).differs
    text = compare.text(record, slower(record, 2.0), ("old", "new"))
    assert "2.000" in text
    assert "geometric mean of the ratios 1.414" in text


def test_files_that_cannot_be_compared(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="headline: got 'process' and 'wall', wanted the same"):
        compare.ratios(record, {**record, "headline": "wall"})
    other = copy.deepcopy(record)
    other["environment"]["device_name"] = "abacus"
    with pytest.raises(ValueError, match=r"device_name: got .* and 'abacus'"):
        compare.ratios(record, other)
    none = {**record, "results": []}
    assert "no case in common" in compare.text(record, none, ("a", "b"))
    fewer = {**record, "results": record["results"][:1]}
    assert "6 figures are in one file only" in compare.text(record, fewer, ("a", "b"))


def test_a_comparison_names_what_went_wrong_in_either_file(record: dict[str, Any]) -> None:
    record = copy.deepcopy(record)
    record["load"]["busy"] = []
    broken = copy.deepcopy(record)
    broken["complete"] = False
    broken["load"]["busy"] = ["much to do"]
    broken["results"][1].update(status="wrong", reason="output: error 1", times={}, memory=None)
    text = compare.text(record, schema.validate(broken), ("old", "new"))
    assert "new: INTERRUPTED" in text
    assert "new: BUSY MACHINE: much to do" in text
    row = "tiny.linear/3 200 g8 element fp32 rpg-reference"
    assert f"new: {row}: WRONG: output: error 1\n" in text
    assert not [line for line in text.splitlines() if line.startswith("old: ")][1:]


def test_a_time_of_zero_is_refused(record: dict[str, Any]) -> None:
    message = r"median_s: got 0 for tiny\.linear/3 dense .*, wanted a time"
    with pytest.raises(ValueError, match=message):
        compare.ratios(record, slower(record, 0.0))


def test_merging_takes_the_fastest_run_of_every_figure(record: dict[str, Any]) -> None:
    runs = [slower(record, 3.0, "dense"), slower(record, 5.0, "rpg-reference")]
    merged = compare.merge(runs)
    assert {r.ratio for r in compare.ratios(record, merged).values()} == {1.0}
    schema.validate(merged)


def test_compare_on_the_command_line(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text(json.dumps(record))
    other.write_text(json.dumps(slower(record, 0.5)))
    assert harness_main(["--compare", str(one), str(other)]) == 0
    assert "0.500" in capsys.readouterr().out
    other.write_text(json.dumps({**record, "version": 9}))
    assert harness_main(["--compare", str(one), str(other)]) == 1
    assert f"{other}: version: got 9, wanted 1" in capsys.readouterr().err


STAND_IN = """
import json, pathlib, sys
record = json.loads(pathlib.Path({record!r}).read_text())
factor = float(pathlib.Path(__file__).with_name("factor").read_text())
for row in record["results"]:
    for states in row["times"].values():
        for clocks in states.values():
            for figure in clocks.values():
                for name in figure:
                    if name != "samples":
                        figure[name] *= factor
pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps(record))
pathlib.Path({log!r}).open("a").write(f"{{factor}} {{sys.argv[1:-2]}}\\n")
"""


@pytest.fixture
def repository(record: dict[str, Any], tmp_path: Path) -> Path:
    """A git repository of two commits, whose benchmark claims times that a file in it scales.

    In the first the package still holds the benchmark.
    """
    saved, log = tmp_path / "record.json", tmp_path / "log"
    saved.write_text(json.dumps(record))
    root = tmp_path / "repository"
    package = root / "rpg_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    harness = root / "benchmarks" / "harness"
    stand_in = STAND_IN.format(record=str(saved), log=str(log))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(root)]
    subprocess.run([*git, "init", "-q"], check=True)
    for factor, program in (("1.0", package / "cli.py"), ("4.0", harness / "__main__.py")):
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(stand_in)
        program.with_name("factor").write_text(factor)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", factor], check=True)
    return root


def test_comparing_two_commits_runs_both_in_turn(repository: Path, tmp_path: Path) -> None:
    text = compare.compare("HEAD~1", "HEAD", ["--suite", "quick"], repository)
    assert "geometric mean of the ratios 4.000" in text
    ran = (tmp_path / "log").read_text().split("\n")[:-1]
    assert [line.split()[0] for line in ran] == ["1.0", "4.0", "1.0", "4.0"]
    assert all(line.endswith("'--suite', 'quick']") for line in ran)
    assert ["'bench'" in line for line in ran] == [True, False] * 2
    trees = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True
    )
    assert len(trees.stdout.splitlines()) == 1


def test_a_commit_whose_native_part_does_not_build_is_named(repository: Path) -> None:
    (repository / "csrc").mkdir()
    (repository / "csrc" / "law.h").write_text("")
    (repository / "setup.py").write_text("raise SystemExit('error: no compiler today')")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(repository)]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "native"], check=True)
    first, *rest = compare.compare("HEAD~1", "HEAD", [], repository).splitlines()
    assert "measured WITHOUT its native part: error: no compiler today" in first
    assert not any("WITHOUT" in line for line in rest)


def test_commits_that_cannot_be_measured(repository: Path) -> None:
    with pytest.raises(ValueError, match="compare: got 'nonsense', wanted two result files, or"):
        compare.compare("HEAD", "nonsense", [], repository)
    (repository / "benchmarks" / "harness" / "__main__.py").write_text(
        "raise SystemExit('no harness here')"
    )
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(repository)]
    subprocess.run([*git, "commit", "-qam", "broken"], check=True)
    with pytest.raises(ValueError, match="tree0 failed: no harness here"):
        compare.compare("HEAD", "HEAD~1", [], repository)
