"""The compiled law, unpack and pack against golden vectors and the PyTorch they stand in for."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.reference import tiles
from rpg_kernels.law.ring import LayerLaw

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "built")

GOLDEN = Path(__file__).parents[2] / "golden" / "law1.json"
ENTRIES: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8"))["entries"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_pytorch(monkeypatch: pytest.MonkeyPatch, compute: Callable[[], Tensor]) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_enabled", False)
        return compute()


def assert_same_bits(got: Tensor, wanted: Tensor) -> None:
    bits = BITS[got.element_size()]
    assert got.dtype == wanted.dtype
    assert torch.equal(got.contiguous().view(bits), wanted.contiguous().view(bits))


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "points" in entry])
def test_golden_points(name: str) -> None:
    entry = ENTRIES[name]
    law = LayerLaw(**entry["config"])
    n, b = torch.tensor(entry["points"]).unbind(1)
    assert native.slots(law, n, b).tolist() == entry["slots"]
    if "sign words" in entry:
        assert native.sign_words(law, n, b).tolist() == entry["sign words"]


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "points" not in entry])
def test_golden_layers(name: str) -> None:
    entry = ENTRIES[name]
    law = LayerLaw(**entry["config"])
    n, b = torch.arange(law.rows)[:, None], torch.arange(law.blocks)[None]
    slots = native.slots(law, n, b).numpy().astype("<i4").tobytes()
    words = native.sign_words(law, n, b).numpy().astype("<u4").tobytes()
    assert hashlib.sha256(slots).hexdigest() == entry["slots sha256"]
    assert hashlib.sha256(words).hexdigest() == entry["sign words sha256"]


SHAPES = [  # every method and number of rounds, and what surrounds their limits
    (1, 1), (1, 2), (7, 1), (11, 11), (12, 12), (13, 12), (31, 31), (37, 13), (127, 128),
    (128, 128), (64, 36), (512, 72), (997, 13), (251, 4), (1728, 12), (1729, 12), (65537, 1),
    (1, 65536), (4099, 16), (2003, 64), (32001, 8), (20011, 1), (50257, 12),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
def test_law_on_whole_layers(rows: int, blocks: int) -> None:
    slots = random.Random(rows * blocks).choice((1, 2, 7, 704, 31250, 1 << 20, 2**31))
    law = LayerLaw(rows, blocks, rows, blocks, 64, slots, slots // 3, "element", True)
    n, b = torch.arange(rows)[:, None], torch.arange(blocks)[None]
    assert torch.equal(native.slots(law, n, b), law.slot(n, b))
    assert torch.equal(native.sign_words(law, n, b), law.sign_words(n, b))
    q = torch.arange(rows * blocks)
    image = native.permutation(law, 0, q, inverse=False)
    assert torch.equal(image, law.permutation(0).forward(q))
    assert torch.equal(native.permutation(law, 0, image, inverse=True), q)


def test_law_of_random_layers_at_random_positions() -> None:
    source = random.Random(5)
    for _ in range(150):
        rows = source.randrange(1, 1 << source.randrange(1, 34))
        blocks = source.randrange(1, 1 << source.randrange(1, 32))
        slots = source.randrange(1, 1 << source.randrange(1, 32))
        law = LayerLaw(
            seed=source.randrange(2**63),
            layer=source.randrange(2**63),
            rows=rows,
            blocks=blocks,
            granularity=1 << source.randrange(8),
            slots=slots,
            start=source.randrange(slots),
            reflect=source.choice(("element", "vector", "none")),
            permute=source.random() < 0.8,
        )
        n = torch.tensor([0, rows - 1, *(source.randrange(rows) for _ in range(97))])
        b = torch.tensor([blocks - 1, 0, *(source.randrange(blocks) for _ in range(97))])
        assert torch.equal(native.slots(law, n, b), law.slot(n, b)), law
        assert torch.equal(native.sign_words(law, n, b), law.sign_words(n, b)), law


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", [1, 2, 4, 8, 16, 32, 64, 128])
def test_unpack_and_pack_bit_for_bit(
    dtype: torch.dtype, granularity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reflect mode, scales that round and that do not, linear, convolution and a part."""
    for reflect in ("element", "vector", "none"):
        for scale in (1.0, -1.0, 0.37, -2.3e-3):
            bank = rpg.ParameterBank(
                dof=5000, granularity=granularity, reflect=reflect, seed=5, dtype=dtype
            )
            linear = bank.place((37, 150), scale=scale)
            conv = bank.place((21, 40, 3, 3), scale=scale)
            for weight in (linear, conv, conv.narrow(0, 3, 11).narrow(1, 7, 20)):
                with torch.no_grad():
                    wanted = in_pytorch(monkeypatch, weight.unpack)
                    assert_same_bits(weight.unpack(), wanted)
                    dense = torch.randn(weight.shape).to(dtype)
                    wanted = in_pytorch(monkeypatch, lambda w=weight, d=dense: w.pack(d))
                    assert_same_bits(weight.pack(dense), wanted)


