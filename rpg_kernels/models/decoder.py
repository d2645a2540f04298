"""A small language model as Llama has it: a decoder of attention with rotary positions and SwiGLU.

It is there to be measured and converted, with random weights; it loads no checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpg_kernels import _checks


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.

    Args:
        vocabulary: tokens.
        width: of the residual stream, a multiple of twice the heads.
        layers: of attention and SwiGLU.
        heads: of the queries.
        kv_heads: of keys and values; divides heads.
        hidden: width within SwiGLU.
        base: of the rotary positions' wavelengths.
        eps: of the norms.
    """

    vocabulary: int = 16_384
    width: int = 1024
    layers: int = 12
    heads: int = 16
    kv_heads: int = 16
    hidden: int = 2816
    base: float = 10_000.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "kv_heads", "hidden"):
            _checks.integer(name, getattr(self, name), 1, 2**31 - 1)
        if self.width % (2 * self.heads):
            raise _checks.fail("width", self.width, f"a multiple of {2 * self.heads}")
        if self.heads % self.kv_heads:
            raise _checks.fail("kv_heads", self.kv_heads, f"a divisor of {self.heads}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Cache:
    """Keys and values of the positions that a decoder has seen.

    Args:
        config: of the decoder.
        batch: sequences.
        positions: the most that will be seen.
        like: a tensor with the decoder's dtype and device.
    """

    def __init__(self, config: DecoderConfig, batch: int, positions: int, like: Tensor) -> None:
        shape = (config.layers, 2, batch, config.kv_heads, positions, config.head_width)
        self._kept = like.new_empty(shape)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values ``[B, kv_heads, T, head_width]`` of new positions of a layer.

        Returns:
            Those of all positions, ``[B, kv_heads, length + T, head_width]``.

        Raises:
            ValueError: there is no room for them.
        """
        end = self.length + keys.shape[2]
        kept = self._kept[layer]
        if end > kept.shape[3]:
            raise _checks.fail(
                "tokens", f"position {end}", f"at most {kept.shape[3]} in this cache"
            )
        kept[0, :, :, self.length : end] = keys
        kept[1, :, :, self.length : end] = values
        return kept[0, :, :, :end], kept[1, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention: ``[B, T, width] -> [B, T, width]``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.kv_heads * config.head_width
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, inner, bias=False)
        self.v_proj = nn.Linear(config.width, inner, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], layer: int, cache: Cache | None
    ) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, -1, self.config.head_width)
        q, k, v = (
            part(x).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotated(q, turn), _rotated(k, turn)
        mask = None
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            seen = cache.length
            if seen and tokens > 1:
                positions = torch.arange(seen + tokens, device=x.device)
                mask = positions <= positions[seen:, None]
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            is_causal=mask is None and tokens > 1,
            enable_gqa=self.config.heads != self.config.kv_heads,
        )
        projected: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x): ``[..., width] -> [..., width]``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and beside the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.width, config.eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, config.eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], layer: int, cache: Cache | None
    ) -> Tensor:
        x = x + self.attention(self.input_norm(x), turn, layer, cache)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Decoder(nn.Module):
    """Tokens to logits of the next token.

    Args:
        config: sizes.

    Shape:
        int64 ``[B, T] -> [B, T, vocabulary]``.

    Example:
        >>> decoder = Decoder(DecoderConfig(50, 32, 2, 4, 2, 48))
        >>> decoder(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 50])
    """

    def __init__(self, config: DecoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = DecoderConfig() if config is None else config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of every position of tokens, which follow those in the cache and are added to it.

        Raises:
            ValueError: the cache has no room.
        """
        first = 0 if cache is None else cache.length
        x = self.embed_tokens(tokens)
        turn = self._turn(first, tokens.shape[1], x)
        for layer, block in enumerate(self.layers):
            x = block(x, turn, layer, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

    def _turn(self, first: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[count, head_width]`` of the positions from ``first`` on."""
        width = self.config.head_width
        powers = torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width
        positions = torch.arange(first, first + count, device=like.device, dtype=torch.float32)
        angles = torch.outer(positions, self.config.base**-powers).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int) -> Tensor:
        """The ``count`` tokens that follow ``[B, T]``, each the likeliest, with a cache:
        ``[B, count]``.

        Raises:
            ValueError, TypeError: count is no positive int.
        """
        _checks.integer("count", count, 1, 2**31 - 1)
        batch, prompt = tokens.shape
        cache = Cache(self.config, batch, prompt + count, self.norm.weight)
        found = []
        for _ in range(count):
            tokens = self(tokens, cache)[:, -1:].argmax(-1)
            found.append(tokens)
        return torch.cat(found, 1)


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: pairs (i, i + half) of each head turned by the position's angles."""
    cosine, sine = turn
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat((-high, low), -1) * sine
