"""A trial: a small call of the same kind as a real one, as text that another process can run.

It has the real call's weight, less the rows that would make it slow, its dtypes, memory layouts,
settings and configuration, and few rows of its batch. Nothing of its values: x, dy, bank and bias
are drawn so that every product and every sum is exact in fp32, in whatever order it is made, and
only the rounding of the result is left to differ (``trial_run.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import settings
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.registry import Backend
from rpg_kernels.law.placement import Placement, parse

# What the operands of each operator are. Of "x", "image" and "indices" a part of the batch is kept.
ROLES = {
    "linear": ("x", "bank", "table", "bias", "placement"),
    "linear_input_grad": ("x", "bank", "table", "placement"),
    "linear_bank_grad": ("x", "x", "table", "placement", "dtype"),
    "conv2d": ("image", "bank", "table", "bias", "placement", *["number"] * 4),
    "conv2d_input_grad": ("image", "bank", "table", "size", "placement", *["number"] * 4),
    "conv2d_bank_grad": ("image", "image", "table", "placement", *["number"] * 4, "dtype"),
    "embedding": ("bank", "table", "indices", "placement"),
    "embedding_bank_grad": ("x", "indices", "table", "placement", "dtype"),
    "unpack": ("bank", "table", "placement"),
    "pack": ("dense", "table", "placement", "dtype"),
}
ROWS = 384  # of a batch that are kept, and what is left over of whole tiles of 128
PIXELS = 4096  # so many, and at least two images
WEIGHTS = 1 << 24  # of a matrix, about; more rows are cut, by multiples of 1024
ALIGNMENT = 16  # bytes; kernels are compiled for addresses that are multiples of it, or are not


@dataclass(frozen=True)
class Trial:
    """A call to be made elsewhere.

    Args:
        backend: name of the back end.
        label: what is on trial, see ``Backend.on_trial``.
        module: that registers the back end, or that the registered ones are imported with.
        op: operator.
        device: where.
        operands: the operator's, less the back end. A tensor is a dict: role, shape, stride, dtype,
            and the bytes by which its address misses a multiple of 16. Of a bank that is kept in
            fewer bytes it has activations, and such dicts of its parts, by their names.
        batch: (rows, images or indices of the real call, those of the trial).
        rows: (rows of the real weight, those of the trial's).
        configuration: what the back end says it would choose.
        conditions: settings in force.
    """

    backend: str
    label: str
    module: str
    op: str
    device: str
    operands: list[Any]
    batch: tuple[int, int]
    rows: tuple[int, int]
    configuration: str
    conditions: dict[str, Any]

    def to_json(self) -> str:
        """In one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Trial:
        """What ``to_json`` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "batch": tuple(fields["batch"]), "rows": tuple(fields["rows"])})

    @property
    def parts(self) -> tuple[Fraction, Fraction]:
        """How many times as large the real call's batch and its weight's rows are."""
        return Fraction(*self.batch), Fraction(*self.rows)

    @property
    def key(self) -> str:
        """Names the kind of call: trials of one key have one verdict, on one kind of device.

        The batch counts by the configuration that is chosen for it, and the segment of a weight not
        at all.
        """
        operands: list[Any] = []
        for role, operand in zip(ROLES[self.op], self.operands, strict=True):
            if isinstance(operand, dict):
                kind = {"shape": _kind(role, operand["shape"]), "stride": _lie(operand["stride"])}
                operands.append({**operand, **kind})
            else:
                operands.append(_kind("image", operand) if role == "size" else operand)
        told = [
            *(self.backend, self.label, self.op, torch.device(self.device).type),
            *(operands, self.rows, self.configuration, self.conditions),
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]

    def about(self) -> str:
        """One line for people."""
        at = ROLES[self.op].index("placement")
        weight = "x".join(map(str, parse(self.operands[at]).selected_shape))
        return f"{self.op} in {self.operands[0]['dtype']}, weight {weight}, on {self.device}"


def made(backend: Backend, call: Call) -> Trial:
    """The trial of a call.

    Args:
        backend: that would run it.
        call: with its operands.
    """
    p = parse(call.placement)
    small = _fewer_rows(p)
    of_rows = (p.selected_shape[0], small.selected_shape[0])
    batch = _batch(call)
    kept = _kept(call, batch)
    operands: list[Any] = []
    for role, operand in zip(ROLES[call.op], call.operands, strict=True):
        if role == "placement":
            operands.append(small.to_json())
        elif role == "size":
            operands.append([min(operand[0], kept), *operand[1:]])
        elif isinstance(operand, Tensor):
            operands.append(_tensor(role, operand, kept, of_rows))
        elif isinstance(operand, torch.dtype):
            operands.append(_name(operand))
        else:
            operands.append([*operand] if isinstance(operand, Sequence) else operand)
    if call.op.startswith("linear"):
        _cut_columns(call.op, operands, of_rows)
    return Trial(
        backend.name,
        backend.on_trial(call),
        type(backend).__module__,
        call.op,
        str(call.device),
        operands,
        (batch, kept),
        of_rows,
        backend.configuration(call),
        conditions(call),
    )


def conditions(call: Call) -> dict[str, Any]:
    """Settings that decide what kernels do."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "scratch": settings.scratch_bytes(call.device.type),
        "precision": precision() if call.dtype == torch.float32 else [],
    }


