"""rpg.nn.Embedding."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rpg_kernels import _checks, functional
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law.geometry import MAX_ROWS
from rpg_kernels.nn._layer import VirtualLayer
from rpg_kernels.nn.part import as_leaf, is_traced


class Embedding(VirtualLayer, nn.Embedding):
    """Rows of Ŵ: torch.nn.Embedding with a virtual weight ``[num_embeddings, embedding_dim]``.

    Args:
        num_embeddings, embedding_dim: rows and columns.
        padding_idx: a row that reads as zeros and gets no gradient.
        device, dtype: of a private bank.
        bank: shared parameter bank; None makes a private one with room for every weight.
        scale: the layer's multiplier, or ``"match"``: standard deviation 1, as torch.nn.Embedding.
        virtual_weight: use this one (tied weights) instead of placing a new one.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range.

    Example:
        >>> import torch, rpg_kernels as rpg
        >>> layer = rpg.nn.Embedding(100, 64, bank=rpg.ParameterBank(dof=1024))
        >>> layer(torch.tensor([3, 99])).shape
        torch.Size([2, 64])
    """

    rpg_operator = "embedding"
    dense_type = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: ParameterBank | None = None,
        scale: float | str = "match",
        virtual_weight: VirtualWeight | None = None,
    ) -> None:
        nn.Module.__init__(self)
        _checks.integer("num_embeddings", num_embeddings, 1, MAX_ROWS)
        _checks.integer("embedding_dim", embedding_dim, 1, MAX_ROWS)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        if padding_idx is not None:
            low, high = -num_embeddings, num_embeddings - 1
            padding_idx = _checks.integer("padding_idx", padding_idx, low, high) % num_embeddings
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        shape = (num_embeddings, embedding_dim)
        self._place(shape, bank, virtual_weight, scale, device, dtype, lookup=True)
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """int32 or int64 of any shape -> ``[*input.shape, embedding_dim]``."""
        if self._buffers["weight"] is not None:
            self._refuse_buffer()
        if is_traced(input):
            return cast(Tensor, as_leaf(self, input))
        return functional.embedding(input, self.virtual_weight, self.padding_idx)

    def extra_repr(self) -> str:
        """Sizes, padding row, number of the layer and scale."""
        p = self.virtual_weight.placement
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, layer={p.layer}, "
            f"scale={self.virtual_weight.scale:.4g}"
        )
