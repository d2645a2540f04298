"""Source distribution, wheels and installations, each into an environment of its own."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
from pathlib import Path

import clean_room
import pytest
from clean_room import (
    BUILDS,
    CMAKE,
    COMPILER,
    ISAS,
    NVCC,
    Room,
    contents,
    device_code,
    has,
    headers,
    look_at,
    needs_compiler,
    needs_setuptools,
    with_torch,
)

from rpg_kernels._version import __version__

pytestmark = needs_setuptools

STEM = f"rpg_kernels-{__version__}"
INFO = f"{STEM}.dist-info"
OTHER_PYTHONS = [f"3.{n}" for n in (11, 12, 13) if n != sys.version_info.minor]

# A layer forward and backward, then what the native module says of itself.
USE = """
import json, torch, rpg_kernels as rpg
from rpg_kernels import native
bank = rpg.ParameterBank(dof=640, granularity=16, seed=3)
layer = rpg.nn.Linear(40, 24, bank=bank)
x = torch.linspace(-1, 1, 120).view(3, 40)
layer(x).square().sum().backward()
wanted = torch.nn.functional.linear(x, layer.virtual_weight.unpack(), layer.bias)
torch.testing.assert_close(layer(x), wanted)
assert bank.weight.grad.abs().sum() > 0
said = {"file": rpg.__file__, "why not": native.why_not(), "build": native.build_info()}
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which an earlier version was built."""
    folder = clean_room.copy_source(tmp_path_factory.mktemp("checkout") / "rpg-kernels")
    (folder / "rpg_kernels" / "native" / "_native.cpython-39-other.so").write_bytes(b"stale")
    (folder / "rpg_kernels" / "native" / "_native_build.json").write_text('{"reason": "stale"}')
    for library in ("build/lib", "build/lib.linux-x86_64-cpython-311"):
        (folder / library / "rpg_kernels" / "native").mkdir(parents=True)
        (folder / library / "rpg_kernels" / "renamed_since.py").write_text("")
        (folder / library / "rpg_kernels" / "native" / "_native.cpython-39-other.so").write_bytes(
            b"stale"
        )
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_room.build_sdist(source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(tmp_path_factory.mktemp("builder")).link(*BUILDS)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_room.quick_compiler(tmp_path_factory)


@pytest.fixture(scope="module")
def pure(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it is built where there is neither compiler nor nvcc."""
    folder = tmp_path_factory.mktemp("pure")
    path = clean_room.path_without(folder / "bin", COMPILER, NVCC)
    builder = Room(folder / "room").link("setuptools")
    return builder.wheel(sdist, folder, PATH=path)


def test_sdist_holds_what_a_wheel_needs_and_nothing_else(source: Path, sdist: Path) -> None:
    assert sdist.name == f"{STEM}.tar.gz"
    with tarfile.open(sdist) as archive:
        files = {file.name.removeprefix(f"{STEM}/") for file in archive if file.isfile()}
    paths = [path for folder in ("csrc", "cmake") for path in (source / folder).rglob("*.*")]
    paths += (source / "rpg_kernels").rglob("*.py")
    kept = {str(path.relative_to(source)) for path in paths}
    kept |= {"rpg_kernels/py.typed", "tools/build_backend.py", "CMakeLists.txt", "MANIFEST.in"}
    kept |= {"pyproject.toml", "setup.py", "README.md", "CHANGELOG.md", "LICENSE"}
    made = {name for name in files if name.startswith("rpg_kernels.egg-info/")}
    assert files - made == kept | {"PKG-INFO", "setup.cfg"}


def test_pure_wheel(source: Path, pure: Path) -> None:
    files = contents(pure)
    assert pure.name == f"{STEM}-py3-none-any.whl"
    wheel = headers(files[f"{INFO}/WHEEL"])
    assert (wheel["Root-Is-Purelib"], wheel.get_all("Tag")) == ("true", ["py3-none-any"])
    modules = {str(path.relative_to(source)) for path in (source / "rpg_kernels").rglob("*.py")}
    own = {name for name in files if not name.startswith(f"{INFO}/")}
    # Equal: a folder without __init__.py would be missing, what earlier builds left too much.
    assert own == modules | {"rpg_kernels/py.typed", "rpg_kernels/native/_native_build.json"}
    reason = json.loads(files["rpg_kernels/native/_native_build.json"])["reason"]
    assert "no C++ compiler was found" in reason
    assert "install g++ or clang++" in reason


def test_metadata(pure: Path) -> None:
    files = contents(pure)
    assert f"{INFO}/licenses/LICENSE" in files
    metadata = headers(files[f"{INFO}/METADATA"])
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.11"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["safetensors>=0.8", "torch>=2.11"]
    assert "rpg-kernels = rpg_kernels.cli:main" in files[f"{INFO}/entry_points.txt"].decode()


def test_without_a_compiler(pure: Path, tmp_path: Path) -> None:
    room = with_torch(pure, tmp_path / "room")
    said = json.loads(room.run("-c", USE))
    assert Path(said["file"]).is_relative_to(room.site)
    assert "no C++ compiler was found" in said["why not"]
    assert "install g++ or clang++" in said["why not"]
    assert said["build"] == {"reason": said["why not"]}
    assert __version__ in clean_room.checked(room.folder / "bin" / "rpg-kernels", "--version")


