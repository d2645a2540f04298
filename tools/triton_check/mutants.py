"""Faults planted into copies of the kernels. Where one is not seen, the check itself is blind.

Each is looked for by one test that passes without it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path("rpg_kernels/backends/triton")
# What a run of cases needs of a checkout, and what of that it does not.
_NEEDED = ("rpg_kernels", "tests", "tools", "conftest.py", "pyproject.toml")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "_native.*", "golden")

# What the message of a fault says.
_BOUNDS = r"past the end of the tensor|before the start of the tensor"
_RACE = "Program instances run in any order|two lanes of one store wrote"
_ORDER = "its programs in reverse order leave other values"
_HINT = "a hint of"
_VALUE = "AssertionError"

_ADD = 'tl.atomic_add(grad_ptr + offsets, value, mask=mask, sem="relaxed")'
_STORE = (
    "tl.store(grad_ptr + offsets, tl.load(grad_ptr + offsets, mask=mask, other=0.0) + value, "
    "mask=mask)"
)


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        what: for people.
        file: of the kernels.
        before, after: text of the file, and what it becomes.
        cases: the file whose test looks for it.
        test: an expression of ``pytest -k``.
        seen: what the failure says, a regular expression.
        races: False leaves the search for races out, which would see it first.
    """

    what: str
    file: str
    before: str
    after: str
    cases: str
    test: str
    seen: str
    races: bool = True


MUTANTS = (
    Mutant(
        "a product is stored beyond the last row of the weight",
        "linear.py",
        "& (offs_n < N)[None, :]\n    tl.store(y_ptrs",
        "& (offs_n < N + 16)[None, :]\n    tl.store(y_ptrs",
        "linear.py",
        "test_bias_with_strides",
        f"{_BOUNDS}|{_RACE}",
    ),
    Mutant(
        "x is read beyond its last column",
        "linear.py",
        "x = tl.load(x_ptrs, mask=((k >= first) & (k < first + K))[None, :], other=0.0)",
        "x = tl.load(x_ptrs)",
        "linear.py",
        "test_bias_with_strides",
        _BOUNDS,
    ),
    Mutant(
        "an input gradient is added to memory that nobody wrote",
        "linear.py",
        "launch.row > 0,",
        "True,",
        "linear.py",
        "test_bias_with_strides",
        _VALUE,
    ),
    Mutant(
        "a linear layer's bank gradient without atomics",
        "weights.py",
        _ADD,
        _STORE,
        "linear.py",
        "test_bias_with_strides",
        _RACE,
    ),
    Mutant(
        "half a tile reads entries beyond the last block",
        "weights.py",
        "b = tl.minimum(b, low + last)",
        "b = tl.minimum(b, low + last + 1)",
        "linear.py",
        "test_bank_gradient_of_the_largest_tile and 128",
        _BOUNDS,
    ),
    Mutant(
        "an embedding's bank gradient without atomics",
        "embedding.py",
        _ADD,
        _STORE,
        "embedding.py",
        "test_tiles_of_every_size and 4",
        _RACE,
    ),
    Mutant(
        "two programs store the same tile",
        "linear_bank_grad.py",
        "rows = plan.cdiv(m, c.splits if scatter else 1)",
        "rows = plan.cdiv(m, 2)",
        "linear.py",
        "test_deterministic_bank_gradient and 16",
        _RACE,
    ),
    Mutant(
        "two programs store the same tile, and nobody looks for races",
        "linear_bank_grad.py",
        "rows = plan.cdiv(m, c.splits if scatter else 1)",
        "rows = plan.cdiv(m, 2)",
        "linear.py",
        "test_deterministic_bank_gradient and 16",
        _ORDER,
        races=False,
    ),
    Mutant(
        "addresses are said to be multiples of twice as much",
        "weights.py",
        "tl.multiple_of(slot * G, [G, G])",
        "tl.multiple_of(slot * G, [2 * G, 2 * G])",
        "linear.py",
        "test_strides and leading",
        _HINT,
    ),
    Mutant(
        "signs of 16-bit weights land one bit too low",
        "entries.py",
        "short = (mask >> 16)",
        "short = (mask >> 17)",
        "linear.py",
        "test_random and (6] or 9] or 12])",
        _VALUE,
    ),
    Mutant(
        "an index is read beyond the last",
        "embedding.py",
        "mask=i < M, other=-1",
        "mask=i < M + 1, other=-1",
        "embedding.py",
        "test_repeated_indices_add_up",
        _BOUNDS,
    ),
    Mutant(
        "entries are written beyond the last row",
        "entry_table.py",
        "mask=n < rows)",
        "mask=n < rows + 1)",
        "unit.py",
        "test_entries_in_scratch",
        f"{_BOUNDS}|{_RACE}",
    ),
    Mutant(
        "slots beyond the ring are summed",
        "sum_uses.py",
        "mask = tl.broadcast_to(mask_s[:, None], (BLOCK_S, G))",
        "mask = tl.broadcast_to((s <= slots.to(tl.int64))[:, None], (BLOCK_S, G))",
        "unit.py",
        "test_pack_of_a_ring_of_few_slots",
        _BOUNDS,
    ),
    Mutant(
        "the padding of rows to octets is summed",
        "sum_uses.py",
        "use = use & (n >= 0) & (n < rows)",
        "use = use & (n >= 0) & (n <= rows)",
        "unit.py",
        "test_pack_of_a_ring_of_few_slots",
        _BOUNDS,
    ),
    Mutant(
        "units of law 3 begin in other groups of rows than the definition's",
        "unit_law.py",
        "first = _sub_mod(first, _turned(column, law_ptr), octets)",
        "first = _sub_mod(first, _turned(column + 1, law_ptr), octets)",
        "unit.py",
        "test_whole_layers",
        _VALUE,
    ),
    Mutant(
        "a weight is unpacked beyond its last column",
        "unpack.py",
        "& (column < columns)",
        "& (column <= columns)",
        "unpack.py",
        "test_tiles_of_every_size_hold_the_same_bits",
        f"{_BOUNDS}|{_RACE}|{_VALUE}",
    ),
    Mutant(
        "a pixel below the image is read",
        "conv2d_input_grad.py",
        "_inside(top + th * reach_h, height)",
        "_inside(top + th * reach_h, height + 1)",
        "conv2d.py",
        "test_stems_and_many_taps",
        f"{_BOUNDS}|{_VALUE}",
    ),
)


def plant(mutant: Mutant, root: Path, copy: Path) -> None:
    """Make a copy of a checkout that has the fault.

    Raises:
        ValueError: the kernel does not have the text once, and the mutant is to be written anew.
    """
    file = KERNELS / mutant.file
    text = (root / file).read_text(encoding="utf-8")
    if text.count(mutant.before) != 1:
        raise ValueError(f"{file} has {text.count(mutant.before)} times: {mutant.before}")
    for name in _NEEDED:
        if (root / name).is_dir():
            shutil.copytree(root / name, copy / name, ignore=_LEFT_OUT)
        else:
            shutil.copy(root / name, copy / name)
    (copy / file).write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
