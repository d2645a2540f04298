"""PEFT: adapters around virtual layers, and adapters that are virtual themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import other_torchvision
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import rpg_kernels as rpg

assert other_torchvision
IDS = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(0))


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes, **changes))


def loss_of(net: nn.Module) -> Tensor:
    loss: Tensor = net(input_ids=IDS, labels=IDS).loss
    return loss


def train(net: nn.Module, steps: int = 2) -> None:
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of(net).backward()
        optimiser.step()


def test_lora_around_virtual_layers() -> None:
    base = rpg.convert(llama(), rpg.RPGConfig(dof=2048))
    before, twin = base.rpg_bank.weight.detach().clone(), rpg.materialize(base)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4)
    torch.manual_seed(1)
    net = get_peft_model(base, copy.deepcopy(config))
    torch.manual_seed(1)
    dense = get_peft_model(twin, copy.deepcopy(config))
    for model in (net, dense):
        assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
        train(model)
    torch.testing.assert_close(loss_of(net), loss_of(dense), rtol=1e-4, atol=1e-4)
    assert torch.equal(base.rpg_bank.weight, before)
    with pytest.raises(RuntimeError, match=r"q_proj has no memory of its own.*materialize"):
        net.merge_and_unload()
    merged = get_peft_model(rpg.materialize(llama()), config).merge_and_unload()
    assert isinstance(merged.model.layers[0].self_attn.q_proj, nn.Linear)


def test_adapters_of_an_embedding_and_saved_modules(tmp_path: Path) -> None:
    base = rpg.convert(llama(), rpg.RPGConfig(dof=2048), filter_fn=lambda m, n: True)
    config = LoraConfig(
        target_modules=["embed_tokens", "v_proj"], modules_to_save=["gate_proj"], r=4
    )
    net = get_peft_model(base, config)
    before = base.rpg_bank.weight.detach().clone()
    gate = net.base_model.model.model.layers[0].mlp.gate_proj
    train(net)
    assert torch.equal(base.rpg_bank.weight, before), "the copies have banks of their own"
    copies = gate.modules_to_save["default"]
    assert not torch.equal(copies.rpg_bank.weight, before)
    net.save_pretrained(tmp_path)
    again = get_peft_model(
        rpg.convert(llama(), rpg.RPGConfig(dof=2048), filter_fn=lambda m, n: True), config
    )
    again.load_adapter(str(tmp_path), "default")
    again.base_model.model.rpg_bank.load_state_dict(base.rpg_bank.state_dict())
    torch.testing.assert_close(loss_of(again.eval()), loss_of(net.eval()))


def unilora() -> Any:
    net = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    # B begins as zeros, which a bank cannot give; the filter asks for it all the same.
    return rpg.convert(
        net, rpg.RPGConfig(dof=64, granularity=8), filter_fn=lambda m, n: "lora_" in n
    )


def test_adapters_that_share_one_small_bank_train_save_and_load(tmp_path: Path) -> None:
    net = unilora()
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["rpg_bank.weight"]
    first = loss_of(net).item()
    train(net, 5)
    assert loss_of(net).item() != first
    rpg.save(net, tmp_path / "whole")
    again = rpg.load(unilora(), tmp_path / "whole")
    assert torch.equal(loss_of(again.eval()), loss_of(net.eval()))
    adapters = rpg.summary(net)
    assert adapters.dof == 64
    assert adapters.virtual_weights == 2 * (4 * 32 + 32 * 4 + 4 * 32 + 16 * 4)
    other = unilora()
    bank = {k: v for k, v in net.state_dict().items() if "rpg_bank" in k}
    _, unexpected = other.load_state_dict(bank, strict=False)
    assert not unexpected
    assert torch.equal(other.rpg_bank.weight, net.rpg_bank.weight)
    wanted = loss_of(net.eval())
    merged = net.merge_and_unload()
    torch.testing.assert_close(loss_of(merged.eval()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_ties_and_new_tokens(tied: bool) -> None:
    net = rpg.convert(
        llama(tie_word_embeddings=tied), rpg.RPGConfig(dof=2048), filter_fn=lambda m, n: True
    )
    same = net.lm_head.weight is net.model.embed_tokens.weight
    assert same == tied
    net.tie_weights()
    assert (net.lm_head.weight is net.model.embed_tokens.weight) == tied
    table = net.model.embed_tokens.weight.unpack().detach()
    wanted = loss_of(net)
    with pytest.warns(
        UserWarning, match=r"embed_tokens was resized from \[99, 32\] to \[120, 32\]"
    ):
        net.resize_token_embeddings(120)
    assert type(net.model.embed_tokens) is nn.Embedding
    torch.testing.assert_close(net.model.embed_tokens.weight[:99], table)
    assert net(input_ids=IDS).logits.shape[-1] == 120
    logits = net(input_ids=IDS).logits[..., :99].flatten(0, 1)
    assert logits.isfinite().all()
    assert wanted.isfinite()


def test_models_that_ask_a_weight_for_its_dtype() -> None:
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                      decoder_start_token_id=0)  # fmt: skip
    net = rpg.convert(T5ForConditionalGeneration(config), rpg.RPGConfig(dof=2048))
    loss_of(net).backward()
    assert net.rpg_bank.weight.grad is not None
    net.encoder.half()
    assert net.encoder.dtype == torch.float16
