"""A native module whose file was cut short: said in a sentence, where the loader would crash."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import processes
import pytest

import rpg_kernels
from rpg_kernels import native
from rpg_kernels.native.elf import cut_short

pytestmark = pytest.mark.skipif(
    not native.available() or sys.platform != "linux", reason=native.why_not() or "not on Linux"
)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return Path(shutil.copy(native.module().__file__, tmp_path / "library.so"))


def cut(path: Path, size: int) -> Path:
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def test_where_a_file_is_cut_short(library: Path) -> None:
    whole = library.stat().st_size
    assert cut_short(library) == ""
    for size in (whole // 2, whole // 100, 4096, 700, 64):  # descending
        missing = cut_short(cut(library, size))
        assert f"{library} has {size} bytes, wanted at least " in missing
    for size in (63, 6, 0):  # no header, which the loader says itself
        assert cut_short(cut(library, size)) == ""


def test_the_least_that_is_wanted_is_enough(library: Path) -> None:
    """What lies behind, the names for a debugger, is not mapped."""
    need = int(cut_short(cut(library, 4096)).rpartition(" ")[2])
    shutil.copy(native.module().__file__, library)
    assert need <= library.stat().st_size
    assert cut_short(cut(library, need)) == ""
    assert cut_short(cut(library, need - 1))


@pytest.mark.parametrize(
    "damage",
    [
        b"not a library at all, though long enough to hold the header of one" * 4,
        b"\x7fELF\x02\x01" + b"\xff" * 100,
        b"\x7fELF\x01\x01" + b"\xff" * 100,
        b"\x7fELF\x02\x01" + bytes(100),
    ],
)
def test_other_files_are_no_error(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(damage)
    cut_short(path)
    assert cut_short(tmp_path / "is not there") == ""
    assert cut_short(tmp_path) == ""


def test_a_package_with_such_a_file_works_without_it(tmp_path: Path) -> None:
    """A process of its own, which would be ended; the doctor says what is the matter."""
    source = Path(rpg_kernels.__file__).parent
    package = tmp_path / "rpg_kernels"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    (module,) = (package / "native").glob("_native*.so")
    cut(module, module.stat().st_size // 2)
    code = """
import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.doctor import environment
print(rpg.ParameterBank(64, granularity=16).place((3, 5)).unpack().shape)
try:
    environment.build()
except RuntimeError as error:
    print(error)
"""
    done = processes.run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shape, said = done.stdout.splitlines()
    assert shape == "torch.Size([3, 5])"
    assert said.startswith(f"the native module cannot be loaded: {module} has ")
    assert said.endswith("; install again")
