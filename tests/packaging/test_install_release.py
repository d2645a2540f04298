"""The wheel as it is released: every instruction set and GPU, neither torch nor CUDA needed."""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import clean_room
import pytest
from clean_room import (
    GOLDEN,
    ISAS,
    Room,
    contents,
    device_code,
    has,
    headers,
    look_at,
    needs_compiler,
    needs_nvcc,
    needs_setuptools,
    with_torch,
)

from rpg_kernels._version import __version__

pytestmark = [needs_setuptools, needs_compiler]

STEM = f"rpg_kernels-{__version__}"
INFO = f"{STEM}.dist-info"
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]
ON_X86 = os.uname().machine == "x86_64"

# Bits of the law, unpack and pack: every dtype, granularities on both sides of a vector's width.
RESULTS = """
import hashlib, json, sys, torch, rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.law.ring import LayerLaw
torch.set_num_threads(2)
said = {}
def add(name, tensor):
    copy = tensor.clone(memory_format=torch.contiguous_format)
    said[name] = hashlib.sha256(copy.view(torch.uint8).numpy()).hexdigest()
for name, entry in json.load(open(sys.argv[1]))["entries"].items():
    if "points" in entry:
        law = LayerLaw(**entry["config"])
        n, b = torch.tensor(entry["points"]).unbind(1)
        compiled = native.available()
        add(f"slots, {name}", native.slots(law, n, b) if compiled else law.slot(n, b))
        if law.reflect != "none":
            words = native.sign_words(law, n, b) if compiled else law.sign_words(n, b)
            add(f"sign words, {name}", words)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for granularity in (1, 4, 16, 64):
        for reflect in ("element", "vector", "none"):
            torch.manual_seed(granularity)
            bank = rpg.ParameterBank(
                dof=5000, granularity=granularity, reflect=reflect, seed=5, dtype=dtype
            )
            for shape in ((37, 150), (13, 40, 3, 3)):
                weight = bank.place(shape, scale=0.37)
                name = f"{dtype}, {granularity}, {reflect}, {shape}"
                with torch.no_grad():
                    add(f"unpack, {name}", weight.unpack())
                    add(f"pack, {name}", weight.pack(torch.randn(weight.shape).to(dtype)))
print(json.dumps({"isa": native.build_info().get("isa") if compiled else None, "said": said}))
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (wheel,) = clean_room.release(tmp_path_factory).glob("wheel/*.whl")
    return wheel


@pytest.fixture(scope="module")
def bare(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Room:
    """The released wheel in an environment that has nothing else, not even torch."""
    room = Room(tmp_path_factory.mktemp("bare"))
    room.install("--no-deps", release)
    return room


def test_release(release: Path, bare: Room) -> None:
    files = contents(release)
    assert release.name == f"{STEM}-{clean_room.native_tag()}.whl"
    wheel = headers(files[f"{INFO}/WHEEL"])
    assert wheel["Root-Is-Purelib"] == "false"
    assert wheel.get_all("Tag") == [clean_room.native_tag()]
    compiled = [name for name in files if "_native." in name]
    assert compiled == [f"rpg_kernels/native/{bare.module().name}"]
    found = look_at(bare.module(), bare.python)
    assert found["build"]["isas"] == (list(ISAS) if ON_X86 else ["baseline"])
    assert (found["build"]["simt"], found["parts"]) == (False, ["cuda"])


def test_release_works_without_torch(bare: Room) -> None:
    found = look_at(bare.module(), bare.python)
    assert not found["torch"]
    assert found["wrong"] == []
    assert found["right"] == list(json.loads(GOLDEN.read_text("utf-8"))["entries"])


@needs_nvcc
def test_release_has_code_for_every_gpu(bare: Room) -> None:
    of_releases = (clean_room.ROOT / "csrc" / "cuda").glob("*.cu")
    sources = len([path for path in of_releases if path.stem != "ladder"])
    code = device_code(bare.module())
    assert code == sorted(sources * [*ARCHITECTURES, "compute_120"])
    if shutil.which("cuobjdump"):  # it comes with most toolkits
        listed = clean_room.checked("cuobjdump", "--list-elf", bare.module())
        assert sorted(re.findall(r"sm_\d+a?", listed)) == sorted(sources * ARCHITECTURES)
    told = look_at(bare.module(), bare.python)["build"]["cuda_architectures"]
    assert told == "80-real 86-real 89-real 90a-real 100-real 120"


@needs_nvcc
def test_release_says_when_there_is_no_device(bare: Room) -> None:
    found = look_at(bare.module(), bare.python)
    assert re.match(r"CUDA could not find a device: \w", found["cuda"])


@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf is not on PATH")
def test_release_needs_neither_torch_nor_cuda(bare: Room) -> None:
    module = bare.module()
    dynamic = clean_room.checked("readelf", "--dynamic", "--wide", module)
    libraries = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert any(name.startswith("libc.so") for name in libraries)
    allowed = (
        r"(libc|libm|libgcc_s|libstdc\+\+|libgomp|libpthread|libdl|librt|ld-linux[\w-]*)\.so.*"
    )
    assert [name for name in libraries if not re.fullmatch(allowed, name)] == []
    assert not re.search(r"R(UN)?PATH", dynamic)
    symbols = clean_room.checked("readelf", "--dyn-syms", "--wide", module)
    assert "PyInit__native" in symbols
    assert not re.search(r"torch|N3c10|N2at|\bcu[A-Z]|UND.*\bcuda", symbols)


def test_every_instruction_set_gives_the_same_bits(release: Path, tmp_path: Path) -> None:
    room = with_torch(release, tmp_path / "room").link("numpy")

    def result(isa: str | None) -> dict[str, Any]:
        changes = {"RPG_KERNELS_ISA": isa} if isa else {"RPG_KERNELS_NATIVE": "0"}
        found: dict[str, Any] = json.loads(room.run("-c", RESULTS, GOLDEN, **changes))
        return found

    isas = [isa for isa in ISAS if has(isa)]
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip((None, *isas), pool.map(result, (None, *isas)), strict=True))
    wanted = results.pop(None)["said"]
    assert len(wanted) > 200
    for isa, found in results.items():
        assert found["isa"] == isa
        assert [name for name in wanted if found["said"].get(name) != wanted[name]] == []
