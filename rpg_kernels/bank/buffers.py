"""Questions about the buffers of a bank."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from rpg_kernels._tensors import memory


def same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors begin at the same element of the same storage, also on meta."""
    try:
        one, other = first.untyped_storage(), second.untyped_storage()
    except (NotImplementedError, RuntimeError):  # wrappers, which have none
        return first is second
    return one._cdata == other._cdata and first.storage_offset() == second.storage_offset()


def sha256_of(table: Tensor) -> str:
    host = table.detach().cpu().contiguous()
    return hashlib.sha256(memory(host)).hexdigest()


def unreadable(digits: Tensor) -> bool:
    """No memory to look at: meta, a fake, or one of torch.func's wrappers."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(digits)
    return digits.is_meta or wrapped or type(digits) not in (Tensor, nn.Parameter)


def version(digits: Tensor | None) -> int | None:
    """How often a buffer was written in place; None where torch does not count."""
    return None if digits is None or digits.is_inference() else digits._version


def equal(digits: Tensor, mine: Tensor) -> bool:
    return digits.shape == mine.shape and torch.equal(digits.cpu().to(mine.dtype), mine)
