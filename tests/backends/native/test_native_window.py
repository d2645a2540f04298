"""The compiled window law: golden vectors, PyTorch, the second implementation, its unit tables."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import window_brute
from ring_brute import permute
from test_native import DTYPES, assert_same_bits, in_pytorch, threads
from window_brute import draw, everywhere

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.reference import tiles
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.window import WindowLaw, alignment

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "built")

ROOT = Path(__file__).parents[3]
ENTRIES: dict[str, Any] = json.loads((ROOT / "tests" / "golden" / "law2.json").read_text("utf-8"))[
    "entries"
]
AVX2 = ["-mavx2", "-mfma", "-mbmi2"]
FLAGS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": [*AVX2, *(f"-mavx512{part}" for part in ("f", "vl", "bw", "dq", "cd"))],
}


def assert_as_in_pytorch(law: WindowLaw, n: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(native.slots(law, n, b), law.slot(n, b)), law
    assert torch.equal(native.sign_words(law, n, b), law.sign_words(n, b)), law


def check_golden() -> None:
    """Every golden vector of law 2; also the program of the processes below."""
    for name, entry in ENTRIES.items():
        law = WindowLaw(**entry["config"])
        if "points" in entry:
            n, b = torch.tensor(entry["points"]).unbind(1)
            assert native.slots(law, n, b).tolist() == entry["slots"], name
            if "sign words" in entry:
                assert native.sign_words(law, n, b).tolist() == entry["sign words"], name
            continue
        slots = native.slots(law, *everywhere(law)).numpy().astype("<i4").tobytes()
        words = native.sign_words(law, *everywhere(law)).numpy().astype("<u4").tobytes()
        assert hashlib.sha256(slots).hexdigest() == entry["slots sha256"], name
        assert hashlib.sha256(words).hexdigest() == entry["sign words sha256"], name


def test_golden_vectors() -> None:
    check_golden()


@pytest.mark.parametrize("isa", FLAGS)
def test_golden_vectors_on_every_instruction_set(isa: str) -> None:
    built = native.build_info()
    if isa not in built["isas"] or isa == built["isa"]:
        pytest.skip(f"{isa} is not compiled in, or the one that the test before used")
    code = (
        "import test_native_window as t; from rpg_kernels import native; t.check_golden(); "
        "print(native.build_info()['isa'])"
    )
    done = processes.python(code, RPG_KERNELS_ISA=isa)
    if f"RPG_KERNELS_ISA: got {isa}" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert (done.returncode, done.stdout.strip()) == (0, isa), done.stderr


def test_random_layers() -> None:
    rng = random.Random(3)
    for _ in range(60):
        law = draw(rng)
        assert_as_in_pytorch(law, *everywhere(law))
        for _ in range(8):
            n, b = rng.randrange(law.rows), rng.randrange(law.blocks)
            at = torch.tensor(n), torch.tensor(b)
            assert native.slots(law, *at) == window_brute.reads(law, n, b), (law, n, b)
            word = native.sign_words(law, *at)
            e = rng.randrange(law.granularity)
            if law.reflect == "vector":
                assert bool(word >> 31) is window_brute.negative(law, n, b, e)
            elif law.reflect == "element":
                bit = 15 - e % 32 // 2 + 16 * (e % 2)
                assert bool(word[e // 32] >> bit & 1) is window_brute.negative(law, n, b, e)


@pytest.mark.parametrize("window", [64, 128, 1024, 32768, 1 << 22])
@pytest.mark.parametrize("rows", [4096, 5000, 14336, 8191])
def test_tall_layers(rows: int, window: int) -> None:
    rng = random.Random(rows + window)
    blocks, laps = rng.randint(1, 70), rng.choice([1, 3, 4, 16, 23, 64])
    start = rng.choice([0, 64 * rng.randrange(10**6), 2**61 - 64])
    slots = window + rng.choice([0, 1, 31250])
    law = WindowLaw(rows, 3, rows, blocks, 32, slots, start, "vector", True, window, laps)
    n = torch.tensor([0, rows - 1, *(rng.randrange(rows) for _ in range(998))])
    b = torch.tensor([blocks - 1, 0, *(rng.randrange(blocks) for _ in range(998))])
    assert_as_in_pytorch(law, n, b)


@pytest.mark.parametrize("blocks", [3, 1, 2**20, 2**31 - 1, 2**31, 12345])
def test_far_rows_in_bands(blocks: int) -> None:
    rng = random.Random(blocks)
    for rows in (2**33, 2**32 + 5, 2**31 // blocks + 1, min(2**40, (2**63 - 1) // blocks // 2)):
        step = alignment(rows)
        law = draw(rng, rows=rows, blocks=blocks, granularity=64, laps=rng.randint(1, 64))
        law = WindowLaw(**{**vars_of(law), "start": rng.randrange(2**61 // step) * step})
        if law.start + rows * blocks >= 2**63:
            continue
        band = law.rows_per_band
        n = [n for n in {0, band - 1, band, 2 * band, rows - 1} if 0 <= n < rows]
        n = torch.tensor(n + [rng.randrange(rows) for _ in range(6)])
        b = torch.tensor([rng.randrange(blocks) for _ in n])
        assert_as_in_pytorch(law, n, b)


def vars_of(law: WindowLaw) -> dict[str, Any]:
    return {name: getattr(law, name) for name in law.__dataclass_fields__}


@pytest.mark.parametrize("slots", [2**22, 2**22 + 1, 12345677, 2**31 - 1, 2**31])
def test_addresses_beyond_two_to_the_31(slots: int) -> None:
    """A band of almost 2^31 positions that begins inside a cell of the largest window."""
    positions = 2**31 - 64
    for laps, start in ((1, 0), (1, 2**22 - 64), (1, 2**62 - 64), (64, 2**61)):
        law = WindowLaw(1, 1, positions, 1, 1, slots, start, "none", True, 2**22, laps)
        n = torch.tensor([0, 1, 4095, 4096, positions // 2, positions - 4097, positions - 1])
        assert_as_in_pytorch(law, n, torch.tensor(0))
        assert_as_in_pytorch(WindowLaw(**{**vars_of(law), "permute": False}), n, torch.tensor(0))


def test_the_permutation_is_that_of_units() -> None:
    rng = random.Random(11)
    for _ in range(20):
        law = draw(rng, permute=True)
        units = max(1, law.units(0))
        unit = torch.arange(units)
        image = native.permutation(law, 0, unit, inverse=False)
        assert image.tolist() == [permute(u, units, law.seed, law.layer, 0) for u in range(units)]
        assert torch.equal(native.permutation(law, 0, image, inverse=True), unit)
        with pytest.raises(ValueError, match="q: outside the band"):
            native.permutation(law, 0, torch.tensor([units]), inverse=False)


def bank_of(
    slots: int, granularity: int, reflect: str, laps: int, **given: Any
) -> rpg.ParameterBank:
    generator = Generator(slots, granularity, reflect, window=64, laps=laps, seed=5, law=2)
    return rpg.ParameterBank.from_generator(generator, **given)


def weights(bank: rpg.ParameterBank) -> list[rpg.VirtualWeight]:
    linear = bank.place((70, 150), scale=0.37)
    conv = bank.place((21, 40, 3, 3), scale=-1.0)
    return [linear, conv, conv.narrow(0, 3, 11).narrow(1, 7, 20), bank.place((4100, 33))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", [1, 4, 16, 64, 128])
def test_unpack_and_pack_bit_for_bit(
    dtype: torch.dtype, granularity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reflect in ("element", "vector", "none"):
        bank = bank_of(70, granularity, reflect, laps=3, dtype=dtype)
        for weight in weights(bank):
            assert type(weight.placement.law) is WindowLaw
            with torch.no_grad():
                assert_same_bits(weight.unpack(), in_pytorch(monkeypatch, weight.unpack))
                dense = torch.randn(weight.shape).to(dtype)
                wanted = in_pytorch(monkeypatch, lambda w=weight, d=dense: w.pack(d))
                assert_same_bits(weight.pack(dense), wanted)


@pytest.mark.parametrize("reflect", ["element", "vector"])
def test_pack_does_not_depend_on_threads(reflect: str) -> None:
    bank = bank_of(80, 16, reflect, laps=4)
    weight = bank.place((300, 640), scale=0.3)
    dense = torch.randn(weight.shape)
    results = []
    for count in (1, 2, 5):
        with threads(count), torch.no_grad():
            results.append((weight.pack(dense), weight.unpack()))
    for packed, unpacked in results[1:]:
        assert_same_bits(packed, results[0][0])
        assert_same_bits(unpacked, results[0][1])


def test_embedding_rows_by_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of(80, 16, "element", laps=2)
    weight = bank.place((5000, 70), scale=0.5)
    index = torch.randint(5000, (9, 13))

    def run() -> torch.Tensor:
        out = rpg.functional.embedding(index, weight)
        (grad,) = torch.autograd.grad(out.square().sum(), bank.weight)
        return torch.cat((out.flatten(), grad.flatten()))

    assert_same_bits(run(), in_pytorch(monkeypatch, run))


def test_the_reference_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    laws = []
    real = native.unpack
    monkeypatch.setattr(tiles.native, "unpack", lambda *a: (laws.append(a[0]), real(*a))[1])
    bank_of(64, 8, "vector", laps=4).place((8, 16)).unpack()
    assert [type(law) for law in laws] == [WindowLaw]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 32), ("window", 96), ("window", 2**23), ("window", 128), ("window", -64),
        ("laps", 0), ("laps", 65), ("laps", -1), ("address", -1), ("address", 2**63 - 600),
    ],
)  # fmt: skip
def test_a_law_out_of_range_is_refused(name: str, value: int) -> None:
    from rpg_kernels.native import _native

    good = {"seed": 0, "layer": 0, "rows": 60, "blocks": 10, "granularity": 8, "slots": 100}
    good |= {"start": 0, "reflect": 1, "permute": True, "window": 64, "laps": 4, "address": 0}
    _native.LayerLaw(**good)
    _native.LayerLaw(**{**good, "address": 2**63 - 601})
    with pytest.raises(ValueError, match=f"{name}: wanted"):
        _native.LayerLaw(**{**good, name: value})


@pytest.mark.parametrize("isa", FLAGS)
def test_unit_tables_and_inverses(isa: str, tmp_path: Path) -> None:
    """A C++ program, so that the sanitizers watch it."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "unit_table"
    source = Path(__file__).with_name("unit_table.cpp")
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", *FLAGS[isa]]
    command += ["-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    watched = processes.run(*command, *sanitize)
    if watched.returncode:  # compilers come without the sanitizers' libraries
        done = processes.run(*command, "-Werror")
        assert done.returncode == 0, done.stderr
    done = processes.run(program)
    if done.returncode == -4:  # SIGILL
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 10**5
