"""The project's own files agree with each other, and the build contains what it should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import processes
import pytest

from rpg_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[2]
BUILT = (
    *("help", "demo", "test", "lint", "bench", "report"),
    *("gpu-check", "triton-check", "stand-in"),
)

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # These tests usually run under make themselves; its flags are not meant for this one.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return processes.run("make", *arguments, cwd=ROOT, env=env)


def test_version_has_one_source() -> None:
    project = tomllib.loads(read("pyproject.toml"))
    assert "version" in project["project"]["dynamic"]
    source = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert source == "rpg_kernels._version.__version__"

    import rpg_kernels

    assert rpg_kernels.__version__ == __version__


def test_installed_version() -> None:
    try:
        installed = metadata.version("rpg-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("rpg-kernels is imported from the checkout, not installed")
    assert installed == __version__


def test_citation_and_changelog_name_the_version() -> None:
    assert re.search(r"^version: (\S+)$", read("CITATION.cff"), re.MULTILINE)[1] == __version__
    headings = re.findall(r"^## \[([^\]]+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert next(name for name in headings if name != "Unreleased") == __version__


def test_constraints_pin_what_the_lint_extra_pins() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    constraints = read("constraints-dev.txt").splitlines()
    assert set(project["optional-dependencies"]["lint"]) <= set(constraints)


def test_every_environment_variable_is_documented() -> None:
    files = [p for d in ("rpg_kernels", "csrc", "tools") for p in (ROOT / d).rglob("*.*")]
    files = [path for path in files if path.suffix in (".py", ".h", ".cpp", ".cu")]
    source = "".join(path.read_text("utf-8") for path in files)
    used = set(re.findall(r"\bRPG_KERNELS_[A-Z_]+\b", source))
    documented = set(re.findall(r"^\| `(RPG_KERNELS_[A-Z_]+)`", read("CONTRIBUTING.md"), re.M))
    assert used == documented


@needs_make
def test_help_is_the_default_and_lists_every_target() -> None:
    listing = make()
    assert listing.returncode == 0
    assert listing.stdout == make("help").stdout
    listed = re.findall(r"^  ([a-z-]+) +\S", listing.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(BUILT)


@needs_make
@pytest.mark.parametrize("target", BUILT)
def test_built_targets_have_a_recipe(target: str) -> None:
    dry_run = make("--dry-run", target)
    assert dry_run.returncode == 0, dry_run.stderr
    assert dry_run.stdout.strip()


def test_ci_script_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
