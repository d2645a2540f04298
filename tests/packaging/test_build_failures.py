"""Builds that fail: pip, as everybody calls it, shows the reason and the way around it."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clean_room
import pytest
from clean_room import (
    BUILDS,
    CMAKE,
    COMPILER,
    NVCC,
    Room,
    needs_compiler,
    needs_nvcc,
    needs_setuptools,
    script,
)

pytestmark = needs_setuptools

WAY_OUT = "RPG_KERNELS_BUILD=python installs without anything compiled"
HOW = ("--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_room.copy_source(tmp_path_factory.mktemp("clean") / "rpg-kernels")


@pytest.fixture
def source(clean: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clean, tmp_path / "checkout")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(tmp_path_factory.mktemp("room")).link(*BUILDS)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_room.quick_compiler(tmp_path_factory)


def refused(room: Room, *source: str | Path, **changes: Any) -> str:
    """What pip's output ends with, having shown the way out; no traceback hides the reason."""
    done = room.pip("install", *HOW, *source, **changes)
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert "Traceback" not in said
    assert not (room.site / "rpg_kernels").exists()
    found = re.search(rf"error: rpg-kernels: (.*)\n\s*rpg-kernels: {WAY_OUT}", said)
    assert found, said
    return found[1]


@needs_compiler
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('echo "c++: fatal error: no licence" >&2; exit 1', "failed: .*: fatal error: no licence$"),
        ("exit 1", r'The C\+\+ compiler ".*" is not able to compile a simple test program'),
        ("kill -SEGV $$", r"is not able to compile a simple test program.* Segmentation fault"),
    ],
    ids=["says why", "silent", "crashes"],
)
def test_a_compiler_that_fails(
    body: str, reason: str, room: Room, source: Path, tmp_path: Path
) -> None:
    broken = script(tmp_path / "c++", body)
    said = refused(room, source, CXX=broken)
    assert said.startswith("configuring the native module failed: ")
    assert re.search(reason, said)


@needs_compiler
def test_a_compiler_that_fails_at_one_file(
    room: Room, source: Path, compiler: Path, tmp_path: Path
) -> None:
    error = 'echo "c++: error: out of memory" >&2; exit 1'
    body = f'case "$*" in *csrc/bindings/module.cpp*) {error};; esac'
    broken = script(tmp_path / "c++", f'{body}\nexec {compiler} "$@"')
    said = refused(room, source, CXX=broken, RPG_KERNELS_BUILD="cpu")
    assert said == "compiling the native module failed: c++: error: out of memory"


@needs_compiler
def test_an_error_in_the_source(room: Room, source: Path, compiler: Path) -> None:
    with (source / "csrc" / "law" / "ring.h").open("a") as file:
        file.write("inline int broken() { return not_declared; }\n")
    said = refused(room, source, CXX=compiler, RPG_KERNELS_BUILD="cpu")
    where = r"ring\.h:\d+:\d+: error: \W*not_declared"
    assert re.match(rf"compiling the native module failed: \S*{where}", said)
    assert said.count("error:") == 1, "once for every instruction set"


@needs_compiler
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('echo "Cuda compilation tools, release 11.0, V11.0.194"',
         "nvcc is version 11.0, wanted 12.0 or later"),
        ('echo "nvcc fatal   : no licence" >&2; exit 1', "nvcc fatal   : no licence"),
        ("kill -SEGV $$", "SIGSEGV"),
        ("true", "nvcc is version 0.0, wanted 12.0 or later"),
        ('echo "release 13.0, sm_70"', "knows none of sm_80, sm_86"),
    ],
    ids=["too old", "says why", "crashes", "says nothing", "knows no GPU of ours"],
)  # fmt: skip
def test_an_nvcc_that_cannot_be_used(
    body: str, reason: str, room: Room, source: Path, tmp_path: Path
) -> None:
    broken = script(tmp_path / "nvcc", body)
    assert reason in refused(room, source, CUDACXX=broken)


