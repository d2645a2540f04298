"""The decoder: the same logits with and without a cache, dense and with one bank behind it all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rpg_kernels as rpg
from rpg_kernels.models import Cache, Decoder, DecoderConfig

# Sizes that are no multiple of a block, nor rows of an octet.
SMALL = DecoderConfig(vocabulary=300, width=96, layers=3, heads=6, kv_heads=2, hidden=200)
BANK = rpg.RPGConfig(dof=20_000, laps=2)


def tokens(count: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(SMALL.vocabulary, (batch, count), generator=generator)


def shared(bank: rpg.RPGConfig = BANK) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SMALL)
    return rpg.convert(model, bank, lambda module, name: isinstance(module, nn.Linear)).eval()


def by_steps(model: Decoder, given: torch.Tensor, steps: list[int]) -> torch.Tensor:
    """Logits of tokens that come a few at a time."""
    cache = Cache(model.config, len(given), given.shape[1], model.norm.weight)
    with torch.no_grad():
        return torch.cat([model(part, cache) for part in given.split(steps, 1)], 1)


@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 1, 1, 1, 1], [3, 4, 2]])
@pytest.mark.parametrize(
    "bank", [BANK, rpg.RPGConfig(dof=10_000), rpg.RPGConfig(dof=9_000, granularity=16)]
)
def test_converted_is_its_dense_twin_with_and_without_the_cache(
    bank: rpg.RPGConfig, steps: list[int]
) -> None:
    ours = shared(bank)
    dense = rpg.materialize(ours)
    assert isinstance(dense, Decoder)
    assert not any(type(m) is nn.Linear for m in ours.modules())
    given = tokens(9)
    with torch.no_grad():
        wanted = dense(given)
        got = ours(given)
    assert wanted.shape == (2, 9, SMALL.vocabulary)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_steps(dense, given, steps), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_steps(ours, given, steps), wanted, rtol=1e-4, atol=1e-5)


def test_later_tokens_do_not_change_earlier_logits_and_earlier_ones_do() -> None:
    model, given = shared(), tokens(7)
    changed = given.clone()
    changed[:, 4] = (changed[:, 4] + 1) % SMALL.vocabulary
    with torch.no_grad():
        before, after = model(given), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax((0, 2)).min() > 1e-4


def test_rotary_positions_are_relative() -> None:
    """A single layer's attention of a shifted sequence is that of the sequence itself."""
    torch.manual_seed(1)
    model = Decoder(DecoderConfig(50, 32, 1, 4, 4, 48)).eval()
    x = torch.randn(1, 5, 32)
    attention = model.layers[0].attention
    with torch.no_grad():
        one, other = (attention(x, model._turn(first, 5, x), 0, None) for first in (0, 1000))
        unturned = attention(x, (torch.ones(5, 8), torch.zeros(5, 8)), 0, None)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(one, unturned, atol=1e-3)


def test_generate_takes_the_likeliest_token_each_time() -> None:
    model, given = shared(), tokens(4)
    got = model.generate(given, 5)
    assert got.shape == (2, 5)
    for i in range(5):
        with torch.no_grad():
            logits = model(torch.cat((given, got[:, :i]), 1))
        assert torch.equal(logits[:, -1].argmax(-1), got[:, i])


def test_every_linear_layer_is_shared_and_sizes_are_those_of_the_config() -> None:
    with torch.device("meta"):
        model = Decoder()
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        rpg.convert(model, BANK, lambda module, name: isinstance(module, nn.Linear))
    assert rpg.summary(model).virtual_weights == weights
    assert 100e6 < weights < 200e6


def test_a_full_cache_and_bad_sizes_are_refused() -> None:
    model, given = shared(), tokens(4)
    cache = Cache(SMALL, 2, 3, model.norm.weight)
    with pytest.raises(ValueError, match="tokens: got position 4, wanted at most 3 in this cache"):
        model(given, cache)
    with pytest.raises(ValueError, match="count: got 0"):
        model.generate(given, 0)
    for sizes, message in (
        ({"width": 100}, "width: got 100, wanted a multiple of 32"),
        ({"kv_heads": 3}, "kv_heads: got 3, wanted a divisor of 16"),
        ({"layers": 0}, "layers: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DecoderConfig(**sizes)
