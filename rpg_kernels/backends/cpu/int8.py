"""Linear layers of the unit law whose bank is int8 and whose x is rounded to int8, row by row.

They are ``units`` with products of int8 by slot: sums of products are whole numbers, the same on
every processor, and what rows add up is fp32. Gradients and convolutions leave x as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.cpu.selection import is_part
from rpg_kernels.backends.cpu.units import Units
from rpg_kernels.law.placement import parse

# To multiply int8, by the numbers of Int8Products in csrc/cpu/int8_linear.h.
WAYS = ("what every processor has", "AVX512-VNNI", "AMX")


class Int8Units(Units):
    """Rows that read one slot share its product with x, in int8.

    Args:
        way: to multiply, a number of ``WAYS``; None is the fastest that the processor has.
    """

    name = "unit_linear_int8"

    def __init__(self, way: int | None = None) -> None:
        self._way = way

    def unsupported(self, op: str, placement: str) -> str:
        """Why a product with a weight cannot be made of int8, or "".

        Example:
            >>> INT8.unsupported("linear_input_grad", "")
            'rows of x are rounded to int8 by linear alone'
        """
        if op != "linear":
            return "rows of x are rounded to int8 by linear alone"
        if is_part(parse(placement)):
            return "int8 products are of whole weights"
        return super().unsupported(op, placement)

    def pairs(
        self, op: str, dtype: torch.dtype, bank_dtype: torch.dtype, batch: int, placement: str
    ) -> bool:
        """Never."""
        return False

    def faster(
        self,
        op: str,
        dtype: torch.dtype,
        batch: int,
        placement: str,
        bank_dtype: torch.dtype | None = None,
    ) -> bool:
        """Always: the reference rounds x, and makes every weight float."""
        return True

    def products(self, pairs: bool) -> int:
        """The way to multiply."""
        return native.int8_products() if self._way is None else self._way

    def what(self, placement: str) -> str:
        """How many rows share a product, and of what it is."""
        of = f"int8 products ({WAYS[self.products(False)]}), rows of x rounded to int8"
        return f"{of}; {super().what(placement)}"


INT8 = Int8Units()


def asked(bank: Tensor | None) -> bool:
    """Whether linear layers of a bank shall round rows of x to int8: where the bank is int8, and
    was quantised with ``activations="int8"``."""
    return isinstance(bank, StoredValues) and bank.rounds_rows
