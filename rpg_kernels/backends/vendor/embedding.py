"""Row lookup has no product that a vendor's library could do: Triton's kernels."""

from rpg_kernels.backends.triton.embedding import embedding, embedding_bank_grad

__all__ = ["embedding", "embedding_bank_grad"]
