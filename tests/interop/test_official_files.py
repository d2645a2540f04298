"""Files of the published code: its side files, its checkpoint, its ResNets."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_arrays import HOSTILE, npy, objects
from torch import Tensor, nn
from torch.nn import functional as F

import rpg_kernels as rpg
from rpg_kernels.interop.official import from_tables, load_tables
from rpg_kernels.interop.official_resnet import load_resnet, resnet_layers
from rpg_kernels.models import ResNet

DEPTHS = (1, 2)  # the published stages of 64 and 128 channels
CLASSES = 5
DOF = 3001


class Ring(nn.Module):
    def __init__(self, dof: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(dof) * math.sqrt(2 / (512 * 9)))


class Gathered(nn.Module):
    """A shared convolution as published; it registers the ring as its own module ``mem``."""

    def __init__(self, mem: Ring, like: nn.Conv2d, index: Any, sign: Any) -> None:
        super().__init__()
        self.mem = mem
        self.shape, self.stride, self.padding = like.weight.shape, like.stride, like.padding
        out, _, kernel, _ = self.shape
        self.multiplier = ((512.0 * 3 * 3) / (out * kernel * kernel)) ** 0.5
        self.index, self.sign = torch.from_numpy(index), torch.from_numpy(sign)

    def weight(self) -> Tensor:
        return (self.mem.w[self.index] * self.sign).view(self.shape) * self.multiplier

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), None, self.stride, self.padding)


def names_in_published_order(model: ResNet) -> list[str]:
    """The published constructor makes a shortcut before the block that it belongs to."""
    names = []
    for stage in range(model.stages):
        for i, block in enumerate(getattr(model, f"layer{stage + 1}")):
            convolutions = ["downsample.0"] if block.downsample is not None else []
            for name in (*convolutions, "conv1", "conv2"):
                names.append(f"layer{stage + 1}.{i}.{name}")
    return names


class Published:
    """A network as the published code builds it, with its positions and signs as NumPy arrays."""

    def __init__(self, depths: tuple[int, ...] = DEPTHS, dof: int = DOF) -> None:
        torch.manual_seed(1)
        random = np.random.default_rng(2)
        self.depths = depths
        self.model = ResNet(depths, CLASSES)
        self.names = names_in_published_order(self.model)
        mem = Ring(dof)
        dense = [self.model.get_submodule(name) for name in self.names]
        sizes = [layer.weight.numel() for layer in dense if isinstance(layer, nn.Conv2d)]
        laps, rest = divmod(sum(sizes), dof)
        positions = [np.arange(dof)] * laps + [random.choice(dof, rest, replace=False)]
        ends = np.cumsum(sizes)[:-1]
        self.p_idxs = np.split(random.permutation(np.concatenate(positions)), ends)
        draws = random.binomial(p=0.5, n=1, size=sum(sizes)).astype(np.float32) * 2 - 1
        self.b_masks = np.split(draws.astype(int), ends)
        for name, layer, index, sign in zip(
            self.names, dense, self.p_idxs, self.b_masks, strict=True
        ):
            assert isinstance(layer, nn.Conv2d)
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, Gathered(mem, layer, index, sign))
        self.model.mem = mem
        for norm in self.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def weights(self) -> list[Tensor]:
        layers = [self.model.get_submodule(name) for name in self.names]
        return [layer.weight().detach() for layer in layers if isinstance(layer, Gathered)]

    def checkpoint(self, folder: Path) -> Any:
        """What the published training script saves, read back."""
        optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        state = {
            "epoch": 90,
            "arch": "superresnet18e",
            "state_dict": nn.DataParallel(self.model).state_dict(),
            "best_acc1": torch.tensor(70.5),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, folder / "run.pth.tar")
        return torch.load(folder / "run.pth.tar", "cpu", weights_only=True)

    def files(self, folder: Path, flavour: str = "NumPy 2") -> tuple[Path, Path]:
        paths = (folder / "runp_idxs.npy", folder / "runb_masks.npy")
        for path, layers in zip(paths, (self.p_idxs, self.b_masks), strict=True):
            save(path, layers, flavour)
        return paths


def save(path: Path, layers: list[Any], flavour: str = "NumPy 2") -> None:
    """``numpy.save(path, numpy.array(layers))`` as either NumPy did or would do it."""
    if len({len(layer) for layer in layers}) == 1:
        np.save(path, np.array(layers))
    elif flavour == "NumPy 2":
        np.save(path, objects(*layers))
    else:  # protocol 3, and the names of its own modules
        content = pickle.dumps(objects(*layers), 3)
        content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        path.write_bytes(npy(content, (len(layers),)))


@pytest.mark.parametrize("flavour", ["NumPy 1", "NumPy 2"])
def test_every_weight_is_the_published_one_bit_for_bit(tmp_path: Path, flavour: str) -> None:
    published = Published()
    files = published.files(tmp_path, flavour)
    assert (b"numpy.core." in files[0].read_bytes()) == (flavour == "NumPy 1")
    layers = resnet_layers(DEPTHS)
    bank, weights = load_tables(
        published.model.mem.w,
        *files,
        [layer.shape for layer in layers],
        [layer.multiplier for layer in layers],
    )
    assert bank.dof == DOF
    for weight, expected in zip(weights, published.weights(), strict=True):
        assert torch.equal(weight.unpack(), expected)


def test_layers_of_equal_sizes_are_one_array_of_numbers(tmp_path: Path) -> None:
    published = Published((1,))
    files = published.files(tmp_path)
    assert np.load(files[0]).shape == (2, 64 * 64 * 9)
    shapes, multipliers = [(64, 64, 3, 3)] * 2, [8**0.5] * 2
    _, weights = load_tables(published.model.mem.w, *map(str, files), shapes, multipliers)
    for weight, expected in zip(weights, published.weights(), strict=True):
        assert torch.equal(weight.unpack(), expected)


def test_other_integer_dtypes_and_byte_orders(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    shapes = [(3, 5), (4, 2, 3, 3)]
    indices = [random.integers(0, 50, math.prod(shape)) for shape in shapes]
    signs = [random.integers(0, 2, math.prod(shape)) * 2 - 1 for shape in shapes]
    save(tmp_path / "i.npy", [indices[0].astype(">u2"), indices[1].astype(np.int32)])
    save(tmp_path / "s.npy", [signs[0].astype(np.int8), signs[1].astype(">f4")])
    w = torch.randn(50, dtype=torch.float64)
    _, weights = load_tables(w, tmp_path / "i.npy", tmp_path / "s.npy", shapes, [2.0, 0.5])
    _, expected = from_tables(w, indices, signs, shapes, [2.0, 0.5])
    for one, other in zip(weights, expected, strict=True):
        assert torch.equal(one.unpack(), other.unpack())


@pytest.mark.parametrize(
    ("depths", "layers", "total"),
    [((2, 2, 2, 2), 19, 11_157_504), ((3, 4, 6, 3), 35, 21_258_240), (DEPTHS, 7, 598_016)],
)
def test_layers_of_a_resnet(depths: tuple[int, ...], layers: int, total: int) -> None:
    with torch.device("meta"):
        model = ResNet(depths)
    found = resnet_layers(depths)
    assert [layer.name for layer in found] == names_in_published_order(model)
    assert len(found) == layers
    assert sum(math.prod(layer.shape) for layer in found) == total
    for layer in found:
        dense = model.get_submodule(layer.name)
        assert isinstance(dense, nn.Conv2d)
        assert dense.weight.shape == layer.shape
        # The ring starts with the deviation of Kaiming fan-out for 512 channels of 3x3.
        std = math.sqrt(2 / (512 * 9)) * layer.multiplier
        assert std == pytest.approx(math.sqrt(2 / (layer.shape[0] * layer.shape[2] ** 2)))


def test_a_checkpoint_becomes_a_network_of_ours(tmp_path: Path) -> None:
    published = Published()
    state_dict = published.checkpoint(tmp_path)["state_dict"]
    assert "module.mem.w" in state_dict
    assert "module.layer2.0.downsample.0.mem.w" in state_dict
    model = load_resnet(state_dict, *published.files(tmp_path), depths=DEPTHS)
    assert sorted(name for name, _ in model.named_parameters() if "rpg" in name) == [
        "rpg_bank.weight"
    ]
    x = torch.randn(2, 3, 40, 40)
    for training in (False, True):
        published.model.train(training)
        expected = published.model(x)
        output = model.train(training)(x)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    (expected**2).sum().backward()
    (output**2).sum().backward()
    gradient = published.model.mem.w.grad
    assert gradient is not None
    assert model.rpg_bank.weight.grad is not None
    scale = float(gradient.abs().max())
    torch.testing.assert_close(
        model.rpg_bank.weight.grad.view(-1), gradient, rtol=1e-3, atol=1e-4 * scale
    )
    for name, running in published.model.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), running, rtol=1e-4, atol=1e-4)


def test_the_network_is_a_copy_and_can_become_dense(tmp_path: Path) -> None:
    published = Published()
    state_dict = {
        name.removeprefix("module."): value
        for name, value in published.checkpoint(tmp_path)["state_dict"].items()
    }
    before = torch.get_rng_state()
    model = load_resnet(state_dict, *published.files(tmp_path), depths=DEPTHS)
    assert torch.equal(torch.get_rng_state(), before)
    expected = {name: state_dict[name].clone() for name in ("conv1.weight", "bn1.running_var")}
    weights = dict(zip(published.names, published.weights(), strict=True))
    for value in state_dict.values():
        value.zero_()
    dense = rpg.materialize(model).state_dict()
    for name, value in expected.items():
        assert torch.equal(dense[name], value)
    for name, value in weights.items():
        assert torch.equal(dense[f"{name}.weight"], value)
    assert not [name for name in dense if "rpg" in name or "mem" in name]


SHAPES = [(2, 3), (4, 2, 1, 1), (2, 2, 3, 3)]


def small_files(tmp_path: Path, **replaced: Any) -> dict[str, Any]:
    """Arguments of load_tables; a replaced layer list is written as it is."""
    sizes = [math.prod(shape) for shape in SHAPES]
    lists = {
        "indices": [np.arange(size) % 7 for size in sizes],
        "signs": [np.arange(size) % 2 * 2 - 1 for size in sizes],
    }
    arguments: dict[str, Any] = {"w": torch.randn(7), "shapes": SHAPES, "multipliers": [1.0] * 3}
    for key, name in (("indices", "index_file"), ("signs", "sign_file")):
        layers = replaced.get(key, lists[key])
        arguments[name] = tmp_path / f"{key}.npy"
        np.save(arguments[name], objects(*layers) if isinstance(layers, list) else layers)
    return arguments


I6, I8, I36 = np.zeros(6, int), np.zeros(8, int), np.zeros(36, int)
S6, S8, S36 = np.ones(6), np.ones(8), np.ones(36)
OUTSIDE, NEGATIVE = I8 + np.arange(8), I8 - np.arange(8)
BAD_FILES: list[tuple[str, Any, str]] = [
    ("indices", [I6, I8], r"indices.npy: got 2 layers, wanted 3 as in shapes"),
    ("indices", [I6, I8, I36, I36], r"indices.npy: got 4 layers, wanted 3 as in shapes"),
    ("signs", [S6, S8], r"signs.npy: got 2 layers, wanted 3 as in shapes"),
    ("indices", [I6, I36, I8], r"indices.npy\[1\]: got shape \[36\], wanted \[4, 2, 1, 1\] or \[8"),
    ("signs", [S36, S8, S6], r"signs.npy\[0\]: got shape \[36\], wanted \[2, 3\] or \[6\]"),
    ("indices", [I6, OUTSIDE, I36], r"indices.npy\[1\]: got positions 0 to 7, wanted 0 to 6"),
    ("indices", [I6, NEGATIVE, I36], r"indices.npy\[1\]: got positions -7 to 0, wanted 0 to 6"),
    ("indices", [I6, S8, I36], r"indices.npy\[1\]: got dtype float64, wanted integers"),
    ("indices", [I6, I8 > 0, I36], r"indices.npy\[1\]: got dtype bool, wanted integers"),
    ("signs", [S6, S8 * 0, S36], r"signs.npy\[1\]: got 0.0, wanted \+1 and -1 only"),
    ("signs", [S6, S8, S36 * 2], r"signs.npy\[2\]: got 2.0, wanted \+1 and -1 only"),
    ("signs", [S6, S8, S36 * math.nan], r"signs.npy\[2\]: got nan, wanted \+1 and -1 only"),
    ("signs", [S6, S8 > 0, S36], r"signs.npy\[1\]: got dtype bool, wanted numbers"),
    ("signs", [S6, S8 * 1j, S36], r"signs.npy\[1\]: got dtype complex128, wanted numbers"),
    ("signs", [S6, 1.0, S36], r"signs.npy: got a float in an array of objects, wanted arrays"),
    ("indices", [np.array(0), I8, I36], r"indices.npy\[0\]: got shape \[\], wanted \[2, 3\]"),
    ("indices", np.zeros(3, int), r"indices.npy: got int64 \[3\], wanted one flat array per layer"),
    ("indices", np.zeros((3, 2, 3), int), r"indices.npy: got int64 \[3, 2, 3\], wanted one flat"),
    ("indices", np.array(0), r"indices.npy: got int64 \[\], wanted one flat array per layer"),
    ("indices", np.array(["a"]), r"indices.npy: got an array of dtype <U1, wanted numbers"),
]


@pytest.mark.parametrize(("key", "layers", "message"), BAD_FILES)
def test_bad_files(tmp_path: Path, key: str, layers: Any, message: str) -> None:
    load_tables(**small_files(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_tables(**small_files(tmp_path, **{key: layers}))


@pytest.mark.parametrize("name", ["runs a command", "gigabytes", "memo entry of gigabytes"])
@pytest.mark.parametrize("which", ["index_file", "sign_file"])
def test_hostile_files(tmp_path: Path, which: str, name: str) -> None:
    arguments = small_files(tmp_path)
    content, message = HOSTILE[name]
    arguments[which].write_bytes(npy(content))
    with pytest.raises(ValueError, match=rf"{re.escape(str(arguments[which]))}: .*{message}"):
        load_tables(**arguments)


@pytest.mark.parametrize("which", ["index_file", "sign_file"])
def test_missing_file(tmp_path: Path, which: str) -> None:
    arguments = small_files(tmp_path)
    arguments[which].unlink()
    with pytest.raises(FileNotFoundError):
        load_tables(**arguments)


def test_other_arguments_are_checked_as_by_from_tables(tmp_path: Path) -> None:
    arguments = small_files(tmp_path)
    with pytest.raises(TypeError, match=r"w: got dtype torch.int64"):
        load_tables(**{**arguments, "w": torch.arange(7)})
    with pytest.raises(ValueError, match=r"multipliers\[2\]: got 0.0"):
        load_tables(**{**arguments, "multipliers": [1, 1, 0]})
    with pytest.raises(ValueError, match=r"multipliers: got 2 layers, wanted 3 as in .*s.npy"):
        load_tables(**{**arguments, "multipliers": [1, 1]})


def test_bad_state_dicts(tmp_path: Path) -> None:
    published = Published((1,))
    checkpoint = published.checkpoint(tmp_path)
    files = published.files(tmp_path)
    good = checkpoint["state_dict"]
    load_resnet(good, *files, depths=(1,))
    ring = good["module.mem.w"]
    cases: list[tuple[Any, type[Exception], str]] = [
        (checkpoint, TypeError, r"state_dict\['epoch'\]: got a int, wanted a tensor \(the state"),
        ([1], TypeError, "state_dict: got a list, wanted a mapping"),
        ({}, ValueError, r"state_dict: got no key mem.w"),
        ({**good, "module.fc.bias": torch.ones(1, 5)}, ValueError, "got no vector fc.bias"),
        ({**good, "module.fc.weight": torch.ones(6, 64)}, ValueError,
         r"state_dict\['fc.weight'\]: got shape \[6, 64\], wanted \[5, 64\]"),
        ({**good, "module.x": ring}, ValueError, "state_dict: got one with x, wanted the keys"),
        ({k: v for k, v in good.items() if "conv1.weight" not in k}, ValueError,
         "state_dict: got one without conv1.weight, wanted"),
        ({**good, "module.layer1.0.conv1.mem.w": ring + 1}, ValueError,
         r"state_dict\['layer1.0.conv1.mem.w'\]: got another ring"),
        ({**good, "module.layer1.0.conv1.mem.w": ring.double()}, ValueError, "another ring"),
        ({k: v[:5] if "mem.w" in k else v for k, v in good.items()}, ValueError,
         r"p_idxs.npy\[0\]: got positions 0 to 3000, wanted 0 to 4"),
    ]  # fmt: skip
    for state_dict, kind, message in cases:
        with pytest.raises(kind, match=message):
            load_resnet(state_dict, *files, depths=(1,))
    with pytest.raises(ValueError, match=r"got one without layer1.1.bn1.bias, .*, …, wanted"):
        load_resnet(good, *files)
    with pytest.raises(ValueError, match=r"depths: got \(1, 0\), wanted positive block counts"):
        load_resnet(good, *files, depths=(1, 0))
