"""Builds and installations in empty environments, for the tests of both."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterable
from email.message import Message
from email.parser import Parser
from importlib import metadata, util
from pathlib import Path
from typing import Any

import processes
import pytest
from filelock import FileLock
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
QUICK_COMPILER = Path(__file__).with_name("quick_compiler.py")
GOLDEN = ROOT / "tests" / "golden" / "law1.json"
ISAS = ("avx512", "avx2", "baseline")  # best first
SOURCE = (
    "rpg_kernels", "csrc", "cmake", "tools", "tests", "docs", "benchmarks", "examples",
    "CMakeLists.txt", "MANIFEST.in", "Makefile", "pyproject.toml", "setup.py", "README.md",
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "constraints-dev.txt",
)  # fmt: skip
MADE = ("__pycache__", "_native.*", "_native_build.json")  # by builds, inside of SOURCE
COMPILER = re.compile(r"(.*-)?(c|g|clang)\+\+(-[\d.]+)?")
NVCC = re.compile(r"nvcc")
CMAKE = re.compile(r"cmake|ninja")
# What would decide about a build beside the test: every test starts without these.
DECIDING = re.compile(
    r"RPG_KERNELS_|CUDA|CMAKE|CXX|CPPFLAGS|LDFLAGS|PYTHON|NVCC|PIP_(QUIET|VERBOSE)"
)
CAPABILITIES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: what lets root write anywhere
PR_CAPBSET_DROP = 24

CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
BUILDS = ("setuptools", "pybind11")

needs_setuptools = pytest.mark.skipif(
    util.find_spec("setuptools") is None, reason="setuptools is not installed"
)
needs_compiler = pytest.mark.skipif(
    not (CXX and shutil.which("cmake") and util.find_spec("pybind11")),
    reason="a C++ compiler, cmake or pybind11 is missing",
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def copy_source(folder: Path) -> Path:
    """The checkout without what builds leave in it."""
    folder.mkdir(parents=True)
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*MADE))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def run(
    *command: str | Path,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    env = environment() if env is None else env
    return processes.run(*command, env=env, cwd=cwd, preexec_fn=before)


def checked(
    *command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> str:
    """What a command writes; fails with all it said."""
    done = run(*command, env=env, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(**changes: str | Path) -> dict[str, str]:
    """The environment without the variables that decide about a build, and with these."""
    kept = {name: value for name, value in os.environ.items() if not DECIDING.match(name)}
    return {**kept, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in changes.items()}}


def path_without(folder: Path, *tools: re.Pattern[str]) -> str:
    """A PATH of one folder, with everything that is on PATH but these tools."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for name in os.listdir(place) if os.path.isdir(place) else ():
            if not any(tool.fullmatch(name) for tool in tools) and not (folder / name).exists():
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(Path(place, name).absolute())
    return str(folder)


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def quick_compiler(factory: pytest.TempPathFactory) -> Path:
    """The C++ compiler without its optimiser, for builds whose speed does not matter.

    A source that it has compiled, by its preprocessed text, comes back from a folder that all
    processes of a run of the tests share.
    """
    body = f'exec {sys.executable} {QUICK_COMPILER} {CXX} {shared(factory) / "objects"} "$@"'
    return script(factory.mktemp("compiler") / "c++", body)


def build_sdist(source: Path, folder: Path) -> Path:
    """The source distribution, by the build backend's own hook."""
    code = "import sys; sys.path.insert(0, 'tools'); import build_backend; "
    checked(sys.executable, "-c", f"{code}build_backend.build_sdist({str(folder)!r})", cwd=source)
    (made,) = folder.glob("*.tar.gz")
    return made


