"""The native module of the package: the packing law, unpack and pack in C++, without torch in it.

It may be absent: an install without a C++ compiler is pure Python. The reference uses it for CPU
tensors when it is there, with identical results; ``RPG_KERNELS_NATIVE=0`` leaves it aside.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg_kernels._stored import StoredValues
from rpg_kernels._tensors import DTYPES
from rpg_kernels._version import __version__
from rpg_kernels.law.ring import LayerLaw
from rpg_kernels.law.unit import UNIT_LAW, UnitLaw
from rpg_kernels.native.elf import cut_short

ENVIRONMENT_NATIVE = "RPG_KERNELS_NATIVE"
ENVIRONMENT_ISA = "RPG_KERNELS_ISA"
BUILD_RECORD = "_native_build.json"  # written by setup.py beside this file

_MODULE = "rpg_kernels.native._native"
_REFLECT = {"none": 0, "vector": 1, "element": 2}
_WORKSPACE_POSITIONS = 1 << 13
CODES = (*DTYPES, torch.int8)  # dtypes of banks, in the order of their numbers in C++
_NO_BANK = (0, DTYPES.index(torch.float32), 0, 0, 0, 0, 0)
_enabled = os.environ.get(ENVIRONMENT_NATIVE, "1") != "0"
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Threads for a call: torch's number; in a forked child one.

    The threads that OpenMP keeps for the next call stay with the parent, and GNU's would be waited
    for without end. A child that is spawned has its own.

    Example:
        >>> threads() == torch.get_num_threads()
        True
    """
    return 1 if _forked else torch.get_num_threads()


@lru_cache(maxsize=1)
def _load() -> tuple[Any, str]:
    """(the module, "") or (None, why there is none)."""
    try:
        found = importlib.util.find_spec(_MODULE)
        missing = cut_short(Path(found.origin)) if found and found.origin else ""
        if missing:
            return None, f"the native module cannot be loaded: {missing}; install again"
        module: Any = importlib.import_module(_MODULE)
        built = module.build_info()  # raises when this processor cannot run it
    except ModuleNotFoundError:
        return None, _build_record().get("reason") or "the native module was not built"
    except (ImportError, RuntimeError) as error:
        if os.environ.get(ENVIRONMENT_ISA) and isinstance(error, RuntimeError):
            raise
        return None, f"the native module cannot be loaded: {error}"
    if built.get("version") != __version__ or built["law"] != UNIT_LAW:
        of = f"version {built.get('version')}, law {built['law']}"
        wanted = f"version {__version__}, law {UNIT_LAW}; install again"
        return None, f"the native module cannot be loaded: got {of}, wanted {wanted}"
    return module, ""


def broken() -> str:
    """What is wrong with a native module that is there and cannot be used; "" otherwise."""
    module, reason = _load()
    return reason if module is None and "cannot be loaded" in reason else ""


