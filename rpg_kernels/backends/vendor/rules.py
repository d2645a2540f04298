"""What the vendor back end can run, and from which batch it is taken before the fused kernels."""

from __future__ import annotations

import torch

from rpg_kernels.backends.triton import rules as kernels

# Rows of the batch from which unpacking once is predicted to cost less than signing every element
# in every tile: docs/kernels.md has the arithmetic. Signs of whole vectors cost no register pass,
# so there the fused kernels are predicted to win at every size.
ELEMENT_SIGNS_FROM = 2048


def unsupported(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why an operator call cannot run here, or "".

    Args:
        op: operator name.
        device, dtype: of the call's first tensor.
    """
    return kernels.unsupported(op, device, dtype) or kernels.unsupported("unpack", device, dtype)


def preferred(op: str, batch: int, reflect: str) -> bool:
    """Whether a call is predicted to be faster here than in the fused kernels.

    Args:
        op: operator name.
        batch: rows of the product: tokens, or pixels of all images.
        reflect: of the generator; of a table "element".

    Example:
        >>> preferred("linear", 4096, "element"), preferred("linear", 4096, "vector")
        (True, False)
    """
    return reflect == "element" and op in _SIGNED and batch >= ELEMENT_SIGNS_FROM


# The bank gradient signs its result once, whatever the batch.
_SIGNED = ("linear", "linear_input_grad", "conv2d", "conv2d_input_grad")
