"""Device functions that read a tile of a bank whose values are kept in fewer bytes.

    value[slot, e] = codes[row, e] * scales[row],  row = places[slot],  0 where the place is -1

Codes are int8, or the bytes of float8_e4m3fn, which are passed as uint8: processors before sm_89
have no conversion of their own, so that integer operations make one that is right everywhere. Banks
that were only compacted have values for codes and no scales; banks that were not have no places.
What is not there is None, which Triton compiles away, so that kernels of float banks are the same
as if there were no other ones.

Memory: a bank stays in its bytes, and is never written out; a tile reads 1 byte for a weight, and
for each of its blocks 4 bytes of a scale, and of a place. Budget: one conversion and one product
for a weight, and 4 lane-instructions more where codes are float8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.triton import entries

_spread = entries.spread


@dataclass(frozen=True)
class Ring:
    """The values of a bank, as kernels read them.

    Args:
        codes: ``[rows, block]``: the values, or codes; float8_e4m3fn as uint8.
        scales, places: of a bank that is kept in fewer bytes; None where there are none.
        parts: blocks of such a bank's slot; 1 of any other, for which nothing is compiled anew.
    """

    codes: Tensor
    scales: Tensor | None = None
    places: Tensor | None = None
    parts: int = 1

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Three arguments of a kernel."""
        return self.codes, self.scales, self.places


def ring_of(bank: Tensor, block: int) -> Ring:
    """bank ``[slots, granularity]``, or StoredValues, in blocks; a copy if it is not contiguous."""
    if not isinstance(bank, StoredValues):
        return Ring(bank.contiguous().view(-1, block))
    codes = bank.codes.view(-1, block)
    if codes.dtype == torch.float8_e4m3fn:
        codes = codes.view(torch.uint8)
    return Ring(codes, bank.scales, bank.places, bank.shape[1] // block)


@triton.jit
def numbers(codes):
    """What codes stand for, fp32: int8, or e4m3 as uint8; exact. NaN (0x7F, 0xFF) is no code.

    The bits of e4m3 are those of an fp16 of the same mantissa, 7 places further right: sign,
    4 of its 5 bits of exponent, 3 of its 10 of mantissa. The exponents' biases are 7 and 15, so
    that the fp16, which may be a subnormal one, is 2^-8 times the number.
    """
    if codes.dtype == tl.uint8:
        bits = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001  # all but bit 14
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        return codes.to(tl.float32)


@triton.jit
def block_of(slot, places_ptr, PARTS: tl.constexpr):
    """The block of codes, int64, that blocks ``slot`` of the ring lie in; negative where left out.

    Args:
        slot: int64, in blocks: PARTS of them are a slot of the bank.
        places_ptr: int32 [slots of the bank], or None: every slot lies in its own place.
    """
    if places_ptr is not None:
        place = tl.load(places_ptr + slot // PARTS).to(tl.int64)
        slot = place * PARTS + slot % PARTS
    return slot


@triton.jit
def over_tile(one, G: tl.constexpr, BLOCK_K: tl.constexpr):
    """What a tile has of each of its entries, in a shape that broadcasts to its elements'."""
    if G >= BLOCK_K:
        one = one[:, None]
    elif G >= 8:
        one = _spread(one, G)
    return one


@triton.jit
def read(
    bank_ptr,  # [rows * PARTS, G]: codes, or values
    scales_ptr,  # fp32 [rows], or None
    places_ptr,  # int32 [slots], or None
    at,
    block,
    wanted,
    G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Values of a tile: fp32 where there are scales, otherwise of the bank's dtype.

    Args:
        at: int64 offsets of codes from bank_ptr, of the tile's shape, found from ``block``.
        block: see block_of; of the entries' shape, which over_tile brings to the tile's.
        wanted: what is to be read, booleans of the tile's shape or one that broadcasts to it; None
            is all. The rest is zero, and so is what was left out.
    """
    mask = wanted
    if places_ptr is not None:
        here = over_tile(block, G, BLOCK_K) >= 0
        mask = tl.broadcast_to(here, at.shape) if mask is None else mask & here
    value = tl.load(bank_ptr + at) if mask is None else tl.load(bank_ptr + at, mask=mask, other=0)
    if scales_ptr is not None:
        row = block // PARTS
        if places_ptr is None:
            scale = tl.load(scales_ptr + row)
        else:
            scale = tl.load(scales_ptr + row, mask=block >= 0, other=0.0)
        value = numbers(value) * over_tile(scale, G, BLOCK_K)
    return value
