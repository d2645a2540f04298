"""ResNet-18 and ResNet-34: names, sizes and starting values, dense and shared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import rpg_kernels as rpg
from rpg_kernels.models import ResNet, kaiming_fan_out, resnet18, resnet34

VIRTUAL_WEIGHTS = {"resnet18": 11_157_504, "resnet34": 21_258_240}
MODELS = {"resnet18": resnet18, "resnet34": resnet34}
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def torchvision_keys(depths: tuple[int, ...]) -> list[str]:
    """The keys of torchvision's state_dict, in its order."""
    keys = ["conv1.weight", *(f"bn1.{name}" for name in NORM)]
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            prefix = f"layer{stage}.{block}."
            for i in (1, 2):
                keys += [f"{prefix}conv{i}.weight", *(f"{prefix}bn{i}.{name}" for name in NORM)]
            if stage > 1 and block == 0:
                keys.append(f"{prefix}downsample.0.weight")
                keys += [f"{prefix}downsample.1.{name}" for name in NORM]
    return [*keys, "fc.weight", "fc.bias"]


@pytest.mark.parametrize("name", MODELS)
def test_dense_names_and_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name]()
    assert list(model.state_dict()) == torchvision_keys(DEPTHS[name])
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.1.conv2.weight"] == (64, 64, 3, 3)
    assert shapes["layer3.0.downsample.0.weight"] == (256, 128, 1, 1)
    assert shapes["layer4.1.conv1.weight"] == (512, 512, 3, 3)
    assert shapes["fc.weight"] == (1000, 512)
    total = sum(parameter.numel() for parameter in model.parameters())
    # torchvision's totals.
    assert total == {"resnet18": 11_689_512, "resnet34": 21_797_672}[name]


@pytest.mark.parametrize("name", MODELS)
def test_virtual_weights_are_exactly_the_papers(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name](rpg=rpg.RPGConfig(dof=45_000))
    assert rpg.summary(model).virtual_weights == VIRTUAL_WEIGHTS[name]
    shared = [n for n, m in model.named_modules() if hasattr(m, "virtual_weight")]
    assert len(shared) == 2 * sum(DEPTHS[name]) + 3
    assert all(n.startswith("layer") for n in shared)
    kept = [n for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert kept == ["conv1", "fc"]
    dense_keys = torchvision_keys(DEPTHS[name])
    gone = {f"{n}.weight" for n in shared}
    bank_keys = {"rpg_bank.weight", "rpg_bank.map_digits"}
    assert set(model.state_dict()) == {k for k in dense_keys if k not in gone} | bank_keys


@pytest.mark.parametrize("dof", [45_000, 2_000_000, 5_500_000, 11_000_000])
@pytest.mark.parametrize("name", MODELS)
def test_dof_is_rounded_down_to_whole_slots(name: str, dof: int) -> None:
    with torch.device("meta"):
        model = MODELS[name](rpg=rpg.RPGConfig(dof=dof, granularity=64))
    bank = model.get_submodule("rpg_bank")
    assert isinstance(bank, rpg.ParameterBank)
    assert bank.dof == dof // 64 * 64
    assert bank.weight.shape == (dof // 64, 64)
    assert bank.weight.is_meta


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("stem", "side", "before_stages"), [("imagenet", 64, 16), ("cifar", 32, 32)]
)
def test_output_shapes(stem: str, side: int, before_stages: int, shared: bool) -> None:
    config = rpg.RPGConfig(dof=45_000) if shared else None
    with torch.device("meta"):
        model = resnet18(7, stem=stem, rpg=config)
        x = torch.empty(3, 3, side, side)
    seen: list[torch.Size] = []
    model.get_submodule("layer1").register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape)
    )
    assert model(x).shape == (3, 7)
    assert seen == [(3, 64, before_stages, before_stages)]


def test_unpacked_layers_start_like_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    model = resnet18(10, stem="cifar", rpg=rpg.RPGConfig(dof=500_000))
    layers = [m for m in model.modules() if hasattr(m, "virtual_weight")]
    for layer in layers:
        weight = layer.virtual_weight
        out, _, height, width = weight.shape
        fan_out = out * height * width
        assert math.isclose(weight.scale, math.sqrt(4608 / fan_out), rel_tol=1e-6)
        std = weight.unpack().std().item()
        # A layer of n weights knows its own deviation to 1 / sqrt(2 n); the smallest has 8192.
        assert std == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
    scales = [layer.virtual_weight.scale for layer in layers]
    assert min(scales) == pytest.approx(1)
    assert max(scales) == pytest.approx(6)


def test_dense_layers_start_like_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    model = resnet18(10, stem="cifar")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            expected = math.sqrt(2 / fan_out)
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_stated_scale_rule_is_kept() -> None:
    with torch.device("meta"):
        model = resnet18(rpg=rpg.RPGConfig(dof=45_000, scale="fan_in"))
    weight = model.get_submodule("layer2.0.conv1").virtual_weight
    assert weight.scale == pytest.approx(math.sqrt(4608 / (64 * 9)))


def test_shared_model_trains_a_step() -> None:
    model = resnet18(10, stem="cifar", rpg=rpg.RPGConfig(dof=45_000))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    gradient = model.get_parameter("rpg_bank.weight").grad
    assert gradient is not None
    assert (gradient != 0).float().mean() > 0.99


def test_meta_model_initialises_and_runs() -> None:
    with torch.device("meta"):
        model = resnet18(10, stem="cifar", rpg=rpg.RPGConfig(dof=45_000))
    rpg.initialize(model, device="cpu")
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert model.get_parameter("rpg_bank.weight").std().item() == pytest.approx(0.0208, rel=0.02)
    kaiming_fan_out(model)
    assert model.get_parameter("conv1.weight").std().item() == pytest.approx(0.0589, rel=0.05)
    assert model.eval()(torch.randn(2, 3, 16, 16)).isfinite().all()


def test_same_seed_gives_the_same_stem_dense_and_shared() -> None:
    torch.manual_seed(0)
    dense = resnet18(10, stem="cifar")
    torch.manual_seed(0)
    shared = resnet18(10, stem="cifar", rpg=rpg.RPGConfig(dof=45_000))
    for name in ("conv1.weight", "fc.weight"):
        assert torch.equal(dense.get_parameter(name), shared.get_parameter(name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem": "mnist"}, "stem: got 'mnist', wanted one of 'imagenet', 'cifar'"),
        ({"num_classes": 0}, "num_classes: got 0, wanted a positive int"),
        ({"num_classes": 2.0}, "num_classes: got 2.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resnet18(**arguments)  # type: ignore[arg-type]


def test_bad_sizes_of_resnet() -> None:
    with pytest.raises(ValueError, match="depths: got \\(\\), wanted"):
        ResNet(())
    with pytest.raises(ValueError, match="width: got -1"):
        ResNet((1,), width=-1)
