"""The build backend: setuptools, and CMake for the native module where there is a C++ compiler.

Environment variables, see CONTRIBUTING.md::

    RPG_KERNELS_BUILD               auto (default): C++ if there is a compiler, CUDA if there is
                                    nvcc; python: neither; cpu: C++ only; cuda: both
    RPG_KERNELS_CUDA_ARCHITECTURES  such as "90a-real;120", as CMAKE_CUDA_ARCHITECTURES

A tool that is missing is left out (auto) and written down for `rpg-kernels doctor`. A tool that
is there and fails stops the installation, with the reason and the way around it.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Command, Extension, build_meta
from setuptools.build_meta import *  # noqa: F403  every hook that is not defined here
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "rpg_kernels"
MODULE = f"{PACKAGE}.native._native"
RECORD = "_native_build.json"  # rpg_kernels/native reads it
CMAKE = (3, 24)
NVCC = (12, 0)
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")  # of a release; the last one also as PTX
ONE_ARCHITECTURE = "90a"  # of a development install where no GPU says better
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ."
WAY_OUT = (
    "RPG_KERNELS_BUILD=python installs without anything compiled, "
    "RPG_KERNELS_BUILD=cpu without CUDA."
)


class BuildError(SystemExit):
    """The native module cannot be built; says why, and how to install without it.

    It ends the build without a traceback, so that pip's output ends with the reason.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"error: rpg-kernels: {reason}\nrpg-kernels: {WAY_OUT}")


@dataclass(frozen=True)
class Plan:
    """What will be compiled, and why the rest will not."""

    cxx: str | None  # C++ compiler as CMake takes it; None: pure Python
    nvcc: str | None
    reason: str = ""  # why nothing is compiled
    note: str = ""  # why CUDA is not

    def record(self) -> dict[str, str]:
        """What the installed package can tell about its build."""
        return {k: v for k, v in (("reason", self.reason), ("note", self.note)) if v}


def plan() -> Plan:
    """Decide from the environment what to compile.

    Raises:
        BuildError: a tool that was asked for is missing, or RPG_KERNELS_BUILD is not known.
    """
    mode = os.environ.get("RPG_KERNELS_BUILD", "auto")
    if mode not in ("auto", "python", "cpu", "cuda"):
        raise BuildError(f"RPG_KERNELS_BUILD: got {mode!r}, wanted auto, python, cpu or cuda")
    if mode == "python":
        return Plan(None, None, reason="RPG_KERNELS_BUILD=python was set when it was installed")
    if sys.platform not in ("linux", "darwin"):
        reason = f"the native module is built on Linux and macOS only, not on {sys.platform}"
        cxx = None
    else:
        cxx = _asked("CXX") or _which("c++", "g++", "clang++")
        reason = (
            "no C++ compiler was found when it was installed; install g++ or clang++, then "
            f"`{REINSTALL}` in the source folder"
        )
    if cxx is None:
        if mode != "auto":
            raise BuildError(f"RPG_KERNELS_BUILD={mode}: {reason}")
        return Plan(None, None, reason=reason)
    if mode == "cpu":
        return Plan(cxx, None, note="no CUDA kernels: RPG_KERNELS_BUILD=cpu was set")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = _asked("CUDACXX") or _which(f"{home}/bin/nvcc" if home else None, "nvcc")
    if nvcc is None:
        note = (
            "no CUDA kernels: nvcc was not found; put it on PATH or set CUDA_HOME, then "
            f"`{REINSTALL}` in the source folder"
        )
        if mode == "cuda":
            raise BuildError(f"RPG_KERNELS_BUILD=cuda: {note}")
        return Plan(cxx, None, note=note)
    return Plan(cxx, nvcc)


def _which(*names: str | None) -> str | None:
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _asked(variable: str) -> str | None:
    """The tool that a variable names, as CMake takes it: "ccache g++" is two words."""
    words = shlex.split(os.environ.get(variable, ""))
    if not words:
        return None
    if (path := shutil.which(words[0])) is None:
        raise BuildError(f"{variable}: got {words[0]!r}, wanted a program that is there")
    return ";".join([path, *words[1:]])


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or getattr(error, "stdout", None) or "").strip()
        raise BuildError(f"{' '.join(command)} failed: {detail or error}") from error
    return done.stdout


def _version(*command: str) -> tuple[int, int]:
    """The first X.Y that a tool prints of itself, after "release" where it says so."""
    text = _output(*command)
    found = re.search(r"release (\d+)\.(\d+)", text) or re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def cuda_architectures(nvcc: str, one: bool) -> str:
    """CMAKE_CUDA_ARCHITECTURES: those asked for, one for development, or a release's.

    Raises:
        BuildError: nvcc is too old, or knows none of them.
    """
    command = nvcc.split(";")
    version = _version(*command, "--version")
    if version < NVCC:
        wanted = "{}.{}".format(*NVCC)
        raise BuildError(f"{nvcc} is version {version[0]}.{version[1]}, wanted {wanted} or later")
    if asked := os.environ.get("RPG_KERNELS_CUDA_ARCHITECTURES"):
        return asked
    if one:
        return f"{_own_gpu() or ONE_ARCHITECTURE}-real"
    known = _output(*command, "--list-gpu-code").split()
    names = [name for name in ARCHITECTURES if f"sm_{name.rstrip('a')}" in known]
    if not names:
        raise BuildError(f"{nvcc} knows none of sm_{', sm_'.join(ARCHITECTURES)}")
    return ";".join([*(f"{name}-real" for name in names[:-1]), names[-1]])


