"""Paint capsules, lines with round ends and a radius at each, with smooth edges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Capsules:
    """Shapes of each of some images, float32; the last is painted over the others.

    Args:
        first, second: ends, ``[images, shapes, 2]``: x and y in pixels.
        first_radius, second_radius: ``[images, shapes]``, pixels.
        colour: ``[images, shapes, 3]``, 0 to 1.
        opacity: ``[images, shapes]``, 0 to 1.
        striped: ``[images, shapes]``, how much of a pattern the colour takes, 0 to 1.
        edge: ``[images, shapes]``, pixels over which the edge fades; 1 is sharp.
    """

    first: Tensor
    second: Tensor
    first_radius: Tensor
    second_radius: Tensor
    colour: Tensor
    opacity: Tensor
    striped: Tensor
    edge: Tensor

    def ordered(self, order: Tensor) -> Capsules:
        """The same shapes in another order of each image: ``int64 [images, shapes]``."""
        images = torch.arange(len(order))[:, None]
        return Capsules(*(values[images, order] for values in _fields(self)))


def paint(pixels: Tensor, shapes: Capsules, pattern: Tensor) -> None:
    """Paint shapes over images, in place.

    Args:
        pixels: ``float32 [images, 3, height, width]``, 0 to 1.
        shapes: of as many images.
        pattern: ``float32 [images, height, width]``, what striped colours are multiplied with.

    Example:
        >>> pixels = torch.zeros(1, 3, 4, 8)
        >>> one, at = torch.ones(1, 1), torch.tensor([[[2.0, 2.0]]])
        >>> shape = Capsules(at, at + 3, one, one, torch.ones(1, 1, 3), one, 0 * one, one)
        >>> paint(pixels, shape, torch.ones(1, 4, 8))
        >>> float(pixels[0, 0, 2, 2]), float(pixels[0, 0, 0, 7])
        (1.0, 0.0)
    """
    height, width = pixels.shape[-2:]
    x = torch.arange(width) + 0.5
    y = torch.arange(height)[:, None] + 0.5
    for i in range(shapes.first.shape[1]):
        a, b = shapes.first[:, i, :, None, None], shapes.second[:, i, :, None, None]
        along_x, along_y = (b - a).unbind(1)
        length = (along_x * along_x + along_y * along_y).clamp_min(1e-6)
        from_x, from_y = x - a[:, 0], y - a[:, 1]
        # How far along the line the nearest of its points is, 0 to 1.
        share = (from_x * (along_x / length) + from_y * (along_y / length)).clamp_(0, 1)
        off_x = torch.addcmul(from_x, share, along_x, value=-1)
        off_y = torch.addcmul(from_y, share, along_y, value=-1)
        distance = off_x.mul_(off_x).addcmul_(off_y, off_y).sqrt_()
        first, second, edge, opacity, striped = (
            values[:, i, None, None]
            for values in (
                shapes.first_radius,
                shapes.second_radius,
                shapes.edge,
                shapes.opacity,
                shapes.striped,
            )
        )
        inside = share.mul_(second - first).add_(first).sub_(distance)
        cover = inside.div_(edge).add_(0.5).clamp_(0, 1).mul_(opacity)
        colour = shapes.colour[:, i, :, None, None]
        if striped.any():
            colour = colour * (1 + striped * (pattern - 1))[:, None]
        pixels.lerp_(colour, cover[:, None])


def _fields(shapes: Capsules) -> tuple[Tensor, ...]:
    return tuple(vars(shapes).values())