@pytest.mark.parametrize("reflect", ["element", "vector"])
@pytest.mark.parametrize("granularity", [1, 16, 64])
def test_pack_does_not_depend_on_threads(granularity: int, reflect: str) -> None:
    """Many positions on few slots: every slot is added to by every thread's share of positions."""
    bank = rpg.ParameterBank(dof=1280, granularity=granularity, reflect=reflect)
    weight = bank.place((300, 640), scale=0.3)
    dense = torch.randn(weight.shape)
    results = []
    for count in (1, 2, 3, 5):
        with threads(count), torch.no_grad():
            results.append((weight.pack(dense), weight.unpack()))
    for packed, unpacked in results[1:]:
        assert_same_bits(packed, results[0][0])
        assert_same_bits(unpacked, results[0][1])


@pytest.mark.parametrize("view", ["whole", "column", "expanded"])
def test_embedding_rows_by_lookup(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = rpg.ParameterBank(dof=640, granularity=16, reflect="element")
    weight = bank.place((50, 70), scale=0.5)
    index = torch.randint(50, (9, 13))
    # One dimension, so that no reshape copies them.
    index = {"whole": index, "column": index[:, 4], "expanded": index[0, 0].expand(7)}[view]

    def run() -> Tensor:
        out = rpg.functional.embedding(index, weight)
        (grad,) = torch.autograd.grad(out.square().sum(), bank.weight)
        return torch.cat((out.flatten(), grad.flatten()))

    assert_same_bits(run(), in_pytorch(monkeypatch, run))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_multiplied_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = numbers[~numbers.isnan()]
    law = LayerLaw(0, 0, numbers.numel(), 1, 1, numbers.numel(), 0, "none", False)
    for scale in (1.0, 0.37, 3.0, -1e-3, 2.0**-10, 1.0009765625, 6e4, 1e-6):
        out = torch.full_like(numbers, float("nan"))
        native.unpack(law, numbers[:, None], out[:, None], scale, (0, len(out), 1, 1, 0, 1), None)
        assert_same_bits(out, numbers * scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_what_they_are(dtype: torch.dtype) -> None:
    ring = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0]).to(dtype)
    ring = ring.repeat(32)[:, None].contiguous()
    law = LayerLaw(0, 0, len(ring), 1, 1, len(ring), 0, "none", False)
    for scale in (1.0, 0.25):
        out = torch.empty_like(ring)
        native.unpack(law, ring, out, scale, (0, len(out), 1, 1, 0, 1), None)
        torch.testing.assert_close(out, ring * scale, equal_nan=True, rtol=0, atol=0)