def _own_gpu() -> str:
    """The architecture of this machine's first GPU; "" where there is none."""
    if shutil.which("nvidia-smi"):
        query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        try:
            capability = _output(*query).split()
        except BuildError:
            capability = []
        if capability:
            name = capability[0].replace(".", "")
            return "90a" if name == "90" else name
    return ""


class BuildNative(build_ext):
    """build_ext by CMake."""

    def run(self) -> None:
        # setuptools takes "in place" back before it builds, and copies what was built itself.
        self.development = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        wanted = plan()
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        for folder in (module.parent, build):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BuildError(f"cannot make the build folder {folder}: {error}") from error
            if not os.access(folder, os.W_OK):
                raise BuildError(f"cannot write to the build folder {folder}")
        cmake = _which("cmake")
        if cmake is None or (version := _version(cmake, "--version")) < CMAKE:
            got = "none" if cmake is None else f"{cmake} of version {version[0]}.{version[1]}"
            raise BuildError(f"cmake: got {got}, wanted 3.24 or later (`pip install cmake`)")
        try:
            import pybind11
        except ImportError as error:
            raise BuildError("pybind11 is missing (`pip install pybind11`)") from error
        options = {
            "CMAKE_CXX_COMPILER": wanted.cxx,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build / "out",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "RPG_ISAS": "native" if self.development else "avx512;avx2;baseline",
            "RPG_CUDA": "ON" if wanted.nvcc else "OFF",
            "RPG_SIMT": "ON" if self.development else "OFF",  # tests run it, users do not
        }
        if wanted.nvcc:
            options["CMAKE_CUDA_COMPILER"] = wanted.nvcc
            if wanted.cxx and ";" not in wanted.cxx:  # nvcc takes a program, not "ccache g++"
                options["CMAKE_CUDA_HOST_COMPILER"] = wanted.cxx
            options["RPG_CUDA_ARCHITECTURES"] = cuda_architectures(wanted.nvcc, self.development)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        defines = [f"-D{name}={value}" for name, value in options.items()]
        # Fresh: what an earlier build found (another compiler, generator, pip's cmake) is not kept.
        self._run([cmake, "--fresh", "-S", str(ROOT), "-B", str(build), *generator, *defines])
        self._run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)])
        shutil.copy(build / "out" / module.name, module)

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        print(done.stdout)
        if done.returncode:
            step = "compiling" if "--build" in command else "configuring"
            raise BuildError(f"{step} the native module failed: {_reason(done.stdout)}")


def _reason(said: str) -> str:
    """What a compiler, or else CMake, gave as its reason among all that was said."""
    reasons = re.findall(r"^.*(?:\berror|\bfatal|undefined reference)\b.*:.*$", said, re.MULTILINE)
    if not reasons:
        reasons = re.findall(r"^CMake Error.*?(?=^Call Stack|^-- |\Z)", said, re.M | re.S)
    different = list(dict.fromkeys(reasons))[:3] or [said[-2000:]]
    return " ".join("\n".join(different).split())[:2000]


class BuildPython(build_py):
    """build_py, and the record of what was compiled."""

    def run(self) -> None:
        made = plan()
        for line in made.record().values():
            print(f"rpg-kernels: {line}")
        # What an earlier build left would be another version's.
        if self.editable_mode:
            folder = Path(self.get_package_dir(PACKAGE)) / "native"
            for stale in folder.glob("_native.*") if made.cxx is None else ():
                stale.unlink()
        else:
            folder = Path(self.build_lib) / PACKAGE
            if folder.resolve() == ROOT / PACKAGE:
                raise BuildError(f"build_lib: got {self.build_lib}, which holds the sources")
            shutil.rmtree(folder, ignore_errors=True)
            folder /= "native"
        super().run()
        try:
            (folder / RECORD).write_text(json.dumps(made.record()) + "\n", encoding="utf-8")
        except OSError as error:
            raise BuildError(
                f"{error}; an editable install writes there, another does not"
            ) from error


def _elsewhere() -> dict[str, dict[str, str]]:
    """Options that keep setuptools out of the source folder, where it cannot write to that."""
    own = [ROOT / "build", ROOT / f"{PACKAGE}.egg-info"]
    if all(os.access(f"{path}/" if path.exists() else ROOT, os.W_OK) for path in own):
        return {}
    folder = tempfile.mkdtemp(prefix="rpg-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(f"rpg-kernels: cannot write to {ROOT}, building in {folder}")
    return {"build": {"build_base": folder}, "egg_info": {"egg_base": folder}}


def arguments() -> dict[str, Any]:
    """What setup.py passes to setuptools."""
    commands: dict[str, type[Command]] = {"build_ext": BuildNative, "build_py": BuildPython}
    modules = [Extension(MODULE, [])] if plan().cxx else []
    return {"cmdclass": commands, "ext_modules": modules, "options": _elsewhere()}


def _requires() -> list[str]:
    """What compiling needs beside a compiler, where the machine does not have it."""
    if plan().cxx is None:
        return []
    cmake = _which("cmake")
    has_cmake = cmake is not None and _version(cmake, "--version") >= CMAKE
    has_builder = _which("ninja", "make")
    return [
        "pybind11>=2.13.6",
        *([] if has_cmake else ["cmake>=3.24"]),
        *([] if has_builder else ["ninja"]),
    ]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Hook of PEP 517."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_requires()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Hook of PEP 660."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_requires()]
