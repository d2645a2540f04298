"""What the values of a bank mean: the record that state dicts and checkpoints carry."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels._json import parse_json
from rpg_kernels.law.generator import Generator, TableGenerator, parse_generator
from rpg_kernels.law.placement import Placement
from rpg_kernels.law.unit import MAX_LAPS, UNIT_LAW

_MAX_DIMENSIONS = 64  # torch's; the product of thousands of sizes takes seconds
_LONGEST_SCALE = len(repr(-2.2250738585072014e-308))
DIGITS = "map_digits"  # the buffer of a bank that holds its map


@dataclass(frozen=True)
class BankMap:
    """A generator and, in order of their numbers, the layers that read the bank.

    Args:
        generator: what G is.
        placements: of whole weights: segment, shape and scale of layers 0, 1, ...

    Example:
        >>> from rpg_kernels import ParameterBank
        >>> bank = ParameterBank(dof=640, granularity=64)
        >>> _ = bank.place((3, 128), scale=0.5)
        >>> bank.map.record()["placements"]
        [{'start': 0, 'shape': [3, 128], 'scale': 0.5}]
        >>> BankMap.from_record(bank.map.record()) == BankMap.from_tensor(bank.map.to_tensor())
        True
    """

    generator: Generator | TableGenerator
    placements: tuple[Placement, ...]

    def record(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        placements = [_placement(p) for p in self.placements]
        return {"generator": json.loads(self.generator.to_json()), "placements": placements}

    @classmethod
    def from_record(cls, record: object) -> BankMap:
        """The inverse of record, for values from anywhere.

        Raises:
            ValueError: not such a record, or one that no bank can have.
        """
        try:
            generator = None
            if isinstance(record, dict) and "generator" in record:
                # Before the names: a law that is not known here may have others.
                generator = parse_generator(json.dumps(record["generator"]))
            _, given = _fields(record, "generator", "placements")
            assert generator is not None
            placements = []
            for layer, item in enumerate(_list("placements", given)):
                start, shape, scale, *taps = _fields(item, *_names(generator))
                for each in taps:
                    _checks.integer("taps", each, 1, MAX_LAPS)
                shape = tuple(_list("shape", shape))
                _checks.integer("dimensions", len(shape), 2, _MAX_DIMENSIONS)
                placements.append(
                    Placement(generator, layer, start, shape, scale, None, None, *taps)
                )
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"a map that cannot be read ({error})") from error
        return cls(generator, tuple(placements))

    def to_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """As float16 ``[digits]``: lines of JSON (generator, then layers), as hexadecimal digits.

        Digits from 0 to 15 survive what people do to whole state dicts: sums and divisions of
        checkpoints, moving averages, casts to 16 bits. Blanks make the length independent of the
        scales, since ``torch.distributed.checkpoint`` and others load into tensors of the same
        size only.
        """
        lines = [self.generator.to_json().encode(), *map(line_of, self.placements)]
        return digits_of(lines).to(device)

    @classmethod
    def from_tensor(cls, digits: object) -> BankMap:
        """The inverse of to_tensor; of any real dtype, since state dicts are cast as a whole.

        Raises:
            ValueError: not such a tensor.
        """
        if not isinstance(digits, Tensor):
            raise _checks.fail(DIGITS, f"a {type(digits).__name__}", "a tensor of digits")
        if digits.is_meta or digits.is_complex():
            raise _checks.fail(DIGITS, f"{digits.dtype} on {digits.device}", "digits, not on meta")
        try:
            values = digits.detach().cpu().double()
            whole = values.round()
            # What averaging leaves is far closer to a digit than this.
            if not bool(((values - whole).abs() < 0.25).all() & (whole >= 0).all()):
                raise ValueError("fractions or negative numbers")
            if bool((whole > 15).any()) or whole.numel() % 2:
                raise ValueError("numbers above 15, or an odd number of them")
            high, low = whole.to(torch.uint8).reshape(-1, 2).unbind(1)
            generator, *lines = bytes((high * 16 + low).tolist()).split(b"\n")
            placements = [parse_json(line) for line in lines]
            record = {"generator": parse_json(generator), "placements": placements}
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"a map that cannot be read ({error}); of checkpoints that were summed without "
                f"dividing, take {DIGITS} from one of them"
            ) from error
        return cls.from_record(record)

    def difference(self, wanted: BankMap) -> str:
        """How this map gives the same values another meaning; "" when at most scales differ."""
        got_fields, wanted_fields = (json.loads(m.generator.to_json()) for m in (self, wanted))
        names = ["law"] if got_fields["law"] != wanted_fields["law"] else list(wanted_fields)
        parts = [
            f"{name}: got {got_fields[name]}, wanted {wanted_fields[name]}"
            for name in names
            if got_fields[name] != wanted_fields[name]
        ]
        if parts:
            return "; ".join(parts)
        if len(self.placements) != len(wanted.placements):
            return f"layers: got {len(self.placements)}, wanted {len(wanted.placements)}"
        for theirs, ours in zip(self.placements, wanted.placements, strict=True):
            for name in ("shape", "start", "taps"):
                got, want = getattr(theirs, name), getattr(ours, name)
                if got != want:
                    return f"{name} of layer {ours.layer}: got {got}, wanted {want}"
        return ""


def line_of(placement: Placement) -> bytes:
    """A layer's line of the map; its length does not depend on the scale."""
    line = json.dumps(_placement(placement), separators=(",", ":"))
    return f"{line}{' ' * (_LONGEST_SCALE - len(repr(float(placement.scale))))}".encode()


def digits_of(lines: list[bytes]) -> Tensor:
    """Lines as float16 digits, two for each byte, on the CPU."""
    text = torch.frombuffer(bytearray(b"\n".join(lines)), dtype=torch.uint8)
    return torch.stack((text >> 4, text & 15), dim=1).flatten().to(torch.float16)


def no_map(device: torch.device) -> Tensor:
    """A buffer without digits yet."""
    return torch.empty(0, dtype=torch.float16, device=device)


def _names(generator: Generator | TableGenerator) -> tuple[str, ...]:
    """Fields of a layer's record: what a placement has beside the generator and its number."""
    return ("start", "shape", "scale", *(["taps"] if generator.law == UNIT_LAW else []))


def _placement(p: Placement) -> dict[str, Any]:
    values = {"shape": list(p.shape), "scale": float(p.scale)}
    return {name: values.get(name, getattr(p, name)) for name in _names(p.generator)}


def _fields(record: object, *names: str) -> list[Any]:
    """The values of a record that has these fields and no others."""
    if not isinstance(record, dict) or set(record) != set(names):
        got = sorted(record) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(f"got {got}, wanted a record of {', '.join(names)}")
    return [record[name] for name in names]


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise _checks.fail(name, f"a {type(value).__name__}", "a list")
    return value
