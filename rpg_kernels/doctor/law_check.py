"""The packing laws against a few of their golden values, in every implementation of this machine.

The values are copied from the committed golden vectors, which are not installed; a test compares.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels.law.ring import LayerLaw
from rpg_kernels.law.unit import UnitLaw

Evaluate = Callable[[LayerLaw, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Golden:
    """Some positions of one layer: (row, block, slot, sign words)."""

    name: str
    law: LayerLaw
    points: tuple[tuple[int, int, int, tuple[int, ...]], ...]


GOLDEN = (
    Golden(
        "prime, 7",
        LayerLaw(0, 0, 7, 1, 32, 3, 1, "element", permute=True),
        (
            (0, 0, 2, (2910391427,)),
            (6, 0, 1, (891049592,)),
            (4, 0, 0, (1954260296,)),
        ),
    ),
    Golden(
        "12 x 12",
        LayerLaw(2, 0, 12, 12, 64, 50, 7, "vector", permute=True),
        (
            (0, 0, 4, (3296142432,)),
            (11, 11, 0, (3210444696,)),
            (2, 9, 46, (1121256384,)),
        ),
    ),
    Golden(
        "10 rounds",
        LayerLaw(2, 6, 37, 13, 64, 100, 99, "element", permute=True),
        (
            (0, 0, 33, (4112624789, 2498476704)),
            (36, 12, 61, (3146327543, 621282383)),
            (4, 1, 54, (2977840979, 3249100513)),
        ),
    ),
    Golden(
        "bands",
        LayerLaw(6, 1, 8589934592, 3, 64, 31250, 17, "element", permute=True),
        (
            (8589934591, 2, 21189, (4038043218, 1243943898)),
            (536870911, 2, 9325, (915911369, 2727054878)),
            (536870912, 0, 9887, (762857685, 2902182234)),
            (3868562477, 1, 14138, (678807246, 4253541036)),
        ),
    ),
    Golden(
        "worked example",
        UnitLaw(2, 1, 100, 20, 64, 704, 448, "vector", True, 2, 64, 1, 1),
        (
            (0, 0, 588, (0,)),
            (99, 19, 1, (2817630912,)),
            (29, 10, 413, (2309226496,)),
        ),
    ),
    Golden(
        "worked example, convolution",
        UnitLaw(3, 6, 60, 18, 64, 100, 40, "element", True, 4, 16, 9, 3),
        (
            (0, 0, 25, (318384597, 4173578661)),
            (59, 17, 77, (3209637583, 284756181)),
            (32, 17, 72, (1952447779, 4196219464)),
        ),
    ),
    Golden(
        "units that share octets",
        UnitLaw(3, 7, 1016, 12, 64, 704, 42, "element", True, 7, 64, 1, 1),
        (
            (0, 0, 223, (4287721815, 3105415976)),
            (1015, 11, 680, (3532773740, 3039126462)),
            (512, 11, 654, (3212047201, 260556677)),
        ),
    ),
    Golden(
        "blocks of 8, slots of 64",
        UnitLaw(11, 0, 40, 137, 8, 5632, 162, "element", True, 3, 256, 1, 1),
        (
            (0, 0, 801, (1398507707,)),
            (39, 136, 1232, (1952503631,)),
            (35, 30, 2033, (3760418888,)),
        ),
    ),
    Golden(
        "start below 2^62",
        UnitLaw(6, 8, 5000, 9, 2, 704, 2**58 - 64, "element", True, 4, None, 1, 1),
        (
            (0, 0, 213, (97882909,)),
            (4999, 8, 523, (1206257023,)),
            (4000, 0, 527, (2805801330,)),
        ),
    ),
    Golden(
        "bands that cut octets",
        UnitLaw(6, 1, 8589934592, 3, 64, 31250, 63, "vector", True, 7, None, 3, 3),
        (
            (0, 0, 14453, (2147483648,)),
            (8589934591, 2, 24975, (3061543302,)),
            (152, 0, 14525, (620756992,)),
        ),
    ),
)


def implementations(devices: list[torch.device]) -> list[tuple[str, torch.device, Evaluate]]:
    """(name, device, how to evaluate slots and sign words) of what can run here."""
    found: list[tuple[str, torch.device, Evaluate]] = []
    compiled = native.available()
    cuda = compiled and _has_cuda_kernels()
    for device in devices:
        found.append(("law in PyTorch", device, _in_pytorch))
        if device.type == "cpu" and compiled:
            found.append(("law in C++", device, _in_cpp))
        if device.type == "cuda" and cuda:
            found.append(("law in CUDA", device, _in_cuda))
    return found


def _has_cuda_kernels() -> bool:
    try:
        return bool(native.build_info().get("cuda"))
    except Exception:
        return False  # what is wrong is said where the build is examined


def difference(evaluate: Evaluate, device: torch.device) -> str:
    """Where an implementation differs from the golden values; "" where it does not."""
    for golden in GOLDEN:
        n, b = (torch.tensor([point[i] for point in golden.points], device=device) for i in (0, 1))
        slots, words = evaluate(golden.law, n, b)
        for what, got, wanted in (
            ("slots", slots.tolist(), [slot for _, _, slot, _ in golden.points]),
            ("sign words", words.tolist(), [list(word) for *_, word in golden.points]),
        ):
            if got != wanted:
                return f"{what} of layer {golden.name!r}: got {got}, wanted {wanted}"
    return ""


def _in_pytorch(law: LayerLaw, n: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return law.slot(n, b), law.sign_words(n, b)


def _in_cpp(law: LayerLaw, n: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return native.slots(law, n, b), native.sign_words(law, n, b)


def _in_cuda(law: LayerLaw, n: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    module = importlib.import_module("rpg_kernels.native._native")
    slots = torch.full_like(n, -1)
    words = n.new_full((len(n), 1 if law.reflect == "vector" else law.words), -1)
    with torch.cuda.device(n.device):
        stream = torch.cuda.current_stream().cuda_stream
        for i, row in enumerate(n.tolist()):  # one by one: a launch takes positions of one band
            band = row // law.rows_per_band
            addresses = (n[i:].data_ptr(), b[i:].data_ptr())
            results = (slots[i:].data_ptr(), words[i:].data_ptr())
            module.cuda.law(native.layer_law(law), band, *addresses, 1, *results, stream)
    return slots, words
