"""Writes the golden vectors of a packing law: the values that must never change.

    python tools/golden_vectors.py [--law 1|3] [--out FILE] [--new-law]

New configurations are added to the file. One that is there already with other values is refused:
a law that gives other values is a new law version, with a file of its own. ``--new-law`` overwrites
anyway, for a law that no release has fixed yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rpg_kernels.law.ring import LAW_VERSION, LayerLaw, keys
from rpg_kernels.law.unit import UNIT_LAW, UnitLaw

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
# name -> seed, layer, rows, blocks, granularity, slots, start, reflect, permute
POINTS: dict[str, tuple[Any, ...]] = {
    "single position": (0, 0, 1, 1, 64, 1, 0, "vector", True),
    "two positions": (1, 0, 2, 1, 64, 7, 6, "vector", True),
    "prime, 7": (0, 0, 7, 1, 32, 3, 1, "element", True),
    "one row": (9, 2, 1, 4096, 64, 704, 700, "vector", True),
    "one block": (9, 3, 20011, 1, 64, 31250, 31249, "vector", True),
    "swap-or-not, 24 rounds": (5, 1, 10007, 3, 128, 704, 0, "element", True),
    "swap-or-not, 24 rounds, 65521": (5, 3, 65521, 1, 8, 704, 0, "vector", True),
    "swap-or-not, 48 rounds, 65537": (5, 2, 65537, 1, 64, 704, 3, "vector", True),
    "swap-or-not, lopsided": (5, 4, 2999, 12, 64, 31250, 10, "vector", True),
    "12 x 12": (2, 0, 12, 12, 64, 50, 7, "vector", True),
    "31 x 31": (2, 1, 31, 31, 16, 961, 960, "element", True),
    "64 x 9": (2, 2, 64, 9, 64, 31250, 31000, "vector", True),
    "8 rounds, 127 x 127": (2, 3, 127, 127, 64, 704, 5, "vector", True),
    "6 rounds, 128 x 128": (2, 4, 4096, 4, 64, 704, 5, "vector", True),
    "6 rounds, A = 2B": (2, 5, 4096, 8, 64, 32768, 5, "vector", True),
    "10 rounds": (2, 6, 37, 13, 64, 100, 99, "element", True),
    "10 rounds, 50257 x 12": (2, 7, 50257, 12, 64, 31250, 77, "vector", True),
    "12 rounds": (2, 8, 997, 13, 64, 704, 0, "vector", True),
    "12 rounds, 1723 x 12": (2, 9, 1723, 12, 64, 704, 0, "vector", True),
    "convolution 512 x 4608": (0, 7, 512, 72, 64, 704, 100, "vector", True),
    "matrix 4096 x 4096": (3, 4, 4096, 64, 64, 31250, 12345, "vector", True),
    "granularity 1": (11, 0, 100, 147, 1, 9973, 42, "element", True),
    "granularity 2": (11, 1, 32, 5, 2, 1000, 999, "element", True),
    "granularity 128": (11, 2, 64, 24, 128, 15625, 9, "element", True),
    "no reflection": (11, 3, 64, 24, 64, 333, 9, "none", True),
    "no permutation": (11, 4, 64, 24, 64, 333, 300, "vector", False),
    "no generating matrix": (11, 5, 64, 24, 64, 333, 300, "none", False),
    "one slot": (11, 6, 17, 3, 64, 1, 0, "element", True),
    "largest seed": (2**63 - 1, 12345, 96, 40, 64, 704, 1, "element", True),
    "2^31 positions": (6, 0, 2**25, 64, 64, 31250, 17, "vector", True),
    "bands": (6, 1, 2**33, 3, 64, 31250, 17, "element", True),
    "bands, no permutation": (6, 2, 2**33, 3, 64, 31250, 17, "vector", False),
    "bands of one row": (6, 3, 5, 2**31 - 1, 64, 2**31 - 1, 2**31 - 2, "vector", True),
    "bands, last one short": (6, 4, 2**28 + 7, 11, 64, 704, 3, "vector", True),
}

# Whole layers, as a checksum.
WHOLE: dict[str, tuple[Any, ...]] = {
    "whole, 512 x 72": (0, 7, 512, 72, 64, 704, 100, "vector", True),
    "whole, 4096 x 64": (3, 4, 4096, 64, 64, 31250, 12345, "element", True),
    "whole, 20011 x 1": (9, 3, 20011, 1, 64, 31250, 31249, "vector", True),
    "whole, 10007 x 3": (5, 1, 10007, 3, 128, 704, 0, "element", True),
    "whole, 997 x 13": (2, 8, 997, 13, 64, 704, 0, "vector", True),
    "whole, 37 x 13": (2, 6, 37, 13, 64, 100, 99, "element", True),
    "whole, 50257 x 12": (2, 7, 50257, 12, 64, 31250, 77, "vector", True),
    "whole, 100003 x 1": (1, 1, 100003, 1, 64, 9973, 0, "vector", True),
    "whole, 128256 x 16": (0, 0, 128256, 16, 64, 31250, 0, "vector", True),
}

# name -> the nine of law 1, laps, window, runs, taps; start in uses, slots in blocks of the layer
UNIT_POINTS: dict[str, tuple[Any, ...]] = {
    "single position": (0, 0, 1, 1, 64, 1, 0, "vector", True, 1, None, 1, 1),
    "one row": (9, 2, 1, 4096, 64, 704, 700, "vector", True, 4, None, 1, 1),
    "one block": (9, 3, 20011, 1, 64, 31250, 31232, "vector", True, 16, None, 1, 1),
    "worked example": (2, 1, 100, 20, 64, 704, 448, "vector", True, 2, 64, 1, 1),
    "worked example, convolution": (3, 6, 60, 18, 64, 100, 40, "element", True, 4, 16, 9, 3),
    "12 x 12, smallest ring": (2, 0, 12, 12, 64, 1, 8, "element", True, 1, None, 1, 1),
    "ring of 7 slots": (2, 2, 63, 5, 16, 7, 33, "element", True, 3, None, 1, 1),
    "7 rows": (2, 3, 7, 9, 64, 50, 12, "vector", True, 4, None, 1, 1),
    "997 x 13": (2, 4, 997, 13, 64, 4096, 64, "vector", True, 4, None, 1, 1),
    "units of whole windows": (3, 4, 4096, 64, 64, 31250, 12352, "vector", True, 4, None, 1, 1),
    "11008 rows, 16 laps": (3, 5, 11008, 9, 64, 1000, 64, "vector", True, 16, None, 1, 1),
    "groups that differ": (3, 6, 5000, 9, 64, 704, 448, "vector", True, 16, 64, 1, 1),
    "units that share octets": (3, 7, 1016, 12, 64, 704, 42, "element", True, 7, 64, 1, 1),
    "14336 rows": (3, 8, 14336, 64, 64, 31250, 0, "vector", True, 16, None, 1, 1),
    "50257 x 12": (3, 9, 50257, 12, 64, 31250, 64, "vector", True, 8, 512, 1, 1),
    "128256 x 16": (3, 10, 128256, 16, 64, 31250, 262144, "vector", True, 16, 1024, 1, 1),
    "convolution 64 x 576": (0, 6, 64, 9, 64, 704, 0, "vector", True, 4, None, 9, 3),
    "convolution 512 x 4608": (0, 7, 512, 72, 64, 704, 64, "vector", True, 8, None, 9, 3),
    "convolution, all taps": (0, 8, 320, 45, 64, 704, 99, "vector", True, 9, None, 9, 9),
    "convolution, one tap": (0, 9, 320, 45, 64, 704, 99, "element", True, 9, None, 9, 1),
    "convolution 5 x 5": (0, 10, 90, 50, 64, 333, 20, "vector", True, 10, 128, 25, 5),
    "7 laps": (5, 0, 640, 36, 64, 1000, 637, "element", True, 7, 128, 1, 1),
    "64 laps": (5, 1, 2048, 36, 64, 704, 128, "vector", True, 64, 64, 1, 1),
    "a unit of 1982 octets": (4, 1, 15856, 3, 8, 5000, 6, "vector", True, 2, 4096, 1, 1),
    "smallest window": (5, 2, 1000, 37, 64, 777, 195, "vector", True, 5, 8, 1, 1),
    "units of one octet": (5, 3, 1000, 37, 64, 777, 195, "vector", True, 1, 8, 1, 1),
    "windows of 4096": (5, 4, 131072, 3, 64, 40000, 4096, "vector", True, 4, 4096, 1, 1),
    "64 laps of 2048": (5, 5, 260608, 2, 64, 50000, 64, "vector", True, 64, 2048, 1, 1),
    "blocks of 8, slots of 64": (11, 0, 40, 137, 8, 5632, 162, "element", True, 3, 256, 1, 1),
    "blocks of 1, slots of 128": (11, 1, 256, 147, 1, 90112, 192, "element", True, 2, None, 1, 1),
    "granularity 2": (11, 2, 32, 45, 2, 1000, 996, "element", True, 4, None, 9, 3),
    "granularity 128": (11, 3, 640, 24, 128, 15625, 64, "element", True, 4, 256, 1, 1),
    "no reflection": (11, 4, 640, 24, 64, 333, 64, "none", True, 4, 128, 1, 1),
    "no permutation": (11, 5, 640, 27, 64, 333, 63, "vector", False, 3, 64, 9, 3),
    "no generating matrix": (11, 6, 640, 24, 64, 333, 64, "none", False, 4, 128, 1, 1),
    "largest seed": (2**63 - 1, 12345, 960, 40, 64, 704, 64, "element", True, 4, None, 1, 1),
    "largest ring": (6, 6, 5000, 40, 64, 2**31 - 1, 2**28 - 4, "vector", True, 4, None, 1, 1),
    "start below 2^62": (6, 8, 5000, 9, 2, 704, 2**58 - 64, "element", True, 4, None, 1, 1),
    "start at 2^62": (6, 9, 14336, 3, 1, 5000, 2**59, "element", True, 64, None, 1, 1),
    "2^31 positions": (6, 0, 2**25, 64, 64, 31250, 64, "vector", True, 4, None, 1, 1),
    "bands": (6, 1, 2**33, 3, 64, 31250, 64, "element", True, 4, None, 1, 1),
    "bands that cut octets": (6, 1, 2**33, 3, 64, 31250, 63, "vector", True, 7, None, 3, 3),
    "bands, no permutation": (6, 2, 2**33, 3, 64, 31250, 64, "vector", False, 4, None, 1, 1),
    "bands of 8 rows": (6, 3, 21, 2**28, 64, 2**31 - 1, 2**28, "vector", True, 4, None, 1, 1),
    "bands, last one short": (6, 4, 2**28 + 5003, 11, 64, 704, 64, "vector", True, 16, 128, 1, 1),
}
UNIT_WHOLE: dict[str, tuple[Any, ...]] = {
    "whole, 100 x 20": (2, 1, 100, 20, 64, 704, 448, "vector", True, 2, 64, 1, 1),
    "whole, 1003 x 64": (2, 5, 1003, 64, 64, 704, 64, "element", True, 16, None, 1, 1),
    "whole, 4096 x 64": (3, 4, 4096, 64, 64, 31250, 12352, "vector", True, 4, None, 1, 1),
    "whole, 5000 x 9": (3, 6, 5000, 9, 64, 704, 448, "vector", True, 16, 64, 1, 1),
    "whole, 1016 x 12": (3, 7, 1016, 12, 64, 704, 42, "element", True, 7, 64, 1, 1),
    "whole, 14336 x 16": (3, 8, 14336, 16, 64, 31250, 0, "vector", True, 16, None, 1, 1),
    "whole, 20011 x 1": (9, 3, 20011, 1, 64, 31250, 31232, "vector", True, 16, None, 1, 1),
    "whole, convolution 512 x 4608": (0, 7, 512, 72, 64, 704, 64, "vector", True, 8, None, 9, 3),
    "whole, convolution 320 x 2880": (0, 8, 320, 45, 64, 704, 99, "vector", True, 9, None, 9, 9),
    "whole, blocks of 8": (11, 0, 40, 137, 8, 5632, 162, "element", True, 3, 256, 1, 1),
    "whole, ring of 7 slots": (2, 2, 63, 5, 16, 7, 33, "element", True, 3, None, 1, 1),
    "whole, 131072 x 3": (5, 4, 131072, 3, 64, 40000, 4096, "vector", True, 4, 4096, 1, 1),
}
KINDS: dict[int, type[LayerLaw]] = {LAW_VERSION: LayerLaw, UNIT_LAW: UnitLaw}


def points(layer: LayerLaw, count: int = 10) -> list[list[int]]:
    """Corners, edges of bands and groups, and some positions between, always the same."""
    rows, blocks = layer.rows, layer.blocks
    draw = random.Random(rows * 1000003 + blocks)
    band = 1 << (max(1, 2**31 // blocks).bit_length() - 1)
    edges = [(0, 0), (rows - 1, blocks - 1), (0, blocks - 1), (rows - 1, 0), (rows // 2, 0)]
    cuts = [band - 1, band]
    if isinstance(layer, UnitLaw):
        size, larger = divmod(layer.octets(0), layer.groups(0))
        first = 8 * (size + (larger > 0))  # row of the second group
        cuts += [7, 8, first - 1, first, 8 * (size * layer.groups(0) - size + larger)]
    edges += [(n, b) for n in cuts if n < rows for b in (0, blocks - 1)]
    edges += [(draw.randrange(rows), draw.randrange(blocks)) for _ in range(count)]
    return [[n, b] for n, b in dict.fromkeys(edges)]


def at_points(kind: type[LayerLaw], config: tuple[Any, ...]) -> dict[str, Any]:
    """Slots, sign words and negative elements at some positions of a layer."""
    layer = kind(*config)
    where = points(layer)
    n, b = torch.tensor(where).unbind(1)
    record: dict[str, Any] = {
        "config": asdict(layer),
        "keys": list(keys(layer.seed, layer.layer, 0, 0, 2)),
        "sign keys": list(keys(layer.seed, layer.layer, 0, 128, 2)),
        "points": where,
        "slots": layer.slot(n, b).tolist(),
    }
    if isinstance(layer, UnitLaw):
        assert layer.start % layer.laps == 0
        record["groups"] = layer.groups(0)
        record["uses"] = [use_of(layer, *position) for position in where]
    if layer.reflect != "none":
        record["sign words"] = layer.sign_words(n, b).tolist()
        negative = layer.negative(n, b)
        # Element e of a block is bit e of a hexadecimal number.
        record["negative"] = [
            hex(sum(bit << e for e, bit in enumerate(block))) for block in negative.tolist()
        ]
    return record


def use_of(layer: UnitLaw, n: int, b: int) -> int:
    """The use of a position's octet, counted through all layers."""
    band, row = divmod(n, layer.rows_per_band)
    column, group, i, _ = layer.number(torch.tensor([row]), torch.tensor([b]), band)
    return layer.first(band) + int(layer.use(column, group, i, band))