@needs_compiler
def test_cuda_home_comes_before_the_path(room: Room, source: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    old = script(tmp_path / "bin" / "nvcc", "echo release 11.8")
    said = refused(room, source, CUDA_HOME=tmp_path)
    assert said == f"{old} is version 11.8, wanted 12.0 or later"


@needs_compiler
@needs_nvcc
def test_an_nvcc_that_refuses_the_compiler(room: Room, source: Path, tmp_path: Path) -> None:
    real = shutil.which("nvcc")
    known = f'case "$*" in *--version*|*--list-gpu*) exec {real} "$@";; esac\n{real} --dryrun "$@"'
    why = "host_config.h:132:2: error: #error -- unsupported GNU version!"
    broken = script(tmp_path / "nvcc", f"{known}\necho '{why}' >&2; exit 1")
    said = refused(room, source, CUDACXX=broken)
    assert said == f"configuring the native module failed: {why}"


@needs_compiler
@needs_nvcc
@pytest.mark.parametrize(
    ("asked", "reason"),
    [("42", "Unsupported gpu architecture 'compute_42'"), ("hopper", "hopper is not one of")],
)
def test_architectures_that_nvcc_does_not_know(
    asked: str, reason: str, room: Room, source: Path
) -> None:
    assert reason in refused(room, source, RPG_KERNELS_CUDA_ARCHITECTURES=asked)


@pytest.mark.parametrize("variable", ["CXX", "CUDACXX"])
def test_a_tool_that_is_named_and_not_there(
    variable: str, room: Room, source: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "bin" / "missing"
    if variable == "CUDACXX" and not clean_room.CXX:
        pytest.skip("without a C++ compiler nobody looks for nvcc")
    said = refused(room, source, **{variable: missing})
    assert said == f"{variable}: got '{missing}', wanted a program that is there"


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_a_compiler_that_is_asked_for_and_not_there(
    mode: str, room: Room, source: Path, tmp_path: Path
) -> None:
    path = clean_room.path_without(tmp_path / "bin", COMPILER)
    said = refused(room, source, RPG_KERNELS_BUILD=mode, PATH=path)
    assert said.startswith(f"RPG_KERNELS_BUILD={mode}: no C++ compiler was found")
    assert "install g++ or clang++" in said


@needs_compiler
def test_an_nvcc_that_is_asked_for_and_not_there(room: Room, source: Path, tmp_path: Path) -> None:
    path = clean_room.path_without(tmp_path / "bin", NVCC)
    said = refused(room, source, RPG_KERNELS_BUILD="cuda", PATH=path)
    assert said.startswith("RPG_KERNELS_BUILD=cuda: no CUDA kernels: nvcc was not found")
    assert "put it on PATH or set CUDA_HOME" in said


def test_a_mode_that_does_not_exist(room: Room, source: Path) -> None:
    said = refused(room, source, RPG_KERNELS_BUILD="gpu")
    assert said == "RPG_KERNELS_BUILD: got 'gpu', wanted auto, python, cpu or cuda"


@needs_compiler
def test_without_cmake(room: Room, source: Path, tmp_path: Path) -> None:
    path = clean_room.path_without(tmp_path / "bin", CMAKE)
    said = refused(room, source, PATH=path)
    assert said == "cmake: got none, wanted 3.24 or later (`pip install cmake`)"
    script(tmp_path / "bin" / "cmake", "echo cmake version 3.20.1")
    said = refused(room, source, PATH=path)
    assert said.startswith(f"cmake: got {path}/cmake of version 3.20, wanted 3.24 or later")


@needs_compiler
def test_without_pybind11(source: Path, tmp_path: Path) -> None:
    room = Room(tmp_path / "room").link("setuptools")
    assert refused(room, source) == "pybind11 is missing (`pip install pybind11`)"


@needs_compiler
def test_what_a_failed_build_leaves_is_not_in_the_way(
    room: Room, source: Path, compiler: Path, tmp_path: Path
) -> None:
    """First another compiler and make, then this one and, where there is one, ninja."""
    path = clean_room.path_without(tmp_path / "bin", re.compile("ninja"))
    broken = script(tmp_path / "c++", "exit 1")
    refused(room, source, CXX=broken, PATH=path)
    wheel = room.wheel(source, tmp_path / "wheel", CXX=compiler, RPG_KERNELS_BUILD="cpu")
    assert clean_room.native_tag() in wheel.name


@pytest.fixture
def read_only(source: Path) -> Iterator[Path]:
    """A checkout that the next process cannot write to, root neither."""
    probe = "import os, sys; sys.exit(os.access(sys.argv[1], os.W_OK))"
    folders = [source, *(path for path in source.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        python = Path(shutil.which("python3") or "python3")
        done = clean_room.run(python, "-c", probe, source, before=clean_room.obey_permissions)
        if done.returncode:
            pytest.skip("permissions do not bind this user")
        yield source
    except subprocess.SubprocessError:
        pytest.skip("the rights of root cannot be given up")
    finally:
        for folder in folders:
            folder.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("mode", ["python", pytest.param("cpu", marks=needs_compiler)])
def test_a_checkout_that_cannot_be_written_to(
    mode: str, room: Room, read_only: Path, compiler: Path, tmp_path: Path
) -> None:
    how = ("wheel", *HOW, "-w", tmp_path / "wheel", read_only)
    changes: dict[str, Any] = {"RPG_KERNELS_BUILD": mode, "CXX": compiler, "TMPDIR": tmp_path}
    done = room.pip(*how, before=clean_room.obey_permissions, **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    assert ("none-any" if mode == "python" else clean_room.native_tag()) in wheel.name
    assert not list(read_only.glob("build")) + list(read_only.glob("*.egg-info"))
    assert not list(tmp_path.glob("rpg-kernels-*")), "a build folder is left over"


def test_an_editable_install_that_cannot_write(room: Room, read_only: Path) -> None:
    said = refused(room, "--editable", read_only, before=clean_room.obey_permissions)
    assert "Permission denied: 'rpg_kernels/native/_native_build.json'" in said
    assert said.endswith("an editable install writes there, another does not")


def test_a_file_in_the_place_of_the_build_folder(room: Room, source: Path, tmp_path: Path) -> None:
    (source / "build").write_text("")
    room.wheel(source, tmp_path / "wheel", RPG_KERNELS_BUILD="python")


@needs_compiler
def test_the_way_out(source: Path, tmp_path: Path) -> None:
    """The switch that every refusal names, where nothing works that a build needs."""
    path = clean_room.path_without(tmp_path / "bin", CMAKE)
    broken = script(tmp_path / "broken", "exit 1")
    room = Room(tmp_path / "room").link("setuptools")
    refused(room, source, CXX=broken, CUDACXX=broken, PATH=path)
    way_out = {"RPG_KERNELS_BUILD": "python", "CXX": broken, "CUDACXX": broken, "PATH": path}
    room.install(*HOW, source, **way_out)
    record = (room.site / "rpg_kernels" / "native" / "_native_build.json").read_text("utf-8")
    reason = "RPG_KERNELS_BUILD=python was set when it was installed"
    assert json.loads(record) == {"reason": reason}
    assert list((room.site / "rpg_kernels" / "native").glob("_native.*")) == []


@pytest.mark.parametrize("inplace", [True, False])
def test_a_build_in_place_is_one_for_development(
    inplace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For this machine alone, with what tests need; setuptools forgets "in place" on the way."""
    from setuptools import Distribution, Extension

    from tools import build_backend as backend

    asked: list[str] = []

    def run(self: Any, command: list[str]) -> None:
        asked.extend(command)
        out = Path(self.build_temp) / "native" / "out"
        out.mkdir(parents=True, exist_ok=True)
        (out / Path(self.get_ext_fullpath("pkg.module")).name).write_text("compiled")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    monkeypatch.setattr(backend, "plan", lambda: backend.Plan("c++", "nvcc"))
    monkeypatch.setattr(backend, "_version", lambda *_: (13, 0))
    monkeypatch.setattr(backend, "_own_gpu", lambda: "90a")
    monkeypatch.setattr(backend, "_output", lambda *_: "sm_80 sm_90 sm_120")
    monkeypatch.setattr(backend.BuildNative, "_run", run)
    monkeypatch.delenv("RPG_KERNELS_CUDA_ARCHITECTURES", raising=False)
    extension = Extension("pkg.module", [])
    build = backend.BuildNative(
        Distribution({"name": "pkg", "packages": ["pkg"], "ext_modules": [extension]})
    )
    build.inplace = inplace
    build.ensure_finalized()
    build.run()
    options = dict(word[2:].split("=", 1) for word in asked if word.startswith("-D"))
    assert options["RPG_SIMT"] == ("ON" if inplace else "OFF")
    assert options["RPG_ISAS"] == ("native" if inplace else "avx512;avx2;baseline")
    assert (options["RPG_CUDA_ARCHITECTURES"] == "90a-real") is inplace
