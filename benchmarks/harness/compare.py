"""Two result files, or two commits: the ratio of every figure that both have."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import schema, table
from benchmarks.harness.timing import COLD, WARM
from rpg_kernels.timing import seconds

Key = tuple[str, str, str, str, str]  # case, setting, implementation, pass, state
_ROUNDS = 2  # runs of each commit, in turn, so that both see the same drift


@dataclass(frozen=True)
class Ratio:
    """One figure in both files.

    Args:
        before, after: seconds.
        noise: the larger of the two spreads of samples, relative to their medians.
    """

    before: float
    after: float
    noise: float

    @property
    def ratio(self) -> float:
        """Below 1: the second is faster."""
        return self.after / self.before

    @property
    def differs(self) -> bool:
        """The medians are further apart than the samples of either spread."""
        return abs(self.after - self.before) > self.noise * min(self.before, self.after)


def ratios(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[Key, Ratio]:
    """Figures of two valid files by what was measured, where both have them.

    Raises:
        ValueError: the files quote different clocks, or come from different devices.
    """
    for name, one, other in (
        ("headline", before["headline"], after["headline"]),
        ("device_name", *(f["environment"]["device_name"] for f in (before, after))),
    ):
        if one != other:
            raise ValueError(f"{name}: got {one!r} and {other!r}, wanted the same in both files")
    old, new = _figures(before), _figures(after)
    result = {}
    for key in old:
        if key in new:
            noise = max(_spread(old[key]), _spread(new[key]))
            result[key] = Ratio(old[key]["median_s"], new[key]["median_s"], noise)
    return result


def text(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> str:
    """The ratios as a table, the largest changes first, and what only one file has.

    Args:
        before, after: valid files.
        names: what to call them.
    """
    found = ratios(before, after)
    lines = [
        f"{name}: {next(table.heading(f))}" for name, f in zip(names, (before, after), strict=True)
    ]
    for name, f in zip(names, (before, after), strict=True):
        lines += [f"{name}: {remark}" for remark in list(table.heading(f))[1:]]
        lines += [
            f"{name}: {row['case']} {table.setting(row)} {row['impl']}: "
            f"{row['status'].upper()}: {row['reason']}"
            for row in f["results"]
            if row["status"] not in (schema.OK, *schema.NOT_RUN)
        ]
    lines.append("")
    if not found:
        return "\n".join([*lines, "The two have no case in common."])
    width = max(len(" ".join(key)) for key in found)
    lines.append(f"{'':{width}}  {'before':>9}  {'after':>9}  after/before")
    for key, r in sorted(found.items(), key=lambda item: item[1].ratio):
        remark = "" if r.differs else "  within the noise"
        lines.append(
            f"{' '.join(key):{width}}  {seconds(r.before):>9}  {seconds(r.after):>9}"
            f"  {r.ratio:12.3f}{remark}"
        )
    missing = len(set(_figures(before)) ^ set(_figures(after)))
    middle = statistics.geometric_mean([r.ratio for r in found.values()])
    lines.append(f"{len(found)} figures, geometric mean of the ratios {middle:.3f}")
    if missing:
        lines.append(f"{missing} figures are in one file only")
    return "\n".join(lines)


def compare(one: str, other: str, options: Sequence[str], repository: Path) -> str:
    """The comparison of two files, or of two commits that are measured now.

    Args:
        one, other: paths of result files, or commits of ``repository``.
        options: of ``python -m benchmarks.harness``, for measuring commits.
        repository: a git checkout; used for commits only.

    Raises:
        ValueError: neither a file nor a commit, a file that cannot be compared, or a commit that
            cannot be measured.
    """
    if Path(one).is_file() and Path(other).is_file():
        return text(schema.load(Path(one)), schema.load(Path(other)), (one, other))
    commits = [_commit(name, repository) for name in (one, other)]
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rpg-kernels-bench-") as folder:
        trees = [Path(folder) / f"tree{i}" for i in range(2)]
        try:
            for tree, commit in zip(trees, commits, strict=True):
                _git(repository, "worktree", "add", "--detach", str(tree), commit)
                notes += _build(tree, commit)
            records = _measure(trees, options, Path(folder))
        finally:
            for tree in trees:
                _git(repository, "worktree", "remove", "--force", str(tree), check=False)
    return "\n".join([*notes, text(*records, names=(one, other))])


def merge(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs of one commit as one: of every figure the run with the smallest median.

    Other work on the machine only ever adds time.
    """
    best: dict[str, Any] = {**runs[0]}
    # Once wrong is wrong.
    for run in runs[1:]:
        for row, other in zip(best["results"], run["results"], strict=False):
            if row["status"] == schema.OK and other["status"] != schema.OK:
                row.update(status=other["status"], reason=other["reason"], times={})
    figures = [_figures(run) for run in runs]
    for row in best["results"]:
        for kind, states in row["times"].items():
            for state, clocks in states.items():
                key = (row["case"], table.setting(row), row["impl"], kind, state)
                known = [f[key] for f in figures if key in f]
                clock = best["headline"]
                if known and clock in clocks:
                    clocks[clock] = min(known, key=lambda f: float(f["median_s"]))
    return best