def test_subnormals_when_torch_flushes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = rpg.ParameterBank(dof=640, granularity=16, dtype=torch.float16)
    torch.nn.init.normal_(bank.weight, std=2e-5)
    weight = bank.place((50, 70), scale=0.7)
    torch.set_flush_denormal(True)
    try:
        with torch.no_grad():
            assert_same_bits(weight.unpack(), in_pytorch(monkeypatch, weight.unpack))
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("rows", [2**63 - 1, (2**63 - 1) // 3, 2**62])
def test_layers_as_large_as_numbers_go(rows: int) -> None:
    law = LayerLaw(6, 1, rows, 1, 64, 2**31, 2**31 - 1, "element", True)
    n = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    assert torch.equal(native.slots(law, n, torch.tensor(0)), law.slot(n, torch.tensor(0)))


@pytest.mark.parametrize("changes", [{"version": "0.0.9"}, {"law": 4}])
def test_a_module_of_another_version_is_not_used(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpg_kernels.native import _native

    info = {**_native.build_info(), **changes}
    monkeypatch.setattr(_native, "build_info", lambda: info)
    native._load.cache_clear()
    try:
        assert not native.available()
        assert "got version" in native.why_not()
        assert native.broken()
        assert rpg.ParameterBank(64).place((4, 8)).unpack().shape == (4, 8)
    finally:
        monkeypatch.undo()
        native._load.cache_clear()


def test_tensors_it_cannot_take_go_by_pytorch() -> None:
    ring = torch.randn(4, 8)
    assert native.handles(ring, torch.nn.Parameter(ring))
    assert not native.handles(ring.t())
    assert not native.handles(ring.to(torch.float8_e4m3fn))
    assert not native.handles(torch.empty(4, 8, device="meta"))
    assert not native.handles(ring.as_subclass(type("Other", (Tensor,), {})))


def test_scratch_of_a_threaded_pack_stays_within_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = rpg.ParameterBank(dof=640, granularity=1, reflect="element")
    weight = bank.place((64, 300))
    dense = torch.randn(weight.shape)
    entries: list[int] = []

    class Watched:
        def __init__(self, law: Any) -> None:
            self.law = law

        def pack(self, *arguments: Any) -> None:
            entries.append(arguments[-1])
            self.law.pack(*arguments)

    real = native.layer_law
    monkeypatch.setattr(native, "layer_law", lambda law: Watched(real(law)))
    limit = 1 << 16
    with threads(2):
        wanted = weight.pack(dense)
        most = max(entries)
        entries.clear()
        with rpg.scratch_limit(limit):
            assert_same_bits(weight.pack(dense), wanted)
    assert 0 < 4 * max(entries) <= limit // 4 < 4 * most


def region(**changes: int) -> dict[str, int]:
    good = {
        "first_row": 0,
        "rows": 6,
        "lookup": 0,
        "runs": 2,
        "run_blocks": 5,
        "low": 1,
        "count": 4,
        "first": 0,
        "length": 32,
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"first_row": -1}, {"first_row": 7}, {"rows": 7}, {"rows": -1}, {"first_row": 3},
        {"runs": 3}, {"runs": 0}, {"run_blocks": 0}, {"run_blocks": 2**62, "runs": 2**62},
        {"low": -1}, {"count": 0}, {"count": 5}, {"low": 2**62, "count": 2**62}, {"dtype": 4},
        {"first": -1}, {"first": 1}, {"first": 8, "length": 24}, {"length": 33}, {"length": 24},
        {"length": 0}, {"length": 2**63 - 1}, {"first": 2**63 - 1}, {"count": 3},
    ],
    ids=str,
)  # fmt: skip
def test_positions_outside_the_layer_are_refused(changes: dict[str, int]) -> None:
    law = native.layer_law(LayerLaw(0, 0, 6, 10, 8, 20, 3, "vector", True))
    ring, out = torch.randn(20, 8), torch.full((48, 8), float("nan"))
    given = {"bank": native.given_bank(ring), "out": out.data_ptr(), "dtype": 1}
    given |= {"scale": 1.0, "threads": 1}
    law.unpack(**given, **region())
    assert not out.isnan().any()
    out.fill_(float("nan"))
    dtype = changes.get("dtype", 1)
    changes = {k: v for k, v in changes.items() if k != "dtype"}
    with pytest.raises(ValueError, match=r"wanted|outside"):
        law.unpack(**{**given, "dtype": dtype}, **region(**changes))
    assert out.isnan().all()


@pytest.mark.parametrize("row", [-1, 6, 2**40])
def test_a_lookup_outside_the_layer_is_refused(row: int) -> None:
    law = LayerLaw(0, 0, 6, 1, 8, 20, 3, "vector", True)
    lookup = torch.tensor([0, row, 2])
    ring, out = torch.randn(20, 8), torch.empty(3, 8)
    for call, last in ((native.unpack, ()), (native.pack, (0,))):
        with pytest.raises(ValueError, match="lookup: outside the layer"):
            call(law, ring, out, 1.0, (0, 3, 1, 1, 0, 1), lookup, *last)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 0), ("rows", 2**62), ("blocks", 0), ("blocks", 2**31 + 1), ("granularity", 48),
        ("granularity", 256), ("slots", 0), ("slots", 2**31 + 1), ("start", 20), ("start", -1),
        ("reflect", 3),
    ],
)  # fmt: skip
def test_a_law_out_of_range_is_refused(name: str, value: int) -> None:
    from rpg_kernels.native import _native

    good = {"seed": 0, "layer": 0, "rows": 6, "blocks": 10, "granularity": 8, "slots": 20}
    good |= {"start": 3, "reflect": 1, "permute": True}
    _native.LayerLaw(**good)
    with pytest.raises(ValueError, match=f"{name}: wanted"):
        _native.LayerLaw(**{**good, name: value})


def test_positions_of_lists_are_checked() -> None:
    law = LayerLaw(0, 0, 6, 10, 8, 20, 3, "vector", True)
    for n, b in ((6, 0), (-1, 0), (0, 10), (0, -1)):
        for call in (native.slots, native.sign_words):
            with pytest.raises(ValueError, match="outside the layer"):
                call(law, torch.tensor([0, n]), torch.tensor([0, b]))
    for band, q in ((0, 60), (0, -1), (1, 0), (-1, 0)):
        with pytest.raises(ValueError, match="outside"):
            native.permutation(law, band, torch.tensor([q]), inverse=False)


def test_the_reference_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    real = native.unpack
    monkeypatch.setattr(tiles.native, "unpack", lambda *a: (used.append("unpack"), real(*a))[1])
    rpg.ParameterBank(dof=64, granularity=8).place((4, 8)).unpack()
    assert used == ["unpack"]


def test_the_environment_switch() -> None:
    code = "from rpg_kernels import native; print(native.available(), native.why_not())"
    done = processes.python(code, RPG_KERNELS_NATIVE="0")
    assert done.stdout.strip() == "False RPG_KERNELS_NATIVE=0 is set"


def test_an_instruction_set_that_is_not_there() -> None:
    code = "from rpg_kernels import native; native.build_info()"
    done = processes.python(code, RPG_KERNELS_ISA="mmx")
    assert done.returncode != 0
    assert "RPG_KERNELS_ISA: got mmx, wanted " in done.stderr
