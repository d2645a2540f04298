"""The compiled CPU kernels that gather tiles of a weight, against written-out ones in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
import unit_layers
from torch import Tensor
from unit_layers import NAMES, Layer

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.cpu import factored, lanes, rules
from rpg_kernels.backends.cpu.tiles import TILES, Tiles
from rpg_kernels.backends.cpu.units import UNITS
from rpg_kernels.law.placement import Placement

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

INFINITY, NAN = float("inf"), float("nan")
LAWS = (
    {"law": 1, "laps": None},
    {"law": 3, "laps": 3, "window": 64},
    {"law": 3, "laps": 1, "window": 128},
    {"law": 3, "laps": 1},
    {"law": 3, "laps": 4},
)
SIZES = (1, 7, 100, 145, 300, 577)
BATCHES = (1, 3, 17, 33, 100, 257, 300)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Wide(Tiles):
    """The same kernels with a number of lanes, whatever the batch is."""

    def __init__(self, count: int) -> None:
        self.count = count

    def lanes(self, op: str, p: Placement, batch: int) -> list[int]:
        return [self.count]


@pytest.fixture(autouse=True)
def workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes in bytes of what the kernels were given to work in, around which nothing is written."""
    yield from unit_layers.guard(monkeypatch)


def layers(count: int, seed: int) -> Iterator[Layer]:
    """Layers of all laws and sizes; sets torch's number of threads for each."""
    rng = random.Random(seed)
    values = (LAWS, SIZES, SIZES, BATCHES, (16, 32, 64, 128), DTYPES, DTYPES, (1, 2, 3, 5))
    dealt = [unit_layers.dealt(rng, each, count) for each in values]
    for law, rows, columns, batch, block, dtype, bank_dtype, threads in zip(*dealt, strict=True):
        torch.set_num_threads(threads)
        # Of few columns only a part of a slot is a block, which may be too small to be gathered.
        yield Layer(
            (rows, max(columns, 13)),
            batch,
            slots=rng.choice([130, 700, 1001]),
            granularity=block,
            reflect=rng.choice(["vector", "none"]),
            permute=rng.random() < 0.8,
            start=64 * rng.randrange(10**6) * 128,
            scale=rng.choice([1.0, -1.25, 0.037]),
            dtype=dtype,
            bank_dtype=bank_dtype,
            bias=rng.random() < 0.5,
            seed=rng.randrange(10**6),
            **law,
        )


@pytest.mark.parametrize("seed", range(10))
def test_against_the_written_out_weight(seed: int, workspaces: list[int]) -> None:
    """With and without a bias; and the same bits again."""
    for layer in layers(10, seed):
        first = layer.check(TILES)
        assert len(workspaces) == 4, layer
        for name, one, again in zip(NAMES, first, layer.results(TILES), strict=True):
            assert one.equal(again), f"{name}: {layer}"
        assert first[1].equal(first[3]), layer
        assert first[2].equal(first[4]), layer
        workspaces.clear()


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_tiles_of_every_block(block: int, law: dict[str, int]) -> None:
    """Several tiles below and beside each other, the last of which are small."""
    for columns in (block, 300 - 1, 577):
        Layer((145, columns), 33, granularity=block, slots=1001, **law).check(TILES)


@pytest.mark.parametrize("lanes_at_once", [16, 48, 64, 256, 512])
@pytest.mark.parametrize("batch", [1, 17, 100, 257])
def test_lanes(lanes_at_once: int, batch: int) -> None:
    """Rows of x that fill the lanes in part, as a whole, and several times."""
    torch.set_num_threads(2)
    family = Wide(lanes_at_once)
    for law, dtype in ((LAWS[0], torch.float32), (LAWS[4], torch.bfloat16)):
        layer = Layer((145, 110), batch, dtype=dtype, **law)
        assert family.check("linear", layer.spec, batch).lanes == lanes_at_once
        results = layer.check(family)
        for i in (0, 1):  # each row of y and dx is a sum in the same order
            assert results[i].equal(layer.results(TILES)[i])


