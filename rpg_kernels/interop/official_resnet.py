"""ResNets trained with the paper's published code, as networks of ours."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels.conversion import attach
from rpg_kernels.interop.official import load_tables
from rpg_kernels.models import ResNet
from rpg_kernels.nn import Conv2d

WIDTH = 64  # channels of a published ResNet's first stage
RING_FAN_OUT = 512 * 3 * 3  # the ring starts like a 3x3 convolution of 512 channels, fan-out


class SharedLayer(NamedTuple):
    """A layer of the published networks that reads its weight from the ring."""

    name: str  # of the module in rpg_kernels.models.ResNet, and in torchvision's
    shape: tuple[int, int, int, int]  # [out, in, kh, kw]
    multiplier: float


def resnet_layers(depths: Sequence[int] = (2, 2, 2, 2)) -> list[SharedLayer]:
    """The shared layers of a published ResNet of basic blocks, in the order of its files.

    These are all convolutions of the blocks. In the stages that change the number of channels the
    1x1 convolution of the shortcut comes *before* the two of its block, unlike in the order of
    the modules. The multiplier is ``sqrt(512·3·3 / (out·k·k))``.

    Args:
        depths: blocks in each stage: (2, 2, 2, 2) is ``superresnet18e``, (3, 4, 6, 3)
            ``superresnet34e``.

    Raises:
        ValueError: no stage, or one without blocks.

    >>> from rpg_kernels.interop.official_resnet import resnet_layers
    >>> for layer in resnet_layers()[3:7]:
    ...     print(*layer)
    layer1.1.conv2 (64, 64, 3, 3) 2.8284271247461903
    layer2.0.downsample.0 (128, 64, 1, 1) 6.0
    layer2.0.conv1 (128, 64, 3, 3) 2.0
    layer2.0.conv2 (128, 128, 3, 3) 2.0
    """
    if not depths or any(depth < 1 for depth in depths):
        raise _checks.fail("depths", tuple(depths), "positive block counts")
    layers = []
    before = WIDTH
    for stage, depth in enumerate(depths):
        out = WIDTH << stage
        for block in range(depth):
            name = f"layer{stage + 1}.{block}"
            if before != out:
                layers.append(_shared(f"{name}.downsample.0", out, before, 1))
            layers.append(_shared(f"{name}.conv1", out, before, 3))
            layers.append(_shared(f"{name}.conv2", out, out, 3))
            before = out
    return layers


def load_resnet(
    state_dict: Mapping[str, Tensor],
    index_file: str | os.PathLike[str],
    sign_file: str | os.PathLike[str],
    depths: Sequence[int] = (2, 2, 2, 2),
) -> ResNet:
    """A ResNet that the published code trained, as one of ours: its weights are never stored.

    Args:
        state_dict: ``torch.load("NAME.pth.tar", "cpu", weights_only=True)["state_dict"]``, with or
            without the prefix ``module.``; copied.
        index_file, sign_file: ``NAMEp_idxs.npy`` and ``NAMEb_masks.npy`` of the same run.
        depths: blocks in each stage; (2, 2, 2, 2) is ``superresnet18e``, (3, 4, 6, 3)
            ``superresnet34e``.

    Returns:
        A :class:`~rpg_kernels.models.ResNet` in training mode, on the device and in the dtype of
        the state dict, with the ring as ``rpg_bank`` and ``rpg_kernels.nn.Conv2d`` in its blocks.

    Raises:
        TypeError: something in the state dict is not a tensor.
        ValueError: keys or shapes are not those of the network, or as
            :func:`~rpg_kernels.interop.official.load_tables`.
        OSError: a file cannot be opened.
        MissingExtraError: NumPy is not installed.

    >>> import math, os, tempfile, numpy, torch
    >>> from rpg_kernels.interop.official_resnet import load_resnet, resnet_layers
    >>> from rpg_kernels.models import ResNet
    >>> state = ResNet((1,), num_classes=10).state_dict()
    >>> for layer in resnet_layers((1,)):
    ...     del state[f"{layer.name}.weight"]
    >>> state["mem.w"] = torch.randn(999)
    >>> positions = numpy.arange(2 * 64 * 64 * 9).reshape(2, -1) % 999
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     p_idxs, b_masks = (os.path.join(folder, name) for name in ("p_idxs.npy", "b_masks.npy"))
    ...     numpy.save(p_idxs, positions)
    ...     numpy.save(b_masks, 1 - positions % 2 * 2)
    ...     model = load_resnet(state, p_idxs, b_masks, depths=(1,))
    >>> model(torch.randn(2, 3, 64, 64)).shape, model.rpg_bank.dof
    (torch.Size([2, 10]), 999)
    """
    layers = resnet_layers(depths)
    ring, values = _split(state_dict)
    with torch.device("meta"):
        model = ResNet(depths, _classes(values))
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    for layer in layers:
        del wanted[f"{layer.name}.weight"]
    _check_values(values, wanted)
    bank, weights = load_tables(
        ring,
        index_file,
        sign_file,
        [layer.shape for layer in layers],
        [layer.multiplier for layer in layers],
    )
    for layer, weight in zip(layers, weights, strict=True):
        parent, _, child = layer.name.rpartition(".")
        dense = cast(nn.Conv2d, model.get_submodule(layer.name))
        stride, padding = (cast(tuple[int, int], pair) for pair in (dense.stride, dense.padding))
        out, channels, *kernel = layer.shape
        virtual = Conv2d(
            channels, out, kernel[0], stride, padding, bias=False, virtual_weight=weight
        )
        setattr(model.get_submodule(parent), child, virtual)
    attach(model, bank)
    # The model has no memory of its own yet, so it takes over the copies. The names were checked,
    # and the bank is there already.
    copies = {name: value.clone() for name, value in values.items()}
    model.load_state_dict(copies, strict=False, assign=True)
    return model


def _shared(name: str, out: int, channels: int, kernel: int) -> SharedLayer:
    multiplier = math.sqrt(RING_FAN_OUT / (out * kernel * kernel))
    return SharedLayer(name, (out, channels, kernel, kernel), multiplier)


def _split(state_dict: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The ring, and everything else under the names of an ordinary ResNet."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: got a {type(state_dict).__name__}, wanted a mapping")
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"state_dict[{name!r}]: got a {type(value).__name__}, wanted a tensor "
                "(the state dict is the checkpoint's entry 'state_dict')"
            )
    values = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if "mem.w" not in values:
        raise _checks.fail("state_dict", "no key mem.w", "the published network's ring")
    ring = values.pop("mem.w")
    # Every shared layer registers the ring once more.
    for name in [name for name in values if name.endswith(".mem.w")]:
        other = values.pop(name)
        if (other.shape, other.dtype) != (ring.shape, ring.dtype) or not torch.equal(other, ring):
            raise _checks.fail(f"state_dict[{name!r}]", "another ring", "the same as in mem.w")
    return ring, values


def _classes(values: dict[str, Tensor]) -> int:
    if "fc.bias" not in values or values["fc.bias"].dim() != 1 or not len(values["fc.bias"]):
        raise _checks.fail("state_dict", "no vector fc.bias", "one value per class")
    return len(values["fc.bias"])


def _check_values(values: dict[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    """The right names, each with the right shape."""
    missing, unknown = wanted.keys() - values, values.keys() - wanted
    for what, names in (("one without", missing), ("one with", unknown)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            wish = "the keys of a published ResNet of these depths"
            raise _checks.fail("state_dict", f"{what} {some}", wish)
    for name, shape in wanted.items():
        if values[name].shape != shape:
            got = f"shape {list(values[name].shape)}"
            raise _checks.fail(f"state_dict[{name!r}]", got, f"{list(shape)}")
