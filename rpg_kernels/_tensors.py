"""Small questions about tensors that several layers ask."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last only where x is that and not contiguous as well."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    plain = not channels_last or x.is_contiguous()
    return torch.contiguous_format if plain else torch.channels_last
