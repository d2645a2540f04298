"""The benchmark's cases are those of the models they are named after."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.harness import cases, suites
from benchmarks.harness.problem import Problem, copies
from rpg_kernels import models

META = torch.device("meta")


@pytest.mark.parametrize("depth", [18, 34])
def test_every_block_convolution_of_the_resnets_is_a_case(depth: int) -> None:
    known = {
        (layer.weight, layer.image, layer.stride)
        for layer in cases.LAYERS
        if layer.op == "conv2d" and any(n.startswith(f"resnet{depth}.") for n in layer.names)
    }
    seen = set()

    def record(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        seen.add((tuple(module.weight.shape), inputs[0].shape[2], module.stride[0]))

    with META:
        model = getattr(models, f"resnet{depth}")()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and name != "conv1":
                module.register_forward_hook(record)
        model(torch.empty(1, 3, 224, 224))
    assert seen == known


@pytest.mark.parametrize("case", suites.suite("full", "bf16")[:40:3], ids=lambda c: c.name)
def test_shapes_bytes_and_operations(case: cases.Case) -> None:
    x = torch.empty(case.input_shape, device="meta")
    weight = torch.empty(case.layer.weight, device="meta")
    if case.op == "linear":
        y = nn.functional.linear(x, weight)
        operations = 2 * case.batch * weight.numel()
    else:
        y = nn.functional.conv2d(x, weight, None, case.layer.stride, case.layer.padding)
        operations = 2 * case.batch * y.shape[2] * y.shape[3] * weight.numel()
    assert tuple(y.shape) == case.output_shape
    assert case.operations == operations
    assert case.input_bytes == 2 * x.numel()
    assert case.output_bytes == 2 * y.numel()
    assert case.weight_bytes == 2 * weight.numel()


def test_the_embedding() -> None:
    (case,) = cases.select(["llama-3-8b.embed_tokens/16"], dtype="amp")
    assert (case.output_shape, case.operations) == ((16, 4096), 0)
    assert (case.input_bytes, case.output_bytes) == (16 * 8, 16 * 4096 * 4)


def test_the_full_suite_has_everything_that_was_promised() -> None:
    chosen = suites.suite("full", "fp32")
    assert len(set(chosen)) == len(chosen)
    names = {name for case in chosen for name in case.layer.names}
    for model in ("resnet18", "resnet34", "vit-b", "bert-base", "llama-3-8b"):
        assert any(name.startswith(f"{model}.") for name in names)
    assert {c.batch for c in chosen if c.op == "conv2d"} == {1, 32, 256}
    assert {c.batch for c in chosen if c.op == "linear"} == {1, 16, 64, 256, 4096}
    assert {c.dof for c in chosen} == {45_000, 2_000_000, 20_000_000}
    assert {c.granularity for c in chosen} == {1, 16, 64}
    assert {c.reflect for c in chosen} == {"element", "vector", "none"}
    assert (128256, 4096) in {c.layer.weight for c in chosen if c.op == "embedding"}


def test_the_quick_suite_represents_it() -> None:
    quick = suites.suite("quick", "fp32")
    for field in ("op", "dof", "granularity", "reflect"):
        full = {getattr(case, field) for case in suites.suite("full", "fp32")}
        assert {getattr(case, field) for case in quick} == full
    assert len(quick) <= 10


def test_select_by_alias_pattern_beginning_and_batch() -> None:
    def names(*arguments: object, **options: object) -> list[str]:
        return [case.name for case in cases.select(*arguments, **options)]  # type: ignore[arg-type]

    assert names(["bert-base.output/16"]) == ["vit-b.fc2/16"]
    assert names(["*.layer4.down*/32"]) == ["resnet18.layer4.downsample/32"]
    assert len(names(["vit-b"])) == 4 * 5
    assert names(["vit-b.fc1"], batches=[7]) == ["vit-b.fc1/7"]
    assert {case.op for case in cases.select([], ops=["embedding"])} == {"embedding"}
    crossed = cases.select(["vit-b.fc1/1"], dofs=[100, 200], granularities=[1, 16])
    assert [(c.dof, c.granularity) for c in crossed] == [(100, 1), (100, 16), (200, 1), (200, 16)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["vit-b.fc9"],), r"case: got 'vit-b.fc9', wanted one of\n  conv2d    resnet18.layer1"),
        ((["vit-b.fc1/17"],), "case: got 'vit-b.fc1/17'"),
        ((["vit-b.fc1"], ["conv2d"]), "case: got 'vit-b.fc1 with op conv2d'"),
        (([], ["conv3d"]), "op: got 'conv3d', wanted one of 'linear', 'conv2d', 'embedding'"),
        ((["vit-b.fc1"], [], [0]), "batch: got 0"),
        ((["vit-b.fc1"], [], [], [], [48]), "granularity: got 48"),
        ((["vit-b.fc1"], [], [], [], [], ["both"]), "reflect: got 'both'"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: tuple[list[str], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases.select(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype: got 'int8'"):
        suites.suite("full", "int8")


def test_copies_pass_the_cache_twice_over() -> None:
    cache = 32 << 20
    for case in suites.suite("full", "fp32"):
        n = copies(case, case.weight_bytes, cache)
        between = n * case.weight_bytes + case.input_bytes + case.output_bytes
        assert between >= 2 * cache or n == 256
        if n > 1:
            assert between - case.weight_bytes < 2 * cache


def test_the_same_seed_gives_the_same_problem_and_leaves_torchs_generator_alone() -> None:
    (case,) = cases.select(["vit-b.proj/1"], dofs=[1000])
    torch.manual_seed(3)
    one = Problem(case, torch.device("cpu"), seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    same, other = (Problem(case, torch.device("cpu"), seed=seed) for seed in (1, 2))
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.bank.weight, same.bank.weight)
    assert not torch.equal(one.x, other.x)