def test_a_used_checkout_leaves_nothing_in_its_wheel(
    source: Path, pure: Path, builder: Room, tmp_path: Path
) -> None:
    used = shutil.copytree(source, tmp_path / "used")
    wheel = builder.wheel(used, tmp_path / "wheel", RPG_KERNELS_BUILD="python")
    assert wheel.name == pure.name
    assert set(contents(wheel)) == set(contents(pure))


@needs_compiler
def test_without_nvcc(sdist: Path, builder: Room, compiler: Path, tmp_path: Path) -> None:
    path = clean_room.path_without(tmp_path / "bin", NVCC)
    wheel = builder.wheel(sdist, tmp_path / "wheel", PATH=path, CXX=compiler)
    assert wheel.name == f"{STEM}-{clean_room.native_tag()}.whl"
    room = with_torch(wheel, tmp_path / "room")
    said = json.loads(room.run("-c", USE))
    assert Path(said["file"]).is_relative_to(room.site)
    assert said["why not"] == ""
    assert (said["build"]["cuda"], said["build"]["simt"]) == ("", False)
    assert "nvcc was not found; put it on PATH or set CUDA_HOME" in said["build"]["note"]
    assert "pip install --force-reinstall" in said["build"]["note"]
    found = look_at(room.module(), room.python)
    assert (found["wrong"], len(found["right"]) > 0) == ([], True)
    assert "built without CUDA kernels" in found["cuda"]


@needs_compiler
@pytest.mark.parametrize("version", OTHER_PYTHONS)
def test_another_python(version: str, sdist: Path, compiler: Path, tmp_path: Path) -> None:
    python = clean_room.interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} with its headers")
    builder = Room(tmp_path / "builder", python).link(*BUILDS)
    wheel = builder.wheel(sdist, tmp_path / "wheel", RPG_KERNELS_BUILD="cpu", CXX=compiler)
    tag = clean_room.native_tag((3, int(version.removeprefix("3."))))
    assert wheel.name == f"{STEM}-{tag}.whl"
    record = json.loads(contents(wheel)["rpg_kernels/native/_native_build.json"])
    assert record == {"note": "no CUDA kernels: RPG_KERNELS_BUILD=cpu was set"}
    room = Room(tmp_path / "room", python)
    room.install("--no-deps", wheel)
    found = look_at(room.module(), room.python)
    assert (found["wrong"], len(found["right"]) > 0) == ([], True)


@needs_compiler
def test_editable(builder: Room, compiler: Path, tmp_path: Path) -> None:
    """One instruction set and one GPU architecture; without a compiler later, none is left."""
    source = clean_room.copy_source(tmp_path / "checkout")
    how = ("--no-build-isolation", "--no-deps", "--editable", source)
    room = Room(tmp_path / "room").link(*BUILDS)
    room.install(*how, CXX=f"env {compiler}")  # as "ccache g++" is given
    (module,) = (source / "rpg_kernels" / "native").glob("_native.*.so")
    found = look_at(module, builder.python)
    assert found["wrong"] == []
    best = next(isa for isa in ISAS if has(isa))
    assert found["build"]["isas"] == [best]
    assert (found["build"]["simt"], found["parts"]) == (True, ["cuda", "simt"])
    if shutil.which("nvcc"):
        sources = list((source / "csrc" / "cuda").glob("*.cu"))
        assert device_code(module) == [own_gpu() or "sm_90a"] * len(sources)
    code = "from importlib import util; print(util.find_spec('rpg_kernels').origin)"
    assert room.run("-c", code).strip() == str(source / "rpg_kernels" / "__init__.py")

    room.install(*how, RPG_KERNELS_BUILD="python")
    assert list((source / "rpg_kernels" / "native").glob("_native.*")) == []
    record = json.loads((source / "rpg_kernels" / "native" / "_native_build.json").read_text())
    assert record["reason"] == "RPG_KERNELS_BUILD=python was set when it was installed"


def own_gpu() -> str:
    """sm_XY of the first GPU; "" where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = clean_room.run(*query)
    name = found.stdout.split()[0].replace(".", "") if found.returncode == 0 else ""
    return {"": "", "90": "sm_90a"}.get(name, f"sm_{name}")


@needs_compiler
def test_build_isolation(sdist: Path, compiler: Path, tmp_path: Path) -> None:
    """pip brings everything but the compiler: setuptools, pybind11, and cmake with ninja."""
    tools = (NVCC, CMAKE, re.compile(r"make"))
    path = clean_room.path_without(tmp_path / "bin", *tools)
    room = Room(tmp_path / "room")
    how = ("install", "--no-deps", "--no-cache-dir", sdist)
    done = room.pip(*how, PATH=path, CXX=compiler, PIP_RETRIES="2")
    said = done.stdout + done.stderr
    if re.search(r"(NewConnection|ConnectTimeout|ReadTimeout|Proxy)Error|name resolution", said):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, said
    found = look_at(room.module(), room.python)
    assert (found["wrong"], len(found["right"]) > 0) == ([], True)


def test_wheel_installs_no_file_outside_its_package(pure: Path, tmp_path: Path) -> None:
    room = Room(tmp_path / "room")
    room.install("--no-deps", pure)
    assert {path.name for path in room.site.iterdir()} == {"rpg_kernels", INFO}
    assert (room.folder / "bin" / "rpg-kernels").exists()
    done = clean_room.run(room.folder / "bin" / "rpg-kernels")
    assert "No module named 'torch'" in done.stderr
