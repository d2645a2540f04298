"""y = x·Ŵᵀ + bias by the CUDA kernels for small batches, on a GPU or on CPU tensors.

Signatures are those of the reference. Sums are fp32, in a fixed order, results rounded once: the
same bits every time.
"""

from __future__ import annotations

from torch import Tensor

from rpg_kernels.cuda import config, launch
from rpg_kernels.placement import parse


def linear(
    x: Tensor, bank: Tensor, table: Tensor | None, bias: Tensor | None, placement: str
) -> Tensor:
    """x ``[..., K]`` -> ``[..., N]`` in x's dtype.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    rows = p.shape[0]
    y = x.new_empty((*x.shape[:-1], rows))
    batch = y.numel() // rows
    plan = config.check("linear", placement, x.device, x.dtype, batch, bank)
    if plan is not None:
        ring = launch.ring(bank, x.dtype)
        bias = None if bias is None else bias.float().contiguous()
        launch.run("linear", p, plan, batch, x.dtype, (ring, x.contiguous(), bias, y))
    return y
