"""The checkpoint format written down once more, to read and to forge files with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rpg_kernels as rpg

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
DTYPES |= {"I8": 1, "F8_E4M3": 1}


class Net(nn.Module):
    """Shared and dense layers, a tie, buffers, a layout of its own, a scalar, nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.mix = nn.Linear(16, 16)
        self.embed = nn.Embedding(5, 16)
        self.head = nn.Linear(16, 5)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.conv(self.norm(self.stem(x)).relu()).mean((2, 3))
        return self.gain * self.head(self.mix(x + self.embed(labels)).tanh())


def build(number: int = 0, seed: int = 0, device: str = "cpu", **config: Any) -> Net:
    torch.manual_seed(number)
    with torch.device(device):
        model = Net()
        keep = {"stem", "embed", "head"}
        options = {"dof": 256, "granularity": 8, "seed": seed, **config}
        rpg.convert(model, rpg.RPGConfig(**options), filter_fn=lambda m, name: name not in keep)
    return model.eval()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 6, 6, generator=generator).to(dtype), torch.tensor([1, 4, 0])


def values(model: nn.Module) -> dict[str, bytes]:
    """Every bit of a model's state, and the addresses of its parameters."""
    state = {
        key: bytes(value.detach().contiguous().flatten().view(torch.uint8).tolist())
        if value.numel()
        else b""
        for key, value in model.state_dict().items()
    }
    return {**state, "where": str([p.data_ptr() for p in model.parameters()]).encode()}


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data)."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def join(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def digest(header: dict[str, Any], data: bytes) -> str:
    """sha256 over the metadata but itself, then dtype, shape and bytes of each tensor."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "rpg_sha256"}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            assert end - begin == math.prod(entry["shape"]) * DTYPES[entry["dtype"]]
            part = hashlib.sha256(data[begin:end]).hexdigest()
            tensors[name] = [entry["dtype"], entry["shape"], part]
    text = json.dumps([metadata, tensors], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def forge(path: Path, change: Callable[[dict[str, Any], bytearray], None]) -> None:
    """Change header and data of a file, its digest with them."""
    header, data = split(path.read_bytes())
    forged = bytearray(data)
    change(header, forged)
    header["__metadata__"]["rpg_sha256"] = digest(header, bytes(forged))
    path.write_bytes(join(header, bytes(forged)))
