"""Which pixels a convolution's rows read: device functions, and the host's arithmetic for them.

`Reads` tells it for the forward and for the input gradient alike. Row (b, i, j) of a grid of
pixels reads, at tap (th, tw), pixel

    (b, i * step_h + start_h + th * reach_h, j * step_w + start_w + tw * reach_w)

of an image, or zero outside of it. Taps are walked th outermost, and within a tap some *parts*:
steps of channels in the forward, of the weight's rows in the input gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels._tensors import empty_image
from rpg_kernels.backends.triton.config import Config, choose, dot_precision, gpu
from rpg_kernels.law.placement import Placement, parse, split

# Integers of a convolution's kernels that no address is made of, or none that is a vector's. Sizes
# come and go as multiples of 16: a kernel compiled anew for each of them gains nothing.
PER_LAYER = [
    *("M", "height", "width", "out_h", "out_w", "class_h", "class_w", "start_h", "start_w"),
    *("group0", "row0", "blocks", "run_blocks", "low", "count", "first_tap", "tap_down"),
    *("tap_across", "steps", "turns", "parts", "parts_magic", "taps", "taps_w", "taps_w_magic"),
    *("step_h", "step_w", "reach_h", "reach_w"),
    *("tiles_n", "tiles_k", "tiles", "span"),
]
MOST_PIXELS = 1 << 30  # of one launch, so that their numbers stay int32
MOST_STEPS = 1 << 24  # of a loop; see also ``divide``
LEAST_CHANNELS = 8  # of a group whose images are brought into lines of channels
MOST_BITS = 32  # taps that one word of a row's validity holds


@triton.jit
def pixel(m, height, width):
    """(b, i, j) of pixel number m of a grid [B, height, width]."""
    line = m // width
    b = line // height
    return b, line - b * height, m - line * width


@triton.jit
def inside(at, size):
    """Whether a coordinate lies in [0, size)."""
    return (at >= 0) & (at < size)


@triton.jit
def tap_bits(
    top, left, reach_h, reach_w, height, width, taps_w, BITS_H: tl.constexpr, BITS_W: tl.constexpr
):
    """One uint32 per row: bit th * taps_w + tw says that the tap lies inside the image.

    Of at most BITS_H x BITS_W taps. Unrolled, so that the bits can be made in the layout of the
    loads that they mask.
    """
    across = tl.zeros_like(left).to(tl.uint32)
    for tw in tl.static_range(BITS_W):
        across |= inside(left + tw * reach_w, width).to(tl.uint32) << tw
    across &= (tl.full([], 1, tl.uint32) << tl.cast(taps_w, tl.uint32)) - 1
    bits = tl.zeros_like(across)
    for th in tl.static_range(BITS_H):
        line = tl.where(inside(top + th * reach_h, height), across, tl.zeros_like(across))
        bits |= line << tl.cast(th * taps_w, tl.uint32)
    return bits


@triton.jit
def divide(n, magic):
    """n // the number of a ``divider``, for int32 n from 0 whose product with it is below 2^31.

    Two instructions; law.divider's is right for more numbers, and takes four.
    """
    return tl.umulhi(tl.cast(2 * n, tl.uint32), tl.cast(magic, tl.uint32)).to(tl.int32)


@triton.jit
def walk(step, parts, parts_magic, taps_w, taps_w_magic):
    """(tap, part, th, tw) of a step, ``parts`` of them per tap.

    In closed form: divisions by multiplication cost less than counters that the loop would carry.
    """
    tap = divide(step, parts_magic)
    th = divide(tap, taps_w_magic)
    return tap, step - tap * parts, th, tap - th * taps_w


@triton.jit
def wide(number, reach):
    """number * reach, int64."""
    return tl.full([], 1, tl.int64) * number * reach


@triton.jit
def distance(th, tw, part, down, across, along):
    """The address of numbers from 0 with these int64 strides, int64.

    As unsigned ones they take two instructions each; with signs they would take four.
    """
    th, tw = th.to(tl.uint32).to(tl.int64), tw.to(tl.uint32).to(tl.int64)
    return th * down + tw * across + part.to(tl.uint32).to(tl.int64) * along


@triton.jit
def rows_of(number, N, per_group, offset, BLOCK_N: tl.constexpr):
    """(group, rows [BLOCK_N], its first row, one past its last) of tile ``number`` of a launch.

    Groups are counted from that of the launch's first row, whose row number ``offset`` it is.
    """
    tiles = tl.cdiv(per_group, BLOCK_N)
    group = number // tiles
    begin = group * per_group - offset
    n = begin + (number - group * tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    return group, n, tl.maximum(begin, 0), tl.minimum(begin + per_group, N)


@dataclass(frozen=True)
class Reads:
    """Taps, steps, starts and reaches, each (vertical, horizontal); see the module.

    Args:
        first_tap, taps_apart: the weight's tap number at (0, 0), and what th and tw add to it.
        bits: BITS_H and BITS_W, see ``bits_of``.
    """

    taps: tuple[int, int]
    step: tuple[int, int]
    start: tuple[int, int]
    reach: tuple[int, int]
    first_tap: int
    taps_apart: tuple[int, int]
    bits: tuple[int, int]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Step, start and reach, as the kernels take them."""
        return (*self.step, *self.start, *self.reach)