def whole(kind: type[LayerLaw], config: tuple[Any, ...]) -> dict[str, Any]:
    """Checksums of a layer's slots (int32) and sign words (uint32), row by row, little endian."""
    layer = kind(*config)
    n, b = torch.arange(layer.rows)[:, None], torch.arange(layer.blocks)
    slots = layer.slot(n, b).numpy().astype("<i4").tobytes()
    words = layer.sign_words(n, b).numpy().astype("<u4").tobytes()
    return {
        "config": asdict(layer),
        "slots sha256": hashlib.sha256(slots).hexdigest(),
        "sign words sha256": hashlib.sha256(words).hexdigest(),
    }


def dump(law: int, entries: dict[str, Any]) -> str:
    """JSON with one line per value, so that a change shows as a small difference."""
    blocks = []
    for name, entry in entries.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items()]
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return f'{{"law": {law}, "entries": {{\n' + ",\n".join(blocks) + "\n}}\n"


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 when an entry would change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--law", type=int, choices=list(KINDS), default=LAW_VERSION)
    parser.add_argument("--out", type=Path, help="law1.json or law3.json in tests/golden")
    parser.add_argument("--new-law", action="store_true", help="overwrite entries that differ")
    args = parser.parse_args(arguments)

    out = args.out or FOLDER / f"law{args.law}.json"
    kind = KINDS[args.law]
    at, all_of = {
        LAW_VERSION: (POINTS, WHOLE),
        UNIT_LAW: (UNIT_POINTS, UNIT_WHOLE),
    }[args.law]
    old = json.loads(out.read_text())["entries"] if out.exists() else {}
    new = {name: at_points(kind, config) for name, config in at.items()}
    new |= {name: whole(kind, config) for name, config in all_of.items()}
    changed = [name for name, entry in new.items() if name in old and old[name] != entry]
    if changed and not args.new_law:
        print(f"{out}: the law gives other values for " + ", ".join(map(repr, changed)))
        print("Golden vectors are permanent; a law with other values needs a new version.")
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(dump(args.law, old | new))
    print(f"{out}: {len(new)} entries, {len(new.keys() - old.keys())} new")
    return 0


if __name__ == "__main__":
    sys.exit(main())
