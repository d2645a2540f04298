"""What "right" means: a weight of any law (docs/law.md) in plain loops, for readers and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor, einsum
from torch.nn import functional, grad

from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.law.selection import indices_of


def weights(p: Placement, table: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """(slot, element of the slot, sign) of each selected weight [n, c, tap]: all that G is."""
    m, (rows, columns) = p.matrix, (indices_of(p.selected(dim)) for dim in (0, 1))
    if table is None:
        blocks = torch.arange(m.rows)[:, None], torch.arange(m.blocks)
        slot, negative = p.law.slot(*blocks).tolist(), p.law.negative(*blocks).tolist()
    else:  # one entry for each weight: blocks are single elements
        entries = table[p.start : p.start + m.numel].view(m.rows, m.blocks, 1)
        slot, negative = (entries[..., 0] & 0x7FFFFFFF).tolist(), (entries < 0).tolist()
    tap_width = m.run_blocks * m.block if m.by_tap else m.channels  # its elements in a row
    for n, c, tap in product(rows, columns, range(m.taps)):
        b, e = divmod(tap * tap_width + c, m.block)
        yield slot[n][b], e, -1 if negative[n][b][e] else 1


def unpack(bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """Each virtual weight is an element of the bank, times its sign and the layer's scale."""
    p, ring = parse(placement), bank.reshape(-1, parse(placement).matrix.block)
    read = [p.scale * sign * ring[slot, e] for slot, e, sign in weights(p, table)]
    return torch.stack(read).view(p.selected_shape)


def pack(dense: Tensor, table: Tensor | None, placement: str, *_: torch.dtype) -> Tensor:
    """The adjoint: each element of the bank adds up the gradients of the weights that read it."""
    p, total = parse(placement), dense.new_zeros(parse(placement).generator.dof)
    for value, (slot, e, sign) in zip(dense.flatten(), weights(p, table), strict=True):
        total[slot * p.matrix.block + e] += p.scale * sign * value
    return total.view(p.generator.slots, p.generator.granularity)


# Float64, the reference's arguments: w is the bank, t the table, p the placement, s stride ...
OPERATORS: dict[str, Callable[..., Tensor]] = {"unpack": unpack, "pack": pack}
OPERATORS |= {
    "linear": lambda x, w, t, bias, p: functional.linear(x, unpack(w, t, p), bias),
    "linear_input_grad": lambda dy, w, t, p: dy @ unpack(w, t, p),
    "linear_bank_grad": lambda dy, x, t, p, _: pack(einsum("...n,...k->nk", dy, x), t, p),
    "conv2d": lambda x, w, t, bias, p, *s: functional.conv2d(x, unpack(w, t, p), bias, *s),
    "conv2d_input_grad": lambda dy, w, t, n, p, *s: grad.conv2d_input(n, unpack(w, t, p), dy, *s),
    "conv2d_bank_grad": lambda dy, x, t, p, *s: pack(
        grad.conv2d_weight(x, parse(p).selected_shape, dy, *s[:-1]), t, p
    ),
    "embedding": lambda w, t, rows, p: unpack(w, t, p)[rows],
    "embedding_bank_grad": lambda dy, rows, t, p, _: pack(
        dy.new_zeros(parse(p).selected_shape).index_put((rows,), dy, accumulate=True), t, p
    ),
}
