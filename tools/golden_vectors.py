"""Writes the golden vectors of a packing law: the values that must never change.

    python tools/golden_vectors.py [--law 1|2] [--out FILE] [--new-law]

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
from pathlib import Path
from typing import Any

import torch

from rpg_kernels.law.ring import LAW_VERSION, LayerLaw, keys
from rpg_kernels.law.window import WINDOW_LAW, WindowLaw, alignment

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
RING = 2**64 - 1  # the layer number whose keys scramble windows
NAMES = (
    "seed",
    "layer",
    "rows",
    "blocks",
    "granularity",
    "slots",
    "start",
    "reflect",
    "permute",
    "window",
    "laps",
)

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

# name -> the same, window, laps; slots, start and window in blocks of the layer
WINDOW_POINTS: dict[str, tuple[Any, ...]] = {
    "single position": (0, 0, 1, 1, 64, 64, 0, "vector", True, 64, 1),
    "one row": (9, 2, 1, 4096, 64, 704, 700, "vector", True, 256, 4),
    "one block": (9, 3, 20011, 1, 64, 31250, 31232, "vector", True, 256, 16),
    "worked example": (2, 1, 100, 20, 64, 704, 448, "vector", True, 256, 2),
    "12 x 12, smallest ring": (2, 0, 12, 12, 64, 64, 8, "element", True, 64, 1),
    "63 x 5": (2, 2, 63, 5, 16, 300, 32, "element", True, 64, 3),
    "less than a cell": (2, 3, 64, 9, 64, 704, 1024, "vector", True, 256, 4),
    "ends inside the cell before": (2, 3, 64, 9, 64, 704, 1088, "vector", True, 512, 4),
    "997 x 13": (2, 4, 997, 13, 64, 4096, 64, "vector", True, 256, 4),
    "4096 rows": (3, 4, 4096, 64, 64, 31250, 12352, "vector", True, 256, 4),
    "4097 rows": (3, 5, 4097, 3, 64, 1000, 64, "vector", True, 128, 8),
    "5000 rows": (3, 6, 5000, 9, 64, 704, 448, "vector", True, 128, 16),
    "8191 rows": (3, 7, 8191, 2, 64, 704, 64, "element", True, 64, 2),
    "14336 rows": (3, 8, 14336, 64, 64, 31250, 0, "vector", True, 256, 16),
    "50257 x 12": (3, 9, 50257, 12, 64, 31250, 64, "vector", True, 512, 8),
    "128256 x 16": (3, 10, 128256, 16, 64, 31250, 262144, "vector", True, 1024, 16),
    "convolution 512 x 4608": (0, 7, 512, 72, 64, 704, 64, "vector", True, 128, 8),
    "7 laps": (5, 0, 640, 36, 64, 1000, 640, "element", True, 128, 7),
    "64 laps": (5, 1, 2048, 36, 64, 704, 128, "vector", True, 64, 64),
    "cells of no power of two": (5, 2, 1000, 37, 64, 777, 192, "vector", True, 64, 5),
    "window 32768": (5, 3, 4096, 40, 64, 40000, 4096, "vector", True, 32768, 3),
    "blocks of 8, slots of 64": (11, 0, 40, 137, 8, 5632, 160, "element", True, 2048, 3),
    "blocks of 1, slots of 128": (11, 1, 256, 147, 1, 90112, 192, "element", True, 8192, 2),
    "largest window": (11, 2, 32768, 200, 1, 5120000, 64, "element", True, 2**22, 1),
    "granularity 128": (11, 3, 640, 24, 128, 15625, 64, "element", True, 256, 4),
    "no reflection": (11, 4, 640, 24, 64, 333, 64, "none", True, 128, 4),
    "no permutation": (11, 5, 640, 24, 64, 333, 64, "vector", False, 128, 3),
    "no generating matrix": (11, 6, 640, 24, 64, 333, 64, "none", False, 128, 4),
    "largest seed": (2**63 - 1, 12345, 960, 40, 64, 704, 64, "element", True, 256, 4),
    "largest ring": (6, 6, 5000, 40, 64, 2**31 - 1, 2**31 - 64, "vector", True, 256, 4),
    "laps beyond 2^29": (6, 7, 5000, 9, 64, 704, 2**37 - 64, "vector", True, 256, 4),
    "start below 2^61": (6, 8, 5000, 9, 2, 704, 2**61 - 64, "element", True, 256, 4),
    "start at 2^62": (6, 9, 14336, 3, 1, 5000, 2**62, "element", True, 512, 3),
    "2^31 positions": (6, 0, 2**25, 64, 64, 31250, 64, "vector", True, 256, 4),
    "bands": (6, 1, 2**33, 3, 64, 31250, 64, "element", True, 256, 4),
    "bands that cut units": (6, 1, 2**33, 3, 64, 31250, 64, "vector", True, 256, 7),
    "bands, no permutation": (6, 2, 2**33, 3, 64, 31250, 64, "vector", False, 256, 4),
    "bands of one row": (6, 3, 5, 2**31 - 1, 64, 2**31 - 1, 2**31 - 4, "vector", True, 256, 4),
    "bands, last one short": (6, 4, 2**28 + 5007, 11, 64, 704, 64, "vector", True, 128, 16),
}
WINDOW_WHOLE: dict[str, tuple[Any, ...]] = {
    "whole, 100 x 20": (2, 1, 100, 20, 64, 704, 448, "vector", True, 256, 2),
    "whole, 1003 x 64": (2, 5, 1003, 64, 64, 704, 64, "element", True, 256, 16),
    "whole, 4096 x 64": (3, 4, 4096, 64, 64, 31250, 12352, "vector", True, 256, 4),
    "whole, 5000 x 9": (3, 6, 5000, 9, 64, 704, 448, "vector", True, 128, 16),
    "whole, 8191 x 2": (3, 7, 8191, 2, 64, 704, 64, "element", True, 64, 2),
    "whole, 14336 x 16": (3, 8, 14336, 16, 64, 31250, 0, "vector", True, 256, 16),
    "whole, 20011 x 1": (9, 3, 20011, 1, 64, 31250, 31232, "vector", True, 256, 16),
    "whole, 640 x 36, 7 laps": (5, 0, 640, 36, 64, 1000, 640, "element", True, 128, 7),
    "whole, blocks of 8": (11, 0, 40, 137, 8, 5632, 160, "element", True, 2048, 3),
    "whole, 50257 x 12": (3, 9, 50257, 12, 64, 31250, 64, "vector", True, 512, 8),
}
KINDS: dict[int, type[LayerLaw]] = {LAW_VERSION: LayerLaw, WINDOW_LAW: WindowLaw}


def points(layer: LayerLaw, count: int = 10) -> list[list[int]]:
    """The corners, the edges of bands and strips, and some positions between, always the same."""
    rows, blocks = layer.rows, layer.blocks
    draw = random.Random(rows * 1000003 + blocks)
    band = 1 << (max(1, 2**31 // blocks).bit_length() - 1)
    edges = [(0, 0), (rows - 1, blocks - 1), (0, blocks - 1), (rows - 1, 0), (rows // 2, 0)]
    cuts = [band - 1, band]
    if isinstance(layer, WindowLaw):
        strip = 1 << (min(rows, 4096).bit_length() - 1)
        cuts += [strip - 1, strip, rows // strip * strip - 1, rows // strip * strip]
    edges += [(n, b) for n in cuts if n < rows for b in (0, blocks - 1)]
    edges += [(draw.randrange(rows), draw.randrange(blocks)) for _ in range(count)]
    return [[n, b] for n, b in dict.fromkeys(edges)]


def at_points(kind: type[LayerLaw], config: tuple[Any, ...]) -> dict[str, Any]:
    """Slots, sign words and negative elements at some positions of a layer."""
    layer = kind(*config)
    where = points(layer)
    n, b = torch.tensor(where).unbind(1)
    record: dict[str, Any] = {
        "config": dict(zip(NAMES, config, strict=False)),
        "keys": list(keys(layer.seed, layer.layer, 0, 0, 2)),
        "sign keys": list(keys(layer.seed, layer.layer, 0, 128, 2)),
        "points": where,
        "slots": layer.slot(n, b).tolist(),
    }
    if isinstance(layer, WindowLaw):
        assert layer.start % alignment(layer.rows) == 0
        record["ring keys"] = list(keys(layer.seed, RING, 0, 128, 6))
        record["addresses"] = [address(layer, *position) for position in where]
    if layer.reflect != "none":
        record["sign words"] = layer.sign_words(n, b).tolist()
        negative = layer.negative(n, b)
        # Element e of a block is bit e of a hexadecimal number.
        record["negative"] = [
            hex(sum(bit << e for e, bit in enumerate(block))) for block in negative.tolist()
        ]
    return record


def address(layer: WindowLaw, n: int, b: int) -> int:
    """Where a position lies on the address line."""
    band, row = divmod(n, layer.rows_per_band)
    p = layer.order(torch.tensor([row]), torch.tensor([b]), band)
    return layer.first(band) + int(layer.address(p, band))


def whole(kind: type[LayerLaw], config: tuple[Any, ...]) -> dict[str, Any]:
    """Checksums of a layer's slots (int32) and sign words (uint32), row by row, little endian."""
    layer = kind(*config)
    n, b = torch.arange(layer.rows)[:, None], torch.arange(layer.blocks)
    slots = layer.slot(n, b).numpy().astype("<i4").tobytes()
    words = layer.sign_words(n, b).numpy().astype("<u4").tobytes()
    return {
        "config": dict(zip(NAMES, config, strict=False)),
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
    parser.add_argument("--out", type=Path, help="law1.json or law2.json in tests/golden")
    parser.add_argument("--new-law", action="store_true", help="overwrite entries that differ")
    args = parser.parse_args(arguments)

    out = args.out or FOLDER / f"law{args.law}.json"
    kind = KINDS[args.law]
    at, all_of = (WINDOW_POINTS, WINDOW_WHOLE) if kind is WindowLaw else (POINTS, WHOLE)
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