def _measure(
    trees: Sequence[Path], options: Sequence[str], folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    runs: list[list[dict[str, Any]]] = [[], []]
    for round_ in range(_ROUNDS):
        for i, tree in enumerate(trees):
            out = folder / f"{i}-{round_}.json"
            # Before the harness had a place of its own, the package held it.
            moved = (tree / "benchmarks" / "harness").is_dir()
            name = ("benchmarks.harness",) if moved else ("rpg_kernels.cli", "bench")
            done = subprocess.run(
                [sys.executable, "-m", *name, *options, "--out", str(out)],
                cwd=tree,
                env=_environment(tree),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            if not out.exists():
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ValueError(f"the benchmark of {tree.name} failed: {last}")
            runs[i].append(schema.load(out))
    return merge(runs[0]), merge(runs[1])


def _environment(tree: Path) -> dict[str, str]:
    """This process's, with the sources of a commit before all others."""
    paths = [str(tree), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _build(tree: Path, commit: str) -> list[str]:
    """Build a commit's native part where it has one; a remark where that fails.

    Without it the commit still runs, and may be much slower.
    """
    if not (tree / "csrc").is_dir():
        return []
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if not done.returncode:
        return []
    reasons = [line for line in done.stdout.splitlines() if "error" in line.lower()]
    return [f"{commit[:12]}: measured WITHOUT its native part: {(reasons or ['it failed'])[0]}"]


def _commit(name: str, repository: Path) -> str:
    found = _git(repository, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", check=False)
    if not found:
        raise ValueError(f"compare: got {name!r}, wanted two result files, or two commits of git")
    return found


def _git(repository: Path, *arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        ["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise ValueError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip() if done.returncode == 0 else ""


def _figures(record: Mapping[str, Any]) -> dict[Key, Mapping[str, Any]]:
    """Every headline figure by what was measured."""
    found: dict[Key, Mapping[str, Any]] = {}
    for row in record["results"]:
        for kind, states in row["times"].items():
            for state in (COLD, WARM):
                # Of the headline's clock only: figures of two clocks make no ratio.
                figure = states.get(state, {}).get(record["headline"])
                if figure is not None:
                    if not figure["median_s"]:
                        name = f"{row['case']} {row['impl']} {kind} {state}"
                        raise ValueError(f"median_s: got 0 for {name}, wanted a time")
                    found[row["case"], table.setting(row), row["impl"], kind, state] = figure
    return found


def _spread(figure: Mapping[str, Any]) -> float:
    return float((figure["q90_s"] - figure["q10_s"]) / figure["median_s"])
