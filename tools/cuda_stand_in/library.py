"""Builds the stand-in's library, and the package's native module for it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/cuda_stand_in"
NAME = "libcuda.so.1"
PACKAGES = Path(sysconfig.get_paths()["purelib"])  # of this Python

_ASKED = re.compile(r"(?:cuda[A-Z]|__cuda|cu[A-Z]|cublas)\w*")
# Entry points of the driver that torch looks up by name, as text in its libraries.
_DRIVER = re.compile(
    rb"\0(cu(?:Ctx|Device|Func|Launch|Link|Mem|Module|Multicast|Stream|Tensor)\w+)(?=\0)"
)


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++")


def includes() -> Path | None:
    """The folder of cuda.h: of the nvcc on PATH, or of NVIDIA's packages for Python."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1]] if nvcc else []
    folders += [Path("/usr/local/cuda"), *PACKAGES.glob("nvidia/cu1*")]
    found = (folder / "include" for folder in folders)
    return next((folder for folder in found if (folder / "cuda_runtime_api.h").exists()), None)


def torch_libraries() -> list[Path]:
    return sorted((PACKAGES / "torch/lib").glob("*.so"))


def runtime() -> Path | None:
    """The libcudart that torch brings."""
    return next(PACKAGES.glob("nvidia/*/lib/libcudart.so.1*"), None)


def compile_library(to: Path, stubs: Iterable[str] = (), *options: str) -> None:
    """Compile the sources and a stub for each entry point that they lack.

    Raises:
        RuntimeError: there is no C++ compiler or no cuda.h, or it fails.
    """
    program, headers = compiler(), includes()
    if program is None or headers is None:
        raise RuntimeError("the stand-in needs a C++ compiler and CUDA's headers (nvcc on PATH)")
    to.parent.mkdir(parents=True, exist_ok=True)
    stub_file = to.parent / "stubs.cpp"
    stub_file.write_text(_stub_source(stubs), encoding="utf-8")
    command = [
        *(program, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
        *(*options, f"-I{headers}", "-shared", f"-Wl,-soname,{NAME}", "-o", str(to)),
        *(*map(str, sorted(HERE.glob("*.cpp"))), str(stub_file), "-ldl"),
        # It is loaded into every program of the command, so it brings all that it needs.
        *("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"),
    ]
    _run(command)


def _stub_source(names: Iterable[str]) -> str:
    """Without CUDA's headers, whose declarations these would contradict.

    What of cuBLAS is not looked at succeeds without doing anything. Everything else is not
    supported, and says so once.
    """
    lines = ['extern "C" int cuda_stand_in_missing(const char* name);']
    for name in sorted(names):
        value = "0" if name.startswith("cublas") else f'cuda_stand_in_missing("{name}")'
        lines.append(
            f'extern "C" __attribute__((visibility("default"))) int {name}() {{ return {value}; }}'
        )
    return "\n".join(lines) + "\n"


def wanted() -> set[str]:
    """Every entry point that torch's libraries ask for, and all of libcudart."""
    names: set[str] = set()
    for path in torch_libraries():
        names |= _symbols(path, "--undefined-only")
    for path in torch_libraries():
        if path.name in ("libc10_cuda.so", "libtorch_cuda.so"):
            names |= {found.decode() for found in _DRIVER.findall(path.read_bytes())}
    if (path_of_runtime := runtime()) is not None:
        names |= _symbols(path_of_runtime, "--defined-only")
    return names


def _symbols(path: Path, which: str) -> set[str]:
    lines = _run(["nm", "--dynamic", which, str(path)]).splitlines()
    names = {line.split()[-1].partition("@")[0] for line in lines}
    return {
        name
        for name in names
        # cuFile is a library of its own; _ptsz and _ptds are of a way of compiling not used here.
        if _ASKED.fullmatch(name) and not re.search("^cuFile|_pt[ds][sz]$", name)
    }


def library() -> Path:
    """The folder of the library, which is built if it is missing or older than its sources."""
    path = BUILD / "lib" / NAME
    sources = [*HERE.glob("*.cpp"), *HERE.glob("*.h"), HERE / "library.py", *torch_libraries()]
    if not path.exists() or path.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        print("cuda_stand_in: building the library", file=sys.stderr)
        compile_library(path.with_name("alone.so"))
        own = _symbols(path.with_name("alone.so"), "--defined-only")
        compile_library(path.with_name("new.so"), wanted() - own)
        path.with_name("new.so").replace(path)
        link = path.with_name("libcuda.so")  # the name that linkers, and Triton, look for
        link.unlink(missing_ok=True)
        link.symlink_to(NAME)
    return path.parent


def native(capability: str) -> Path:
    """The package's native module with its CUDA kernels and the shared libcudart, up to date.

    It is not the checkout's own, which has a static one and belongs to another environment.
    """
    import pybind11

    architecture = {"9.0": "90a"}.get(capability, capability.replace(".", ""))
    build = BUILD / f"native-{architecture}"
    options = {
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build / "out",
        "CMAKE_CUDA_RUNTIME_LIBRARY": "Shared",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "RPG_CUDA": "ON",
        "RPG_CUDA_ARCHITECTURES": f"{architecture}-real",
        "RPG_ISAS": "native",
        "RPG_SIMT": "ON",  # for tests of the kernels of docs/ladder.md
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    defines = [f"-D{name}={value}" for name, value in options.items()]
    print("cuda_stand_in: building the native module", file=sys.stderr)
    _run(["cmake", "-S", str(ROOT), "-B", str(build), *generator, *defines])
    _run(["cmake", "--build", str(build), "--parallel"])
    return next((build / "out").glob("_native.*"))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout
