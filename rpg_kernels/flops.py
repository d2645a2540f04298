"""What a network multiplies, for ``torch.utils.flop_counter.FlopCounterMode``.

By itself the counter reports a layer that reads a bank as the dense layer that it stands for, so
that figures of a network can be compared before and after ``rpg_kernels.convert``. This module is
for the other question: how much is multiplied where rows share products.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rpg_kernels.backends import dispatch
from rpg_kernels.ops import _flops
from rpg_kernels.ops import _library as lib


def shared_products() -> dict[Any, Callable[..., int]]:
    """Formulas that count what is really multiplied, for ``FlopCounterMode(custom_mapping=...)``.

    Rows of a weight that read the same block of the bank in the same columns need the same product
    with x, and the compiled CPU kernels then make it once (docs/cpu.md). Each formula asks the back
    end that runs the call. A multiplication counts as two, as torch counts, and the additions that
    hand a product out to the rows are not counted, nor is padding. Where a back end does not say,
    which all but ``cpu`` do not, the figure is the dense one.

    Returns:
        A formula for each product operator of this package; the other operators stay at zero.

    Example:
        >>> import torch
        >>> import rpg_kernels as rpg
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> bank = rpg.ParameterBank(dof=65536, granularity=64, laps=4)
        >>> layer = rpg.nn.Linear(64, 4096, bank=bank)
        >>> with FlopCounterMode(display=False) as dense:
        ...     y = layer(torch.ones(8, 64))
        >>> dense.get_total_flops()
        4194304
        >>> shared = FlopCounterMode(display=False, custom_mapping=shared_products())
        >>> with shared:
        ...     y = layer(torch.ones(8, 64))
        >>> shared.get_total_flops() <= dense.get_total_flops()
        True
    """
    return {_flops.packet(name): _formula(name) for name in _flops.PRODUCTS}


def _formula(name: str) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None) -> int:
        if name == "linear_grads":  # as many as one after the other
            dy, bank, table, x, placement, dtype, backend = args
            of_input = _formula("linear_input_grad")(dy, bank, table, placement, backend)
            of_bank = _formula("linear_bank_grad")(dy, x, table, placement, dtype, backend)
            return of_input + of_bank
        if name == "conv2d_grads":
            dy, bank, table, x, placement, *geometry, dtype, backend = args
            how = (placement, *geometry)
            of_input = _formula("conv2d_input_grad")(dy, bank, table, x.shape, *how, backend)
            return of_input + _formula("conv2d_bank_grad")(dy, x, table, *how, dtype, backend)
        call = lib.call(name, args[:-1], args[-1])
        made = dispatch.choose(call).multiplications(call)
        if made is not None:
            return 2 * made
        packet = _flops.packet(name)
        dense: int = sys.modules[_flops.COUNTER].flop_registry[packet](*args, out_val=out_val)
        return dense

    count._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
    return count