def _build_record() -> dict[str, str]:
    """What setup.py wrote down of the build: what was compiled, or why nothing was."""
    try:
        record = json.loads((Path(__file__).parent / BUILD_RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def available() -> bool:
    """True when the native module is there and in use."""
    return _enabled and _load()[0] is not None


def module() -> Any:
    """The native module; ask ``available`` before."""
    return _load()[0]


def why_not() -> str:
    """Why the native module is not in use; "" when it is."""
    return _load()[1] if _enabled else f"{ENVIRONMENT_NATIVE}=0 is set"


def build_info() -> dict[str, Any]:
    """What was compiled: compiler, instruction sets, CUDA version and architectures.

    Example:
        >>> "reason" in build_info() or build_info()["law"] == 3
        True
    """
    module, reason = _load()
    info = {"reason": reason} if module is None else dict(module.build_info())
    note = _build_record().get("note")
    return {**info, "note": note} if note else info


def multiplies_pairs() -> bool:
    """Whether this processor has an instruction for pairs of bfloat16, and the module uses it.

    Example:
        >>> multiplies_pairs() in (True, False)
        True
    """
    return available() and _has_pairs()


@cache
def _has_pairs() -> bool:
    return bool(module().build_info()["pairs"])


@cache
def int8_products() -> int:
    """The fastest way of this processor to multiply int8 that the module uses: 0 for what every
    processor has, 1 for AVX512-VNNI, 2 for AMX. It has those before it, too.

    Example:
        >>> int8_products() in (0, 1, 2)
        True
    """
    return int(module().build_info()["int8_products"]) if available() else 0


def covers(architectures: list[str], capability: str) -> bool | None:
    """Whether code for some of CMAKE_CUDA_ARCHITECTURES runs on a GPU; None cannot be told.

    Machine code runs on later minor versions of its major version, PTX on everything later; of
    an architecture with the suffix ``a`` both run on nothing else.

    Example:
        >>> covers(["80-real", "90a-real"], "9.0"), covers(["80-real", "90a-real"], "12.0")
        (True, False)
        >>> covers(["80-real"], "8.6"), covers(["80"], "12.0"), covers(["native"], "9.0")
        (True, True, None)
    """
    major, _, minor = capability.partition(".")
    gpu = (int(major), int(minor))
    unknown = False
    for architecture in architectures:
        found = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", architecture)
        if found is None:
            unknown = True
            continue
        number, suffix, kind = found.groups()
        own = divmod(int(number), 10)
        same_major = own[0] == gpu[0] and own <= gpu
        by_ptx = suffix == "" and kind != "-real" and own <= gpu
        by_code = own == gpu if suffix == "a" else same_major and kind != "-virtual"
        if by_code or by_ptx:
            return True
    return None if unknown else False


def handles(*tensors: Tensor) -> bool:
    """True when the native module is in use and can work on these tensors."""
    return available() and all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.dtype in DTYPES
        and t.is_contiguous()
        for t in tensors
    )


def reads(bank: Tensor) -> bool:
    """True when the native module is in use and can read a bank, or values that are stored."""
    if not isinstance(bank, StoredValues):
        return handles(bank)
    return (
        available()
        and all(
            type(part) is Tensor and part.device.type == "cpu" and part.is_contiguous()
            for part in bank.parts().values()
        )
        and bank.codes.dtype in CODES
    )


def stream(words: Tensor, *, write: bool, passes: int) -> None:
    """Read memory ``passes`` times, or read and write it: what bandwidth is measured with.

    Args:
        words: int64 ``[threads, count]``, contiguous, count a multiple of 32; each row is the
            part of a thread of its own.
        write: also change every word.
        passes: over every part.
    """
    threads, count = words.shape
    _load()[0].bandwidth(words.data_ptr(), count, write, passes, threads)


@lru_cache(maxsize=4096)
def layer_law(law: LayerLaw) -> Any:
    """The compiled counterpart of a layer's law; its methods take addresses."""
    given: dict[str, int]
    if isinstance(law, UnitLaw):
        given = {
            "laps": law.laps,
            "address": law.start,
            "taps": law.taps,
            "run_blocks": law.blocks // law.runs,
            "groups": law.groups(0),
            "last_groups": law.groups((law.rows - 1) // law.rows_per_band),
        }
    else:
        given = {"start": law.start}
    return _load()[0].LayerLaw(
        seed=law.seed,
        layer=law.layer,
        rows=law.rows,
        blocks=law.blocks,
        granularity=law.granularity,
        slots=law.slots,
        reflect=_REFLECT[law.reflect],
        permute=law.permute,
        **given,
    )


def slots(law: LayerLaw, n: Tensor, b: Tensor) -> Tensor:
    """LayerLaw.slot in C++: int64 slots of rows n and blocks b, broadcast against each other."""
    n, b, out = _lists(n, b)
    layer_law(law).slots(n.data_ptr(), b.data_ptr(), n.numel(), out.data_ptr(), threads())
    return out


def selection(
    rows: Sequence[int] | None, columns: Sequence[int] | None, shape: tuple[int, int]
) -> Any:
    """Chosen rows and columns of a weight ``[rows, columns]``, as the CPU kernels take them.

    Args:
        rows, columns: ascending numbers; None for all of them.
        shape: of the weight, taps not counted.

    Raises:
        ValueError: none, not ascending, or beyond the shape.
    """
    return _load()[0].Selection(rows, columns, shape)


def sign_words(law: LayerLaw, n: Tensor, b: Tensor) -> Tensor:
    """LayerLaw.sign_words in C++: broadcast shape + [words], int64."""
    n, b, _ = _lists(n, b)
    out = n.new_empty((*n.shape, 1 if law.reflect == "vector" else law.words))
    layer_law(law).sign_words(n.data_ptr(), b.data_ptr(), n.numel(), out.data_ptr(), threads())
    return out


def permutation(law: LayerLaw, band: int, q: Tensor, *, inverse: bool) -> Tensor:
    """Permutation.forward or .inverse of one row band in C++; in law 3 that of its columns."""
    q = q.contiguous()
    out = torch.empty_like(q)
    layer_law(law).permutation(band, inverse, q.data_ptr(), q.numel(), out.data_ptr(), threads())
    return out


def _lists(n: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, b = (t.contiguous() for t in torch.broadcast_tensors(n, b))
    return n, b, torch.empty_like(n)


@cache
def dtype_code(dtype: torch.dtype) -> int:
    """The number of a dtype in C++."""
    return CODES.index(dtype)


def given_bank(values: Tensor | None) -> tuple[int, ...]:
    """A bank as C++ takes it, which the caller keeps: address, dtype, addresses of scales and
    places, rows, slots, granularity. Those of sizes are read only where values are stored otherwise
    than plainly. None is no bank.

    Args:
        values: ``[slots, granularity]``, contiguous, or ``StoredValues``.
    """
    if values is None:
        return _NO_BANK
    if not isinstance(values, StoredValues):
        return (values.data_ptr(), dtype_code(values.dtype), 0, 0, 0, 0, 0)
    codes, scales, places = values.codes, values.scales, values.places
    return (
        codes.data_ptr(),
        dtype_code(codes.dtype),
        0 if scales is None else scales.data_ptr(),
        0 if places is None else places.data_ptr(),
        len(codes),
        len(values),
        codes.shape[1],
    )


def unpack(
    law: LayerLaw,
    bank: Tensor,
    out: Tensor,
    scale: float,
    region: tuple[int, ...],
    lookup: Tensor | None,
    cut: tuple[int, int] | None = None,
) -> None:
    """out = scale · G · bank for some positions of a layer.

    Args:
        law: of the layer.
        bank: ``[slots, granularity]``, contiguous, or ``StoredValues``, of which each value is
            rounded to out's dtype before it is multiplied.
        out: ``[positions, block]``, contiguous, of the bank's dtype; with a cut
            ``[rows * runs, length]``.
        scale: the layer's multiplier.
        region: (first row, rows, runs, blocks of a run, first block, blocks) of the positions.
        lookup: int64 ``[rows]``: row numbers from the first row; None for all in order.
        cut: (first, length): elements ``first`` to ``first + length`` of a run's blocks are in
            memory, the rest of its first and last block is not; None for whole blocks.
    """
    lookup = None if lookup is None else lookup.contiguous()
    layer_law(law).unpack(
        given_bank(bank),
        out.data_ptr(),
        dtype_code(out.dtype),
        scale,
        *region[:2],
        0 if lookup is None else lookup.data_ptr(),
        *region[2:],
        *(cut or (0, region[5] * law.granularity)),
        threads(),
    )


def pack(
    law: LayerLaw,
    dense: Tensor,
    grad: Tensor,
    scale: float,
    region: tuple[int, ...],
    lookup: Tensor | None,
    scratch: int,
    cut: tuple[int, int] | None = None,
) -> None:
    """grad += scale · Gᵀ · dense for some positions of a layer, in their order.

    Args:
        law, scale, region, lookup, cut: as for unpack.
        dense: ``[positions, block]``, contiguous; with a cut ``[rows * runs, length]``.
        grad: ``[slots, block]``, contiguous; float64 when dense is, otherwise float32.
        scratch: bytes that several threads may use to share out the slots.
    """
    count = threads()
    per_position = 2 if law.reflect != "element" else 1 + law.words
    positions = min(
        _WORKSPACE_POSITIONS, region[1] * region[2] * region[5], scratch // 4 // per_position
    )
    workspace = torch.empty(per_position * positions if count > 1 else 0, dtype=torch.int32)
    lookup = None if lookup is None else lookup.contiguous()
    layer_law(law).pack(
        dense.data_ptr(),
        grad.data_ptr(),
        dtype_code(dense.dtype),
        scale,
        *region[:2],
        0 if lookup is None else lookup.data_ptr(),
        *region[2:],
        *(cut or (0, region[5] * law.granularity)),
        count,
        workspace.data_ptr(),
        workspace.numel(),
    )