def precision() -> list[str]:
    """torch's switches for fp32 products: of matrices and of convolutions."""
    return [switch.fp32_precision for switch in precision_switches()]


def precision_switches() -> tuple[Any, Any]:
    """The objects that hold them."""
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv


def _fewer_rows(p: Placement) -> Placement:
    """The weight at the beginning of the ring, its scale a power of two, in at most WEIGHTS."""
    rows = p.selected_shape[0]
    scale = -0.5 if p.scale < 0 else 0.5
    small = replace(p, layer=0, start=0, scale=scale)
    if p.numel <= WEIGHTS or len(p.shape) > 2:
        return small
    kept = min(rows, max(1, WEIGHTS // p.selected_shape[1] // 1024) * 1024 + rows % 1024)
    if rows == p.shape[0]:
        return replace(small, shape=(kept, p.shape[1]), rows=(0, kept))
    return small.narrow(0, 0, kept)


def _batch(call: Call) -> int:
    """Rows of x, images, or indices; 1 where the operator has none of them."""
    roles = ROLES[call.op]
    if "indices" in roles:
        return int(call.operands[roles.index("indices")].numel())
    if "image" in roles:
        return int(call.x.shape[0])
    return call.x.numel() // call.x.shape[-1] if "x" in roles and call.x.shape[-1] else 1


def _kept(call: Call, batch: int) -> int:
    if "image" in ROLES[call.op]:
        pixels = max(1, call.x.shape[-2] * call.x.shape[-1])
        return min(batch, max(2, -(-PIXELS // pixels)))
    return min(batch, ROWS + batch % 128)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).partition(".")[2]


def _tensor(role: str, tensor: Tensor, kept: int, of_rows: tuple[int, int]) -> dict[str, Any]:
    if role in ("x", "indices"):
        tensor = _flat(tensor, 2 if role == "x" else 1)
    if role in ("x", "indices", "image"):
        tensor = tensor[:kept]
    elif role in ("bias", "dense"):
        tensor = tensor[: of_rows[1]]
    described = _described(role, tensor)
    if isinstance(tensor, StoredValues):
        parts = {name: _described(name, part) for name, part in tensor.parts().items()}
        described |= {"activations": tensor.activations, "parts": parts}
    return described


def _described(role: str, tensor: Tensor) -> dict[str, Any]:
    return {
        "role": role,
        "shape": [*tensor.shape],
        "stride": [*tensor.stride()],
        "dtype": _name(tensor.dtype),
        "misses": misses(tensor),
    }


def _flat(tensor: Tensor, dims: int) -> Tensor:
    """``[..., K]`` as ``[rows, K]``, or any shape as one dimension; without a copy if possible.

    Only shape, strides and address count, so what would be copied is taken as contiguous.
    """
    last = tensor.shape[-1:] if dims == 2 else torch.Size()
    try:
        return tensor.view(-1, *last)
    except RuntimeError:
        rows = tensor.numel() // last.numel()
        return torch.empty((rows, *last), dtype=tensor.dtype, device="meta")


def misses(tensor: Tensor) -> int:
    """Bytes from the address below that is a multiple of ALIGNMENT; of a tensor that is only
    described from where its memory would begin."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):  # such as fake ones
        return int(tensor.storage_offset()) * tensor.itemsize % ALIGNMENT
    return tensor.data_ptr() % ALIGNMENT


def _cut_columns(op: str, operands: list[Any], of_rows: tuple[int, int]) -> None:
    """dy has a column for each row of the weight."""
    rows, kept = of_rows
    if rows == kept or op == "linear":
        return
    dy = operands[0]
    dy["shape"] = [dy["shape"][0], kept]
    if dy["stride"][0] >= rows:
        dy["stride"] = [dy["stride"][0] - rows + kept, dy["stride"][1]]


def _kind(role: str, shape: Sequence[int]) -> list[int]:
    """Of sizes that change from call to call what may decide which code runs."""
    if role == "image":
        pixels = shape[2] * shape[3]
        return [len(shape), shape[1], pixels.bit_length(), shape[3] % 16]
    return [len(shape), *shape[1:]] if role in ("x", "indices") else [*shape]


def _lie(stride: Sequence[int]) -> list[list[int]]:
    """What of strides decides which code runs: which dimension is innermost, and so on; and the
    power of two, up to 16, that each is a multiple of: by it vectors are read, or not."""
    order = sorted(range(len(stride)), key=lambda d: (stride[d], d))
    return [order, [min(step & -step, 16) for step in stride]]