def divider(number: int) -> tuple[int, int]:
    """A number that kernels divide by, and its magic (see ``divide``) as an int32.

    Example:
        >>> numbers = (0, 1, 6, 7, 8, 31, 2**31 // 7 - 1)
        >>> for number in (1, 2, 3, 7):
        ...     _, magic = divider(number)
        ...     assert all(2 * n * (magic % 2**32) >> 32 == n // number for n in numbers)
    """
    return number, -(-(1 << 31) // number) if number > 1 else -(1 << 31)


def bits_of(taps: Sequence[int]) -> tuple[int, int]:
    """BITS_H and BITS_W of kernels that walk up to so many taps: (0, 0) where one word is too
    little. At least 3 x 3 but for a single tap, so that few kernels are compiled.

    Example:
        >>> bits_of((1, 1)), bits_of((2, 1)), bits_of((5, 5)), bits_of((1, 25)), bits_of((7, 7))
        ((1, 1), (3, 3), (5, 5), (1, 25), (0, 0))
    """
    if math.prod(taps) > MOST_BITS:
        return 0, 0
    most = max(3, taps[0]), max(3, taps[1])
    return most if math.prod(taps) > 1 and math.prod(most) <= MOST_BITS else (taps[0], taps[1])


def forward_reads(
    p: Placement, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Reads:
    """Output pixels read input pixels."""
    kernel_h, kernel_w = p.selected_shape[2:]
    pair_of = (stride[0], stride[1]), (-padding[0], -padding[1]), (dilation[0], dilation[1])
    taps = (kernel_h, kernel_w)
    return Reads(taps, *pair_of, 0, (kernel_w, 1), bits_of(taps))


@dataclass(frozen=True)
class ResidueClass:
    """The input pixels (first + stride * (i, j)) for i < height, j < width, and what they read."""

    first: tuple[int, int]
    height: int
    width: int
    reads: Reads


def _progression(residue: int, kernel: int, stride: int, padding: int, dilation: int) -> range:
    """The taps that reach input coordinates of a residue modulo the stride."""
    apart = stride // math.gcd(stride, dilation)
    for tap in range(min(apart, kernel)):
        if (residue + padding - tap * dilation) % stride == 0:
            return range(tap, kernel, apart)
    return range(0)


def residue_classes(
    p: Placement,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[ResidueClass, ...]:
    """Input pixels by their residues modulo the stride: each reads its own taps, with stride 1.

    Classes without pixels or without taps are left out. Kept for the next call.

    Args:
        p: the weight.
        size: (H, W) of the input.
        stride, padding, dilation: of the forward.
    """
    geometry = (tuple(v) for v in (size, stride, padding, dilation))
    return _residue_classes(p.selected_shape[2:], *geometry)


@lru_cache(maxsize=4096)
def _residue_classes(
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[ResidueClass, ...]:
    classes = []
    # Of the class that has most taps, so that one kernel is compiled for all.
    apart = (s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True))
    bits = bits_of([-(-size // step) for size, step in zip(kernel, apart, strict=True)])
    for rh in range(min(stride[0], size[0])):
        for rw in range(min(stride[1], size[1])):
            residue = (rh, rw)
            taps = [
                _progression(residue[d], kernel[d], stride[d], padding[d], dilation[d])
                for d in (0, 1)
            ]
            if not taps[0] or not taps[1]:
                continue
            start = [
                (residue[d] + padding[d] - taps[d].start * dilation[d]) // stride[d] for d in (0, 1)
            ]
            reach = [-taps[d].step * dilation[d] // stride[d] for d in (0, 1)]
            reads = Reads(
                taps=(len(taps[0]), len(taps[1])),
                step=(1, 1),
                start=(start[0], start[1]),
                reach=(reach[0], reach[1]),
                first_tap=taps[0].start * kernel[1] + taps[1].start,
                taps_apart=(taps[0].step * kernel[1], taps[1].step),
                bits=bits,
            )
            height, width = (
                (s - r - 1) // t + 1 for s, r, t in zip(size, residue, stride, strict=True)
            )
            classes.append(ResidueClass(residue, height, width, reads))
    return tuple(classes)


def images(batch: int, pixels: int) -> Iterator[tuple[int, int]]:
    """(first, count) of images whose pixels one launch can number, ``pixels`` in each image."""
    yield from split(batch, max(1, MOST_PIXELS // pixels))


def too_large(p: Placement, *images: Tensor) -> bool:
    """Whether a single image has more pixels, or the weight more steps, than launches number."""
    rows, columns, _, taps_w = p.selected_shape
    taps = p.matrix.taps
    # Of the smallest tiles, with a block more at either end of a run.
    parts = max(rows, columns if p.matrix.by_tap else columns * taps) // 16 + 2 * p.matrix.block
    too_many = taps * parts >= MOST_STEPS or taps * parts * max(parts, taps_w) >= 1 << 31
    return too_many or any(t.shape[2] * t.shape[3] > MOST_PIXELS for t in images)


def choose_tiles(
    op: str, m: int, p: Placement, groups: int, image: Tensor, crowded: bool = False
) -> Config:
    """config.choose for m pixels; steps that divide a padded run where 32 columns do.

    Args:
        op, m, p, groups: the product.
        image: that its rows read, as ``lines`` made it.
        crowded: see config.choose; so are images that are not read in vectors.
    """
    matrix, cols = p.matrix, p.block_columns
    times = groups * matrix.runs if op == "conv2d_bank_grad" else groups
    rows = p.selected_shape[0] // groups
    on = gpu(image.device)
    # What Triton finds to be whole vectors: it looks for multiples of 16 elements.
    sizes = (rows, cols.length, cols.first, *(image.stride(d) for d in (0, 2, 3)))
    vectors = image.stride(1) == 1 and all(size % 16 == 0 for size in sizes)
    vectors = vectors and matrix.by_tap and image.data_ptr() % 16 == 0
    crowded = crowded or not vectors
    c = choose(op, m, rows, cols.length, matrix.block, image.dtype, on, times, crowded)
    block_k = c.block_k
    while block_k > 32 and cols.count * matrix.block % block_k:
        block_k //= 2
    whole = cols.count * matrix.block % block_k == 0
    return replace(c, block_k=block_k) if whole else c


def lines(image: Tensor, channels: int) -> Tensor:
    """The image with its channels innermost, which tiles read in vectors of 16 bytes: a copy in
    channels-last where it is another.

    Args:
        image: ``[B, C, H, W]``, of any strides.
        channels: of one group; of fewer than 8 no vectors are read, and the image is left as it is.
    """
    if channels < LEAST_CHANNELS or image.stride(1) == 1:
        return image
    return image.contiguous(memory_format=torch.channels_last)


def lines_for(result: Tensor, channels: int) -> Tensor:
    """Where kernels write a result, as ``lines``: another tensor where the caller is to copy it."""
    if channels < LEAST_CHANNELS or result.stride(1) == 1:
        return result
    return torch.empty_like(result, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Groups:
    """The rows of a launch in groups.

    Args:
        per_group: rows of a group; all of the launch's where there is one group.
        first: group of the launch's first row.
        offset: of the launch's first row in its group.
        count: groups that the launch touches.
    """

    per_group: int
    first: int
    offset: int
    count: int


def groups_of(p: Placement, groups: int, row: int, rows: int) -> Groups:
    """Of ``rows`` rows from the selection's ``row``."""
    if groups == 1:
        return Groups(rows, 0, 0, 1)
    per_group = p.selected_shape[0] // groups
    first, offset = divmod(row, per_group)
    return Groups(per_group, first, offset, (row + rows - 1) // per_group - first + 1)


@lru_cache(maxsize=4096)
def as_matrix(placement: str) -> str:
    """The placement of a 1x1 kernel as that of a matrix: the same blocks, the same law."""
    p = parse(placement)
    return replace(p, shape=p.shape[:2]).to_json()


def is_pointwise(
    image: Tensor, p: Placement, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether a convolution is a product of matrices, whose rows are the image's pixels."""
    return (
        groups == 1
        and dot_precision(image.dtype) == dot_precision(image.dtype, convolution=True)
        and p.matrix.taps == 1
        and tuple(stride) == (1, 1)
        and tuple(padding) == (0, 0)
    )


def from_lines(pixels: Tensor, like: Tensor) -> Tensor:
    """``[B, H, W, C]`` as an image ``[B, C, H, W]`` in the memory format of an image's results."""
    image = pixels.permute(0, 3, 1, 2)
    result = empty_image(like, image.shape)
    return image if image.stride() == result.stride() else result.copy_(image)
