"""Networks trained with the paper's published code: one ring and an explicit table per layer.

That code stores, for each shared layer, an integer position on the ring and a sign of ±1 for every
weight, in torch's layout, and multiplies the gathered weight by a number of the layer:
``Ŵ = multiplier · sign · w[index]``. Its maps were drawn at random and follow no law, so they are
kept as a table of 4 bytes per weight.

A training run ``NAME`` leaves ``NAMEp_idxs.npy`` (positions) and ``NAMEb_masks.npy`` (signs), each
an array of one flat int64 array per shared layer, and the checkpoint ``NAME.pth.tar``, whose
``"state_dict"`` has the ring as ``module.mem.w`` (``.pth.tarbest.pth.tar`` for the best epoch).
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.interop.numpy_files import read_object_array

SIGN_BIT = -(2**31)  # bit 31 of an int32: the sign is minus
MAX_DOF = 2**31 - 1


def from_tables(
    w: Any,
    indices: Sequence[Any],
    signs: Sequence[Any],
    shapes: Sequence[Sequence[int]],
    multipliers: Sequence[float],
) -> tuple[ParameterBank, list[VirtualWeight]]:
    """Build a bank and its virtual weights from the published format.

    Args:
        w: the ring, a floating-point array or tensor ``[dof]``; copied. Bank and table are on its
            device and the bank has its dtype.
        indices: per layer, an integer array or tensor of positions on the ring, flat or of the
            layer's shape.
        signs: per layer, an integer or floating-point array or tensor of +1 and -1, as ``indices``.
        shapes: per layer, torch's shape of the weight: ``[out, in]`` or ``[out, in, kh, kw]``.
        multipliers: per layer, the factor of the whole weight; finite and not zero.

    Returns:
        The bank, granularity 1, and one :class:`VirtualWeight` per layer, in the order given.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: lists of different lengths, a wrong number of entries, a position outside the
            ring, a sign that is not ±1, a shape of another rank, a useless multiplier, or a ring of
            2^31 elements or more. Nothing is built before everything is checked.

    The format is that of Wang et al., WACV 2023 (arXiv 2107.07110), section 3.

    >>> import torch
    >>> from rpg_kernels.interop.official import from_tables
    >>> w = torch.tensor([1.0, 2.0, 3.0])
    >>> bank, (weight,) = from_tables(w, [[2, 0, 1, 1]], [[1, -1, 1, -1]], [(2, 2)], [10.0])
    >>> weight.unpack().tolist()
    [[30.0, -10.0], [20.0, -20.0]]
    """
    return _build(w, indices, signs, shapes, multipliers)


def load_tables(
    w: Any,
    index_file: str | os.PathLike[str],
    sign_file: str | os.PathLike[str],
    shapes: Sequence[Sequence[int]],
    multipliers: Sequence[float],
) -> tuple[ParameterBank, list[VirtualWeight]]:
    """:func:`from_tables` with indices and signs in the two files that the published code writes.

    Args:
        w, shapes, multipliers: as in :func:`from_tables`; shapes and multipliers of a ResNet are
            those of :func:`~rpg_kernels.interop.official_resnet.resnet_layers`.
        index_file: the ``.npy`` file of positions, whose name ends in ``p_idxs.npy``.
        sign_file: the ``.npy`` file of signs, whose name ends in ``b_masks.npy``.

    Returns:
        The bank, granularity 1, and one :class:`VirtualWeight` per layer, in the files' order.

    Raises:
        ValueError: a file is damaged or holds anything but arrays of numbers
            (see :func:`~rpg_kernels.interop.numpy_files.read_object_array`); its layers are not
            those of ``shapes``; a position is outside the ring or a sign not ±1; or as
            :func:`from_tables`.
        TypeError: as :func:`from_tables`.
        OSError: a file cannot be opened.
        MissingExtraError: NumPy is not installed.

    >>> import os, tempfile, numpy, torch
    >>> from rpg_kernels.interop.official import load_tables
    >>> w = torch.tensor([1.0, 2.0, 3.0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     p_idxs, b_masks = (os.path.join(folder, name) for name in ("p_idxs.npy", "b_masks.npy"))
    ...     numpy.save(p_idxs, [numpy.array([2, 0, 1, 1])])
    ...     numpy.save(b_masks, [numpy.array([1, -1, 1, -1])])
    ...     bank, (weight,) = load_tables(w, p_idxs, b_masks, [(2, 2)], [10.0])
    >>> weight.unpack().tolist()
    [[30.0, -10.0], [20.0, -20.0]]
    """
    indices = _layers_of(index_file, "iu", "integers", len(shapes))
    signs = _layers_of(sign_file, "iuf", "numbers", len(shapes))
    return _build(w, indices, signs, shapes, multipliers, str(index_file), str(sign_file))


def _build(
    w: Any,
    indices: Sequence[Any],
    signs: Sequence[Any],
    shapes: Sequence[Sequence[int]],
    multipliers: Sequence[float],
    index_name: str = "indices",
    sign_name: str = "signs",
) -> tuple[ParameterBank, list[VirtualWeight]]:
    """``from_tables``; the names are those that errors give to indices and signs."""
    ring = _tensor(w, "w")
    if not ring.is_floating_point():
        raise TypeError(f"w: got dtype {ring.dtype}, wanted a floating-point dtype")
    if ring.dim() != 1 or not 1 <= ring.numel() <= MAX_DOF:
        raise ValueError(f"w: got shape {list(ring.shape)}, wanted [dof] with dof 1 to {MAX_DOF}")
    lists = {index_name: indices, sign_name: signs, "shapes": shapes, "multipliers": multipliers}
    for name, values in lists.items():
        if len(values) != len(indices) or not len(values):
            raise ValueError(
                f"{name}: got {len(values)} layers, wanted {len(indices) or 'at least one'} "
                f"as in {index_name}"
            )
    sizes = [_shape(shape, f"shapes[{i}]") for i, shape in enumerate(shapes)]
    scales = [_multiplier(value, f"multipliers[{i}]") for i, value in enumerate(multipliers)]
    table = torch.empty(
        sum(math.prod(size) for size in sizes), dtype=torch.int32, device=ring.device
    )
    start = 0
    for i, size in enumerate(sizes):
        index = _index(indices[i], size, ring.numel(), f"{index_name}[{i}]")
        negative = _negative(signs[i], size, f"{sign_name}[{i}]").to(index.device)
        entries = torch.where(negative, index | SIGN_BIT, index)
        # The virtual matrix has in-channels innermost: [out, in, kh, kw] -> [out, kh, kw, in].
        table[start : start + index.numel()] = entries.movedim(1, -1).reshape(-1)
        start += index.numel()
    bank = ParameterBank.from_table(ring, table)
    return bank, [bank.place(size, scale=s) for size, s in zip(sizes, scales, strict=True)]


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(value).__name__
        raise TypeError(f"{name}: got {got} ({error}), wanted numbers") from error


def _shape(shape: Sequence[int], name: str) -> tuple[int, ...]:
    try:
        size = tuple(operator.index(n) for n in shape)
    except TypeError as error:
        raise TypeError(f"{name}: got {shape!r}, wanted a sequence of int") from error
    if len(size) not in (2, 4) or min(size) < 1:
        raise ValueError(f"{name}: got {size}, wanted (out, in) or (out, in, kh, kw), all positive")
    return size


def _multiplier(value: float, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {value!r}, wanted a number") from error
    if number == 0 or not math.isfinite(number):
        raise ValueError(f"{name}: got {number}, wanted a finite number other than 0")
    return number


def _entries(value: Any, size: tuple[int, ...], name: str) -> Tensor:
    """``value`` as a tensor of shape ``size``, whatever its dtype."""
    tensor = _tensor(value, name)
    if tuple(tensor.shape) not in (size, (math.prod(size),)):
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}, wanted {list(size)} or [{math.prod(size)}]"
        )
    return tensor.reshape(size)


def _index(value: Any, size: tuple[int, ...], dof: int, name: str) -> Tensor:
    """Positions as int32, checked."""
    tensor = _entries(value, size, name)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, wanted an integer dtype")
    tensor = tensor.long()
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= dof:
        raise ValueError(f"{name}: got positions {low} to {high}, wanted 0 to {dof - 1}")
    return tensor.int()


def _negative(value: Any, size: tuple[int, ...], name: str) -> Tensor:
    """Where the sign is minus, checked."""
    tensor = _entries(value, size, name)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, wanted an integer or floating dtype")
    number = tensor.double()
    wrong = number[number.abs() != 1]
    if wrong.numel():
        raise ValueError(f"{name}: got {wrong[0].item()}, wanted +1 and -1 only")
    return number < 0


def _layers_of(file: str | os.PathLike[str], kinds: str, wanted: str, count: int) -> list[Any]:
    """The layers in one of the two files; ``kinds`` are NumPy's letters of the dtypes wanted."""
    array = read_object_array(file)
    # Layers of equal sizes make NumPy write one array of numbers, a row for each.
    if array.ndim != (1 if array.dtype == object else 2):
        got = f"{array.dtype} {list(array.shape)}"
        raise _checks.fail(str(file), got, "one flat array per layer")
    if len(array) != count:
        raise _checks.fail(str(file), f"{len(array)} layers", f"{count} as in shapes")
    for i, layer in enumerate(array):
        if layer.dtype.kind not in kinds:
            raise _checks.fail(f"{file}[{i}]", f"dtype {layer.dtype}", wanted)
    return list(array)
