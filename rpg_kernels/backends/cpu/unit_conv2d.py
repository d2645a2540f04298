"""Convolutions of the unit law: what the compiled CPU kernels run, in which tiles, and the calls.

A tap is a shift of lines of pixels; rows and taps that read a slot share its product with x. Lanes
are images, or with one lane the columns of an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import native, settings
from rpg_kernels._stored import StoredValues
from rpg_kernels._tensors import empty_image
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cpu import units
from rpg_kernels.backends.cpu.lanes_linear import bank_sum
from rpg_kernels.backends.cpu.memory import workspace
from rpg_kernels.law.geometry import conv_output
from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.law.unit import UnitLaw

OPERATORS = ("conv2d", "conv2d_input_grad", "conv2d_bank_grad")
BOTH = "conv2d_grads"
FEW_PIXELS = 64  # up to which the reference's unpacked weight costs more than products
# Narrower images are taken some at a time, so that their lines fill vectors.
WIDE, LANES = 16, 8
# Pixels of a tile times lanes: lines of S or T stay in the second cache.
_PIXELS = {"conv2d": 4096, "conv2d_input_grad": 320, "conv2d_bank_grad": 320, BOTH: 320}
_MOST_PIXELS = 2**24  # times lanes: of a tile, which has a row at least

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@lru_cache(maxsize=4096)
def unsupported(op: str, placement: str) -> str:
    """Why a convolution with a weight cannot run here, or "".

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> g = Generator(4096, 64, "vector", laps=4)
        >>> unsupported("conv2d", Placement(g, 0, 0, (64, 64, 3, 3), 1.0).to_json())
        ''
        >>> unsupported("conv2d", Placement(g, 0, 0, (64, 3, 7, 7), 1.0).to_json())
        'the CPU kernels leave kernels whose taps share a block to the reference'
    """
    p = parse(placement)
    if not isinstance(p.law, UnitLaw):
        return "the CPU kernels leave the gradients of a convolution to the reference"
    if op not in (*OPERATORS, BOTH):
        return f"the CPU kernels have no {op} of law 3"
    if p.matrix.block not in units.BLOCKS:
        return f"the CPU kernels convolve blocks of 16 to 128 elements, not of {p.matrix.block}"
    if p.law.rows_per_band < p.law.rows:
        return "products of law 3 are shared in weights of at most 2^31 blocks"
    if not p.matrix.by_tap:
        return "the CPU kernels leave kernels whose taps share a block to the reference"
    return ""


def unsupported_stride(placement: str, stride: Sequence[int]) -> str:
    """Why a stride does not go with a weight here, or ""."""
    law = parse(placement).law
    assert isinstance(law, UnitLaw)
    if law.taps == 1 or max(stride) == 1:
        return ""
    return f"the CPU kernels want units of one tap where the stride is {list(stride)}"


def faster(call: Call) -> bool:
    """Whether a call is faster here than in the reference, which unpacks the weight."""
    bank_dtype = None if call.bank is None else call.bank.dtype
    least = units.least_reads(call.op, call.dtype, bank_dtype, call.placement)
    shares = units.reads(call.placement) >= least
    if not call.rows or not (shares or call.rows <= FEW_PIXELS):
        return False
    geometry = tuples(*call.geometry[:3])
    return tile(call.op, call.placement, _size_of_x(call, geometry), geometry) is not None


def both_fit(call: Call) -> bool:
    """Whether the scratch limit allows both gradients at once, of whose first one this is."""
    geometry = tuples(*call.geometry[:3])
    return tile(BOTH, call.placement, _size_of_x(call, geometry), geometry) is not None


def _size_of_x(call: Call, geometry: Geometry) -> list[int]:
    """Of a gradient the largest x that has such a dy, which is all that a call says."""
    if call.op == "conv2d":
        return list(call.x.shape)
    p = parse(call.placement)
    height, width = (
        s * t - 2 * q + d * (k - 1)
        for s, k, t, q, d in zip(call.x.shape[2:], p.shape[2:], *geometry, strict=True)
    )
    return [len(call.x), p.shape[1], max(height, 1), max(width, 1)]


def tuples(*pairs: Sequence[int]) -> Geometry:
    """Stride, padding and dilation as what can be looked up."""
    stride, padding, dilation = (tuple(pair) for pair in pairs)
    return stride, padding, dilation


@dataclass(frozen=True)
class Tile:
    """How a call goes through its images, and the memory that it takes.

    Args:
        lanes: images at a time.
        rows: of y at a time; of gradients rows of x.
        threads: that share the tiles.
        workspace: bytes in all.
        scratch: of them, what the scratch limit counts: all but copies of activations.
        pairs: products are of pairs of bfloat16.
    """

    lanes: int
    rows: int
    threads: int
    workspace: int
    scratch: int
    pairs: bool = False


def tile(
    op: str, placement: str, size: Sequence[int], geometry: Geometry, pairs: bool = False
) -> Tile | None:
    """The largest tile that the scratch limit allows; None where none is allowed.

    Args:
        op: operator name.
        placement: of the weight.
        size: of x, ``[B, C, H, W]``.
        geometry: stride, padding and dilation.
        pairs: whether products of pairs are wanted, if they fit.
    """
    limit = settings.scratch_bytes("cpu")
    choices = _choices(op, placement, tuple(size), geometry, native.threads(), pairs)
    return next((choice for choice in choices if choice.scratch <= limit), None)


@lru_cache(maxsize=1024)
def _choices(
    op: str,
    placement: str,
    size: tuple[int, ...],
    geometry: Geometry,
    threads: int,
    pairs: bool = False,
) -> tuple[Tile, ...]:
    """From the fastest on. The last takes no more than that of any larger images, of which alone
    ``_size_of_x`` knows."""
    p = parse(placement)
    images, width = size[0], size[3]
    lanes = [1] if width >= WIDE or images <= LANES // 2 else [LANES, 1]
    out: list[Tile] = []
    while True:
        for paired, of_images in itertools.product((True, False) if pairs else (False,), lanes):
            out += _of_lanes(op, p, size, geometry, threads, of_images, paired)
        if threads == 1:
            return tuple(out)
        threads = -(-threads // 2)


def _of_lanes(
    op: str,
    p: Placement,
    size: tuple[int, ...],
    geometry: Geometry,
    threads: int,
    lanes: int,
    pairs: bool,
) -> list[Tile]:
    law: Any = native.layer_law(p.law)
    kernel, (stride, _padding, dilation) = p.shape[2:], geometry
    height, width = size[2:]
    out_height, out_width = conv_output(size[2:], kernel, *geometry)
    forward = op == "conv2d"
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    # Of a convolution with a stride, what a phase of x has (csrc/cpu/unit_conv2d_tile.h).
    wide = out_width + reach[1] // stride[1] if forward else width + reach[1]
    whole = out_height if forward else height
    strided = not forward and max(stride) > 1
    rows = whole if strided else max(1, min(whole, _PIXELS[op] // (wide * lanes)))
    if forward:  # a thread does whole tiles: there should be one for each
        rows = min(rows, max(1, whole // -(-threads // -(-size[0] // lanes))))
    if (rows + reach[0]) * wide * lanes > _MOST_PIXELS:
        return []
    out = []
    while True:
        how = (size, kernel, p.matrix.by_tap, *geometry, threads, lanes, rows)
        if forward:
            total, activations = law.unit_conv2d_workspace(*how, pairs=pairs)
        else:
            wanted = (op != "conv2d_bank_grad", op != "conv2d_input_grad")
            total, activations = law.unit_conv2d_grads_workspace(*how, *wanted, pairs=pairs)
        out.append(Tile(lanes, rows, threads, total, total - activations, pairs))
        if rows == 1 or strided:
            return out
        rows = -(-rows // 2)


def check(
    op: str, placement: str, size: Sequence[int], geometry: Geometry, pairs: bool = False
) -> Tile:
    """The tile of a call.

    Raises:
        RuntimeError: the weight cannot be read here, or the scratch limit is too small.
    """
    reason = unsupported(op, placement) or unsupported_stride(placement, geometry[0])
    if reason:
        raise RuntimeError(f"backend: got 'cpu' for {op}, which cannot run: {reason}")
    chosen = tile(op, placement, size, geometry, pairs)
    if chosen is None:
        choices = _choices(op, placement, tuple(size), geometry, native.threads())
        least = min((choice.scratch for choice in choices), default="smaller images, not more")
        raise RuntimeError(
            f"scratch_limit: got {settings.scratch_bytes('cpu')} bytes, wanted more for the cpu "
            f"back end of a virtual weight {list(parse(placement).shape)} and images of "
            f"{list(size[2:])}: {least} bytes"
        )
    return chosen


def check_call(call: Call) -> None:
    """As ``check``, of all that a call says."""
    geometry = tuples(*call.geometry[:3])
    check(call.op, call.placement, _positive(_size_of_x(call, geometry)), geometry)


def conv2d(
    x: Tensor, bank: Tensor, bias: Tensor | None, placement: str, geometry: Geometry
) -> Tensor:
    """x ``[B, C, H, W]`` -> ``[B, out, H', W']`` in x's memory format.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    kernel = p.shape[2:]
    y = empty_image(x, (x.shape[0], p.shape[0], *conv_output(x.shape[2:], kernel, *geometry)))
    pairs = units.pairs("conv2d", x.dtype, bank.dtype, placement)
    how = check("conv2d", placement, _positive(x.shape), geometry, pairs)
    if not y.numel() or not x.numel():
        y.zero_()
        return y if bias is None else y.add_(bias.view(-1, 1, 1))
    bank = bank.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    memory = workspace(how.workspace)
    native.layer_law(p.law).unit_conv2d(
        native.given_bank(bank),
        *_typed(x),
        x.shape,
        x.stride(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        not y.is_contiguous(),
        kernel,
        p.matrix.by_tap,
        *geometry,
        p.scale,
        how.threads,
        how.lanes,
        how.rows,
        memory.data_ptr(),
        how.pairs,
    )
    return y


def conv2d_input_grad(
    dy: Tensor, bank: Tensor, input_size: Sequence[int], placement: str, geometry: Geometry
) -> Tensor:
    """dy ``[B, out, H', W']`` -> dx of ``input_size`` in dy's memory format.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    dx = empty_image(dy, input_size)
    _run("conv2d_input_grad", placement, geometry, dy, dx, bank.contiguous(), dx, None, bank.dtype)
    return dx


def conv2d_bank_grad(
    dy: Tensor,
    x: Tensor,
    placement: str,
    geometry: Geometry,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> Tensor:
    """dy ``[B, out, H', W']``, x ``[B, C, H, W]`` -> dw ``[slots, granularity]`` of ``dtype``, or
    ``total``, which it is added to.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    dw = bank_sum(dy, parse(placement), total)
    _run("conv2d_bank_grad", placement, geometry, dy, x, None, None, dw, dtype)
    return dw.to(dtype) if total is None else total


def conv2d_grads(
    dy: Tensor,
    bank: Tensor,
    x: Tensor,
    placement: str,
    geometry: Geometry,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both gradients, (dx, dw): what rows and taps that read one slot add is summed once. Or
    ``total`` for dw.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    dx, dw = empty_image(dy, x.shape), bank_sum(dy, parse(placement), total)
    _run(BOTH, placement, geometry, dy, x, bank.contiguous(), dx, dw, dtype)
    return dx, dw.to(dtype) if total is None else total


def _run(
    op: str,
    placement: str,
    geometry: Geometry,
    dy: Tensor,
    x: Tensor,
    bank: Tensor | None,
    dx: Tensor | None,
    dw: Tensor | None,
    bank_dtype: torch.dtype,
) -> None:
    """Fill dx, which takes a bank, and add to dw; x has the shape of the input."""
    p = parse(placement)
    pairs = units.pairs(op, dy.dtype, bank_dtype, placement)
    how = check(op, placement, _positive(x.shape), geometry, pairs)
    if not dy.numel() or not x.numel():
        if dx is not None:
            dx.zero_()
        return
    memory = workspace(how.workspace)
    native.layer_law(p.law).unit_conv2d_grads(
        native.given_bank(bank),
        dy.data_ptr(),
        dy.stride(),
        x.data_ptr(),
        native.dtype_code(dy.dtype),
        x.shape,
        x.stride(),
        0 if dx is None else dx.data_ptr(),
        dx is not None and not dx.is_contiguous(),
        0 if dw is None else dw.data_ptr(),
        p.shape[2:],
        p.matrix.by_tap,
        *geometry,
        p.scale,
        how.threads,
        how.lanes,
        how.rows,
        memory.data_ptr(),
        how.pairs,
    )


def _positive(size: Sequence[int]) -> list[int]:
    """A size without zeros: of an empty batch or image, what one of them takes."""
    return [max(s, 1) for s in size]


def _typed(tensor: Tensor) -> tuple[int, int]:
    """Address and dtype of a tensor, which the caller keeps."""
    return tensor.data_ptr(), native.dtype_code(tensor.dtype)


def multiplications(placement: str, stored: StoredValues | None = None) -> int:
    """For one output pixel, without the padding of blocks and of images; ``stored`` is the bank,
    where its values are stored in fewer bytes."""
    plain = stored is None or stored.places is None
    return _of_whole_bank(placement) if plain else _multiplications(placement, stored)


@lru_cache(maxsize=4096)
def _of_whole_bank(placement: str) -> int:
    return _multiplications(placement, None)


def _multiplications(placement: str, stored: StoredValues | None) -> int:
    p = parse(placement)
    law, m = p.law, p.matrix
    assert isinstance(law, UnitLaw)
    columns = torch.arange(law.columns)
    last = columns % m.run_blocks == m.run_blocks - 1
    whole = units.slots_multiplied(law, columns[~last], stored) if not last.all() else 0
    of_last = m.run - (m.run_blocks - 1) * m.block
    return whole * m.block + units.slots_multiplied(law, columns[last], stored) * of_last