@pytest.mark.parametrize("law", [LAWS[0], LAWS[1], LAWS[4]], ids=str)
def test_numbers_of_threads_change_the_rounding_of_dw_alone(law: dict[str, int]) -> None:
    layer, results = Layer((300, 577), 70, granularity=32, slots=130, **law), []
    for threads in (1, 2, 3, 5, 40):  # of 19 blocks of columns, so some threads have none
        torch.set_num_threads(threads)
        results.append(layer.check(TILES))
    for y, dx, _, both_dx, _ in results[1:]:
        assert y.equal(results[0][0])
        assert dx.equal(results[0][1])
        assert both_dx.equal(results[0][1])
    assert any(not found[2].equal(results[0][2]) for found in results[1:])


@pytest.mark.parametrize("name", ["x", "dy", "bank", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_is_not_aligned(name: str, dtype: torch.dtype) -> None:
    layer = Layer((100, 145), 20, dtype=dtype, **LAWS[0])
    wanted, tensor = layer.results(TILES), getattr(layer, name)
    apart = tensor.new_full((*tensor.shape, 2), NAN)[..., 1]
    shifted = tensor.new_full((tensor.numel() + 1,), NAN)[1:].view(tensor.shape)
    turned = tensor.t().contiguous().t() if tensor.dim() > 1 else shifted
    for other in (shifted, apart, turned):
        setattr(layer, name, other.copy_(tensor))
        for got, exact in zip(layer.results(TILES), wanted, strict=True):
            assert got.equal(exact)


@pytest.mark.parametrize("leading", [(), (0,), (0, 3), (3, 0), (2, 3)])
def test_leading_dimensions(leading: tuple[int, ...], workspaces: list[int]) -> None:
    layer = Layer((100, 110), leading or (1,), **LAWS[0])
    layer.x, layer.dy = layer.x.view(*leading, 110), layer.dy.view(*leading, 100)
    y, dx, dw, both_dx, both_dw = results = layer.results(TILES)
    assert (y.shape, dx.shape, both_dx.shape) == (layer.dy.shape, layer.x.shape, layer.x.shape)
    assert dw.shape == both_dw.shape == layer.bank.shape
    assert bool(workspaces) == bool(y.numel())
    assert bool(y.numel()) == bool(dw.any()) == bool(both_dw.any())
    layer.x, layer.dy = layer.x.view(-1, 110), layer.dy.view(-1, 100)
    for got, wanted in zip(results, layer.results(TILES), strict=True):
        assert got.flatten().equal(wanted.flatten())


def check_infinities(layer: Layer) -> None:
    """What is no number is there, and only there, where the definition puts it, of its kind."""
    results = layer.results(TILES)
    for name, got, exact in zip(NAMES, results, layer.defined(torch.float64), strict=True):
        what, finite = f"{name}: {layer}", exact.isfinite()
        assert got.isfinite().equal(finite), what
        kinds = [result.nan_to_num(2, 3, 4)[~finite].double() for result in (got, exact)]
        assert kinds[0].equal(kinds[1]), what
        got, exact = (torch.where(finite, result.double(), 0.0) for result in (got, exact))
        assert (got - exact).abs().max() <= 0.02 * exact.abs().max() + 1e-4, what


def unread(layer: Layer) -> Tensor:
    """Of the bank's elements, those that are no virtual weight: slots, and padding of blocks."""
    out = torch.ones(layer.bank.numel(), dtype=torch.bool)
    out[layer.index] = False
    return out


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("batch", [1, 17, 70])
def test_infinities_stay_where_they_are(law: dict[str, int], batch: int) -> None:
    """Those of elements that no weight reads, as behind K in the last block, are met by none."""
    for rows, columns, dtype, threads, values in (
        (13, 100, torch.float32, 1, (INFINITY, NAN, -INFINITY)),
        (145, 300, torch.bfloat16, 3, (-INFINITY, INFINITY, NAN)),
        (7, 577, torch.float16, 2, (NAN, -INFINITY, INFINITY)),
    ):
        torch.set_num_threads(threads)
        # Behind the last of 300 columns in blocks of 128 lie 84 that are gathered too.
        for granularity, width in ((64, columns), (128, 300)):
            layer = Layer(
                (rows, width), batch, dtype=dtype, granularity=granularity, bias=False, **law
            )
            unused = unread(layer)
            for value in (INFINITY, NAN) if unused.any() else ():
                layer.bank.view(-1)[unused] = value
                results = layer.check(TILES)
                for dw in (results[2], results[4]):
                    assert not dw.flatten()[unused].any(), layer
            for tensor, value in zip((layer.x, layer.dy, layer.bank), values, strict=True):
                kept, flat = tensor.clone(), tensor.view(-1)
                place = layer.index[width // 2] if tensor is layer.bank else len(flat) - 1
                flat[place] = value
                check_infinities(layer)
                tensor.copy_(kept)


@pytest.mark.parametrize("batch", [1, 70])
@pytest.mark.parametrize("name", lanes.PRODUCTS)
def test_scratch_limits(name: str, batch: int, workspaces: list[int]) -> None:
    torch.set_num_threads(3)
    layer = Layer((300, 110), batch, **LAWS[0])
    which = {"linear": [0], "linear_input_grad": [1], "linear_bank_grad": [2]}.get(name, [3, 4])
    wanted = layer.results(TILES)
    least = TILES.smallest(name, layer.spec, batch)
    for limit in (least, 2 * least, 4 << 20):
        with rpg.scratch_limit(limit):
            step = TILES.check(name, layer.spec, batch)
            assert step.scratch <= limit
            if name == "linear_grads":  # which takes more than the others
                workspaces.clear()
                results = layer.results(TILES)
                assert workspaces[3] == step.workspace
                for i in which:
                    assert (results[i] - wanted[i]).abs().max() <= 1e-5 * wanted[i].abs().max()
    with rpg.scratch_limit(least - 1):
        assert TILES.steps(name, layer.spec, batch) is None
        with pytest.raises(RuntimeError, match="scratch_limit"):
            TILES.check(name, layer.spec, batch)
        with pytest.raises(RuntimeError, match="scratch_limit"):
            layer.results(TILES)


def test_many_threads_share_the_limit() -> None:
    spec = Layer((300, 110), 1, **LAWS[0]).spec
    for threads in (1, 8, 64, 256):
        torch.set_num_threads(threads)
        for name in lanes.PRODUCTS:
            for batch in (1, 64, 5000):
                assert TILES.check(name, spec, batch).scratch <= 4 << 20


def test_what_dispatch_takes() -> None:
    """Few rows of x share factors of law 1 or products of law 3; others are dense products."""
    torch.set_num_threads(2)
    grads = lanes.PRODUCTS[1:3]
    ring, small, shared, alone = (
        Layer((300, 128), 1, slots=1001, granularity=granularity, **law).spec
        for granularity, law in ((64, LAWS[0]), (16, LAWS[0]), (64, LAWS[4]), (64, LAWS[3]))
    )
    few = Layer((300, 128), 1, slots=10, **LAWS[0]).spec  # of which 30 rows share a slot
    for batch in range(1, 301):
        for dtype in DTYPES:

            def taken(op: str, spec: str, dtype=dtype, batch=batch) -> object:  # type: ignore[no-untyped-def]
                return rules.family(op, dtype, batch, spec)

            assert taken("linear", ring) is (None if batch <= factored.FEW else TILES)
            assert taken("linear", few) is None
            assert taken("linear", small) is TILES
            assert taken("linear", shared) is UNITS
            assert taken("linear", alone) is (UNITS if batch <= 32 else TILES)
            for op in grads:
                assert taken(op, ring) is taken(op, few) is taken(op, small) is TILES
                assert taken(op, shared) is UNITS
                assert taken(op, alone) is (UNITS if batch <= 32 else TILES)


def test_refusals() -> None:
    for law in (LAWS[0], LAWS[4]):
        for granularity in (4, 8):
            small = Layer((8, 64), 1, granularity=granularity, **law)
            with pytest.raises(RuntimeError, match=f"16 to 128 elements, not of {granularity}"):
                small.results(TILES)
    layer = Layer((8, 64), 1, **LAWS[0])
    law = native.layer_law(layer.p.law)
    for count in (0, 8, 24, 528):
        with pytest.raises(ValueError, match="lanes"):
            law.tile_linear_workspace(1, 64, 1, count)
        with pytest.raises(ValueError, match="lanes"):
            law.tile_linear_grads_workspace(1, 64, 1, count, True, True)
    with pytest.raises(ValueError, match="columns"):
        law.tile_linear_workspace(1, 65, 1, 16)
    with pytest.raises(ValueError, match="batch"):
        law.tile_linear_workspace(0, 64, 1, 16)
    with pytest.raises(ValueError, match="threads"):
        law.tile_linear_workspace(1, 64, 0, 16)
