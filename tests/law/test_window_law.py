"""The window law: a second implementation, evenness, the inverse, wavefronts, and bad input."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator

import brute_force
import pytest
import torch
import window_brute
from window_brute import WINDOWS, draw, everywhere

from rpg_kernels.law.explicit import explicit_map
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.geometry import VirtualMatrix
from rpg_kernels.law.placement import Placement, check_laps
from rpg_kernels.law.scramble import Scramble
from rpg_kernels.law.window import (
    WINDOW_LAW,
    WindowLaw,
    alignment,
    check_window,
    layer_law,
    place,
)


def test_a_second_implementation_agrees() -> None:
    rng = random.Random(1)
    layers = [draw(rng, blocks=rng.choice([1, 2, 3, 9, 16, rng.randint(1, 30)])) for _ in range(40)]
    layers = [c for c in layers if c.rows * c.blocks <= 3000]
    layers += [draw(rng, rows=rows, blocks=2) for rows in (4096, 5000, rng.randint(4097, 9000))]
    for c in layers:
        slots, signs = c.slot(*everywhere(c)).tolist(), c.negative(*everywhere(c)).tolist()
        for n, b, p, slot in window_brute.walk(c):
            assert slots[n][b] == slot, (c, n, b)
            if rng.random() < 0.05:
                assert window_brute.locate(c, n, b)[1] == p
                assert window_brute.reads(c, n, b) == slot
                e = rng.randrange(c.granularity)
                assert signs[n][b][e] is window_brute.negative(c, n, b, e), (c, n, b, e)


@pytest.mark.parametrize("blocks", [3, 1, 2**20, 2**31 - 1, 2**31, 12345])
def test_far_rows_in_bands(blocks: int) -> None:
    rng = random.Random(blocks)
    for rows in (2**33, 2**32 + 5, 2**31 // blocks + 1):
        rows = min(rows, 2**61 // blocks)
        c = draw(rng, rows=rows, blocks=blocks, slots=2**31 - 5, start=64 * rng.randrange(10**9))
        band = c.rows_per_band
        where = [(n, b) for n in {0, band - 1, band, 2 * band, rows - 1} for b in {0, blocks - 1}]
        where += [(rng.randrange(rows), rng.randrange(blocks)) for _ in range(6)]
        where = [(n, b) for n, b in where if 0 <= n < rows]
        n, b = torch.tensor(where).unbind(1)
        assert c.slot(n, b).tolist() == [window_brute.reads(c, *nb) for nb in where]
        e = c.granularity - 1
        wanted = [window_brute.negative(c, *nb, e) for nb in where]
        assert c.negative(n, b)[:, e].tolist() == wanted


@pytest.mark.parametrize("window", [*WINDOWS, 1024, 32768])
def test_laps_are_stratified_permutations(window: int) -> None:
    scramble = Scramble(window, seed=9)
    laps = torch.tensor([0, 1, 2, 77, 2**29 - 1, 2**29, 2**50])[:, None]
    j = torch.arange(window)
    local = scramble.forward(laps, j)
    assert local.sort(1).values.equal(j.expand_as(local))
    assert scramble.inverse(laps, local).equal(j.expand_as(local))
    residues = (local & 7).view(len(laps), -1, 8)
    assert residues.sort(2).values.eq(torch.arange(8)).all()
    assert (residues[..., 0::2] - residues[..., 1::2]).remainder(2).eq(1).all()
    quads = residues.view(len(laps), -1, 2, 4) & 3
    assert quads.sort(3).values.eq(torch.arange(4)).all()
    assert len({tuple(row) for row in local[:5].tolist()}) == 5


@pytest.mark.parametrize(("rows", "blocks"), [(4096, 64), (512, 72), (2053, 9), (100, 30)])
@pytest.mark.parametrize(("window", "laps"), [(64, 3), (128, 4), (256, 4), (512, 2)])
def test_units_and_their_columns(rows: int, blocks: int, window: int, laps: int) -> None:
    """A whole unit reads one window ``laps`` times; a column of 64 rows has no slot twice."""
    start = 64 * 5
    c = WindowLaw(1, 2, rows, blocks, 64, 5 * window + 64, start, "none", True, window, laps)
    n, b = everywhere(c)
    p, slot = c.order(n, b, 0).flatten(), c.slot(n, b)
    by_order = slot.flatten()[p.sort().indices]
    head, units = c.head(0), c.units(0)
    assert (start + head) % c.cell == 0
    first = set()
    for unit in by_order[head : head + units * c.cell].view(units, c.cell)[:200]:
        slots, uses = unit.unique(return_counts=True)
        assert uses.eq(laps).all()
        assert len(slots) == window
        base = next(s for s in slots.tolist() if (s - 1) % c.slots not in slots)
        assert ((slots - base) % c.slots).sort().values.equal(torch.arange(window))
        first.add(base)
    assert len(first) > 1 or units < 3
    whole = slot[: rows // 64 * 64].view(-1, 64, blocks).transpose(1, 2).sort(2).values
    assert (whole[..., 1:] != whole[..., :-1]).all()
    if rows >= 64 and blocks % (c.cell // 64) == 0 and head == 0:
        columns = c.cell // 64  # then units are rectangles
        assert slot[:64, :columns].unique().numel() == window


def model(shapes: list[tuple[int, ...]], slots: int, granularity: int, window: int, laps: int):
    """(uses of each element, addresses skipped and by how many layers, changes of block, end)."""
    uses = torch.zeros(slots * granularity, dtype=torch.long)
    cursor = skipped = skips = changes = 0
    block = None
    for layer, shape in enumerate(shapes):
        start, end = place(shape, granularity, cursor)
        skips += start > cursor
        skipped += start - cursor
        matrix, c = layer_law(
            shape,
            slots=slots,
            granularity=granularity,
            window=window,
            laps=laps,
            layer=layer,
            start=start,
        )
        changes += block is not None and block != matrix.block
        cursor, block = end, matrix.block
        counts = c.slot(*everywhere(c)).flatten().bincount(minlength=c.slots)
        uses += counts.repeat_interleave(matrix.block)
    assert int(uses.sum()) == cursor - skipped
    return uses, skips, changes, cursor


RESNET = [(64, 64, 3, 3)] * 2 + [(128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1)]
REGULAR = [RESNET, [(192, 640)] * 7, [(64, 128), (100, 192)], [(4096, 64)]]
ODD = [(10, 37), (33, 100), (7, 500), (100, 3, 5, 5), (129, 65), (96, 1, 3, 3), (63, 64, 3, 3)]


@pytest.mark.parametrize("slots", [64, 256, 301, 704, 1121])
@pytest.mark.parametrize(("window", "laps"), [(64, 1), (64, 4), (256, 4), (256, 16)])
def test_elements_are_used_evenly(slots: int, window: int, laps: int) -> None:
    if window > slots:
        return
    for shapes in REGULAR:
        uses, skips, changes, _ = model(shapes, slots, 64, window, laps)
        assert skips == changes == 0
        assert int(uses.max() - uses.min()) <= laps + (slots % window > 0)
    uses, skips, changes, _ = model([*ODD * 3, *RESNET], slots, 64, window, laps)
    assert skips > 5
    assert changes > 5
    assert int(uses.max() - uses.min()) <= laps + (slots % window > 0) + skips + 2 * changes
    assert float((uses - uses.float().mean()).square().mean().sqrt()) < laps / 2 + 2


def test_layers_that_share_a_lap_share_no_slot() -> None:
    uses, skips, changes, end = model([(64, 64)] * 8, 512, 64, 512, 2)
    assert (skips, changes, end) == (0, 0, 64 * 512)
    assert uses.eq(1).all()


def test_positions_are_the_uses_of_a_slot() -> None:
    rng = random.Random(7)
    for _ in range(25):
        c = draw(rng, slots=rng.choice([512, 513, 704, 1000]))
        readers: dict[int, list[tuple[int, int]]] = {}
        for position, s in enumerate(c.slot(*everywhere(c)).flatten().tolist()):
            readers.setdefault(s, []).append(divmod(position, c.blocks))
        for s in rng.sample(range(c.slots), 40):
            found = c.positions(s)
            assert sorted(map(tuple, found.tolist())) == readers.get(s, [])
            assert found.shape == (len(readers.get(s, [])), 2)


def test_positions_across_bands() -> None:
    c = draw(random.Random(0), rows=2**33, blocks=3, slots=2**31 - 1, laps=4, permute=True)
    for s in (0, 1, 2**31 - 2, 12345):
        found = c.positions(s)
        assert len(found) in (8, 12, 16)  # 3 * 2^33 positions on 2^31 - 1 slots, 4 at a time
        assert c.slot(*found.unbind(1)).eq(s).all()
        assert len({(n // c.rows_per_band) for n, _ in found.tolist()}) > 1
    with pytest.raises(IndexError, match="slot: got 704, wanted 0 to 703"):
        draw(random.Random(0), slots=704).positions(704)


def test_a_selection_reads_what_the_whole_weight_reads() -> None:
    c = draw(random.Random(3), rows=200, blocks=37, permute=True)
    n, b = everywhere(c)
    rows, columns = torch.randperm(200)[:50][:, None], torch.randperm(37)[:11]
    assert c.slot(rows, columns).equal(c.slot(n, b)[rows, columns])
    assert c.sign_words(rows, columns).equal(c.sign_words(n, b)[rows, columns])


def test_without_permutation_addresses_are_read_in_order() -> None:
    c = WindowLaw(0, 0, 64, 8, 8, 300, 0, "none", False, window=128, laps=2)
    slot = c.slot(*everywhere(c)).T.flatten()
    assert slot.tolist() == [*range(128), *range(128), *range(128, 256), *range(128, 256)]


def test_layers_seeds_and_cells_differ() -> None:
    n, b = torch.arange(1024)[:, None], torch.arange(16)
    maps = [
        WindowLaw(seed, layer, 1024, 16, 64, 4096, start, "vector", True, 256, 4)
        for seed, layer, start in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 16384))
    ]
    slots = [c.slot(n, b) for c in maps]
    signs = [c.negative(n, b)[..., 0] for c in maps]
    for i in range(1, 4):
        assert float((slots[0] == slots[i]).float().mean()) < 0.2
        assert abs(float((signs[0] == signs[i]).float().mean()) - 0.5) < 0.02 or i == 3
    assert signs[0].equal(signs[3])  # signs look at the position only


def line(slots: list[int], size: int, chunk: Callable[[int], int], swizzle: Callable) -> list[int]:
    """Addresses of the lanes: 4 to each of 8 rows, lane t of a row at chunk(t)."""
    return [s * size + (chunk(t) ^ swizzle(s)) * 16 for s in slots for t in range(4)]


def octets(window: int) -> Iterator[list[int]]:
    c = WindowLaw(4, 1, 128, 8, 64, 1024, 64, "none", True, window, 2)
    local = c.slot(*everywhere(c)) % 8 + 0  # only a check that slots keep the residue
    assert local.view(16, 8, 8).sort(1).values.eq(torch.arange(8)[:, None]).all()
    table = Scramble(window, 4).forward(torch.arange(3)[:, None], torch.arange(window))
    yield from table.view(-1, 8)[:40].tolist()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("element", "g"), [(2, 64), (2, 32), (4, 64), (4, 32)])
def test_shared_memory_is_read_without_conflicts(window: int, element: int, g: int) -> None:
    """16-byte reads by rows, transposed, and read-modify-writes of fp32 gradients by 8 bytes."""
    size = element * g  # bytes of a slot, in chunks of 16
    chunks = size // 16
    swizzle: Callable[[int], int] = {
        4: lambda s: s >> 1 & 3,  # two slots to a line of 128 bytes
        8: lambda s: s & 7,
        16: lambda s: (s & 1) << 2 | s & 2 | s >> 2 & 1,
    }[chunks]
    for slots in octets(window):
        for part in range(chunks // 4):
            # Lane t has neighbouring chunks; where a slot fills two lines, every fourth chunk.
            read = line(
                slots,
                size,
                lambda t, part=part: t * (chunks // 4) + part if chunks < 16 else t + 4 * part,
                swizzle,
            )
            assert window_brute.wavefronts(read, 16) == 1
        for chunk in range(chunks):
            transposed = [s * size + (chunk ^ swizzle(s)) * 16 for s in slots]
            assert window_brute.wavefronts(transposed, 16) == 1
        for warp in range(g // 8):  # a warp owns 8 elements of every slot: 32 bytes of fp32
            update = [
                s * g * 4 + (warp ^ (s & min(7, g // 8 - 1))) * 32 + t * 8
                for s in slots
                for t in range(4)
            ]
            assert window_brute.wavefronts(update, 8) == 1


def test_unstratified_slots_do_conflict() -> None:
    rng = random.Random(0)
    drawn = [rng.sample(range(256), 8) for _ in range(200)]
    trips = [
        window_brute.wavefronts([s * 128 + (3 ^ s & 7) * 16 for s in slots], 16) for slots in drawn
    ]
    assert sum(trips) / len(trips) > 2


@pytest.mark.parametrize("shape", [*brute_force.MATRICES, *brute_force.KERNELS])
@pytest.mark.parametrize("reflect", ["element", "vector", "none"])
def test_the_explicit_map_is_in_torchs_layout(shape: tuple[int, ...], reflect: str) -> None:
    fields = {"slots": 70, "granularity": 16, "window": 64, "laps": 2, "seed": 3, "layer": 4}
    start, _ = place(shape, 16, cursor=1000)
    generator = Generator(70, 16, reflect, window=64, laps=2, seed=fields["seed"], law=WINDOW_LAW)
    index, sign = explicit_map(Placement(generator, 4, start, shape, 1.0))
    assert (index.shape, sign.shape) == (shape, shape)
    _, c = layer_law(shape, start=start, reflect=reflect, **fields)
    block, blocks, layout = brute_force.row_layout(shape, 16)
    assert (block, blocks) == (c.granularity, c.blocks)
    assert c.slots * block == 70 * 16
    flat, flat_sign = (each.reshape(*shape[:2], -1) for each in (index, sign))
    rng = random.Random(0)
    for channel, tap in rng.sample(sorted(layout), min(20, len(layout))):
        b, e = layout[channel, tap]
        n = rng.randrange(shape[0])
        assert int(flat[n, channel, tap]) == window_brute.reads(c, n, b) * block + e
        negative = window_brute.negative(c, n, b, e)
        assert float(flat_sign[n, channel, tap]) == (-1.0 if negative else 1.0)


def test_traffic_falls_by_the_laps() -> None:
    """Windows loaded, when every unit loads its own, against positions."""
    for shape, laps in (((4096, 4096), 4), ((4096, 4096), 8), ((512, 512, 3, 3), 4)):
        matrix = VirtualMatrix(shape, 64)
        _, c = layer_law(shape, slots=31250, granularity=64, window=256, laps=laps, start=64 * 640)
        p = c.order(*everywhere(c), 0)
        loads = int((c.address(p, 0) + c.start).div(c.cell, rounding_mode="floor").unique().numel())
        reduction = matrix.rows * matrix.blocks / (loads * c.window)
        assert laps * 0.93 < reduction <= laps


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"window": 100},
            ValueError,
            r"window: got 100, wanted a power .* multiple of 8",
        ),
        ({"window": 192}, ValueError, "window: got 192, wanted a power of two"),
        ({"window": 32}, ValueError, "window: got 32, .* from 64 to 32768"),
        ({"window": 2**16}, ValueError, "window: got 65536"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"window": 512}, ValueError, "window: got 512, wanted at most the ring's 400 slots"),
        ({"window": 64.0}, TypeError, "window: got 64.0"),
        ({"window": True}, TypeError, "window: got True"),
        ({"laps": 0}, ValueError, "laps: got 0, wanted an int from 1 to 64"),
        ({"laps": 65}, ValueError, "laps: got 65"),
        ({"laps": 2.0}, TypeError, "laps: got 2.0"),
        ({"start": -64}, ValueError, "start: got -64"),
        ({"start": 64 * 33}, ValueError, "start: got 2112, wanted a multiple of 4096 elements"),
        ({"slots": 0}, ValueError, "slots: got 0"),
        ({"granularity": 48}, ValueError, "granularity: got 48"),
    ],
)
def test_bad_fields(change: dict[str, object], error: type[Exception], message: str) -> None:
    fields = {"slots": 400, "granularity": 64, "window": 256, "laps": 4} | change
    with pytest.raises(error, match=message):
        layer_law((128, 128), **fields)


def test_laps_above_the_compression() -> None:
    check_window(256, 16, 704)
    span = 704 * 64 * 17
    check_laps(17, 704 * 64, span)
    with pytest.raises(ValueError, match="laps: got 18, wanted at most 17, as 765952 weights"):
        check_laps(18, 704 * 64, span)
    check_laps(1, 1000, 10)  # a bank larger than the model: slots are used at most once
    with pytest.raises(ValueError, match="laps: got 2, wanted at most 1"):
        check_laps(2, 1000, 10)
    # What the check is for: with more laps than that some slots are never read.
    for laps, unused in ((4, 0), (8, 256)):
        uses = model([(64, 64 * 32)], 512, 64, 256, laps)[0].view(512, 64)[:, 0]
        assert int(uses.eq(0).sum()) == unused
        assert Counter(uses.tolist()).keys() <= {0, laps}


def test_starts_are_aligned_to_columns() -> None:
    assert [alignment(n) for n in (1, 7, 8, 63, 64, 100, 4096)] == [1, 4, 8, 32, 64, 64, 64]
    cursor = 0
    for shape in [(10, 37), (64, 64), (3, 5), (100, 64, 3, 3)]:
        start, end = place(shape, 64, cursor)
        matrix = VirtualMatrix(shape, 64)
        assert start % (alignment(matrix.rows) * matrix.block) == 0
        assert 0 <= start - cursor < alignment(matrix.rows) * matrix.block
        assert end - start == matrix.span == math.prod(shape[:1]) * matrix.blocks * matrix.block
        cursor = end


def test_the_worked_example() -> None:
    """Two layers of docs/window_law.md, section 7."""
    c = WindowLaw(2, 1, 100, 20, 64, 704, 448, "vector", True, window=256, laps=2)
    assert (c.cell, c.head(0), c.units(0)) == (512, 64, 3)
    n, b = torch.tensor([37, 98]), torch.tensor([9, 3])
    assert c.order(n, b, 0).tolist() == [613, 1934]
    assert c.slot(n, b).tolist() == [614, 454]
    assert c.negative(n, b)[:, 0].tolist() == [False, True]
    c = WindowLaw(3, 6, 5000, 9, 64, 704, 448, "vector", True, window=128, laps=16)
    assert (c.cell, c.head(0), c.units(0), c.scramble.rounds) == (2048, 1600, 21, 8)
    n, b = torch.tensor([3000, 4611]), torch.tensor([7, 3])
    p = c.order(n, b, 0)
    assert p.tolist() == [31672, 42243]
    assert (c.address(p, 0) + c.start).tolist() == [40312, 11971]
    assert c.slot(n, b).tolist() == [362, 663]
    assert c.negative(n, b)[:, 0].tolist() == [True, False]