def shared(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of all processes of a run of the tests."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills, once for all processes of a run of the tests."""
    base = shared(factory)
    folder = base / name
    with FileLock(base / f"{name}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a failure left
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


def release(factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of the source distribution: everything compiled, and optimised.

    ``cubins`` in it keeps what nvcc made on the way, and ``*.log`` what ptxas said of it.
    """

    def make(folder: Path) -> None:
        cubins = folder / "cubins"
        cubins.mkdir()
        changes: dict[str, Any] = {}
        if nvcc := shutil.which("nvcc"):
            keeping = f"-lineinfo -Xptxas=-v -Werror=all-warnings --keep --keep-dir={cubins}"
            changes["CUDACXX"] = script(
                folder / "nvcc",
                f'case " $* " in *" -c "*.cu*) ;; *) exec {nvcc} "$@" ;; esac\n'
                f'{nvcc} "$@" {keeping} 2>{cubins}/$$.log\n'
                f"status=$?; cat {cubins}/$$.log >&2; exit $status",
            )
        source = copy_source(folder / "checkout")
        builder = Room(folder / "builder").link(*BUILDS)
        builder.wheel(build_sdist(source, folder), folder / "wheel", **changes)

    return once(factory, "release", make)


class Room:
    """A virtual environment with nothing in it, not even pip."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        checked(python, "-m", "venv", "--without-pip", folder)
        self.folder = folder
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def link(self, *names: str) -> Room:
        """Takes over distributions, and what they require, from the environment of the tests."""
        for name in _with_requirements(names):
            files = metadata.distribution(name).files
            if files is None:
                pytest.skip(f"{name} does not list its files")
            for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
                target = Path(str(metadata.distribution(name).locate_file(top)))
                if target.exists() and not (self.site / top).exists():
                    (self.site / top).symlink_to(target.absolute())
        return self

    def pip(
        self, *words: str | Path, before: Callable[[], None] | None = None, **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        """pip of the environment of the tests, working on this one."""
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python)
        return run(*pip, *words, env=environment(**changes), before=before)

    def wheel(self, source: Path, folder: Path, **changes: Any) -> Path:
        """The wheel of a source, built with what is in this environment."""
        # Not from pip's cache: another test's build of the same file would come back.
        quiet = ("--no-build-isolation", "--no-deps", "--no-cache-dir", "-w", folder)
        done = self.pip("wheel", *quiet, source, **changes)
        assert done.returncode == 0, done.stdout + done.stderr
        (made,) = folder.glob("*.whl")
        return made

    def install(self, *words: str | Path, **changes: Any) -> str:
        """Installs, without looking at any index."""
        done = self.pip("install", "--no-index", "--no-cache-dir", *words, **changes)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def run(self, *words: str | Path, **changes: str | Path) -> str:
        """What Python prints there, started outside of the checkout."""
        return checked(self.python, *words, env=environment(**changes), cwd=self.folder)

    def module(self) -> Path:
        """The native module."""
        (found,) = (self.site / "rpg_kernels" / "native").glob("_native.*.so")
        return found


def _with_requirements(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            for line in metadata.requires(name) or ():
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(requirement.name)
    return found


@functools.cache
def interpreter(version: str) -> str | None:
    """A Python of another version that extensions can be built for."""
    pyenv = Path.home() / ".pyenv" / "versions"
    places = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python{version}")]
    code = (
        "import os, sys, sysconfig, venv; print('%d.%d' % sys.version_info[:2], "
        "os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))"
    )
    for place in filter(None, places):
        if run(str(place), "-c", code).stdout.split() == [version, "True"]:
            return str(place)
    return None


def native_tag(version: tuple[int, int] = sys.version_info[:2]) -> str:
    """The tag of a wheel with a native module: interpreter, its ABI, platform."""
    python = "cp{}{}".format(*version)
    return f"{python}-{python}-{re.sub(r'[-.]', '_', sysconfig.get_platform())}"


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def headers(text: bytes) -> Message:
    return Parser().parsestr(text.decode())


def with_torch(wheel: Path, folder: Path) -> Room:
    """Installed beside what it requires; no index, so it asks for nothing else."""
    room = Room(folder).link("safetensors", "torch")
    room.install(wheel)
    return room


def look_at(module: Path, python: Path) -> dict[str, Any]:
    """What bare_native.py finds of a native module; no GPU is seen."""
    env = environment(CUDA_VISIBLE_DEVICES="")
    bare = Path(__file__).with_name("bare_native.py")
    found: dict[str, Any] = json.loads(checked(python, "-I", bare, module, GOLDEN, env=env))
    return found


def device_code(module: Path) -> list[str]:
    """The machine code (sm_90a) and PTX (compute_120) in a module, read from its fat binary."""
    data = module.read_bytes()
    found = []
    for start in re.finditer(re.escape(struct.pack("<IH", 0xBA55ED50, 1)), data):
        _, _, header, size = struct.unpack_from("<IHHQ", data, start.start())
        at = start.start() + header
        end = at + size
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
            (architecture,) = struct.unpack_from("<I", data, at + 28)
            (flags,) = struct.unpack_from("<Q", data, at + 40)
            suffix = "a" if flags & 0x100000 else ""  # features of this architecture alone
            found.append(f"{'compute' if kind == 1 else 'sm'}_{architecture}{suffix}")
            at += header + size
    return sorted(found)


def has(isa: str) -> bool:
    """True when this machine has the instructions."""
    needed = {
        "avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512cd", "fma", "bmi2"},
        "avx2": {"avx2", "fma", "bmi2"},
        "baseline": set[str](),
    }[isa]
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    return needed <= set(text.split())


def obey_permissions() -> None:
    """For preexec_fn: gives up what lets root write where nobody may."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in CAPABILITIES if os.geteuid() == 0 else ():
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
