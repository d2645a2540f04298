"""Suites: which cases are measured together, in which order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from benchmarks.harness.cases import DOFS, GRANULARITIES, Case, select
from rpg_kernels import _checks
from rpg_kernels.law.ring import REFLECT

# Each for a reason: weight-bound and work-bound convolutions, small and large products, the
# paper's own setting (45K, element-wise), every DoF, granularity and reflect mode, the embedding.
_QUICK = (
    ("resnet18.layer4.conv3x3/1", 2_000_000, 64, "vector"),
    ("resnet18.layer4.conv3x3/1", 45_000, 1, "element"),
    ("resnet18.layer3.conv3x3/32", 2_000_000, 64, "vector"),
    ("vit-b.fc1/16", 2_000_000, 16, "element"),
    ("bert-base.output/256", 20_000_000, 64, "none"),
    ("llama-3-8b.q_proj/1", 2_000_000, 64, "vector"),
    ("llama-3-8b.q_proj/64", 2_000_000, 64, "vector"),
    ("llama-3-8b.embed_tokens/256", 2_000_000, 64, "vector"),
)
# Of the full suite, these see every setting one at a time; the others see the default.
_SWEPT = ("resnet18.layer3.conv3x3/32", "vit-b.fc1/256", "llama-3-8b.q_proj/1")
_WINDOWS, _RING = (256, 4), (None, None)
# What a GPU is asked first, the most telling first: windows, which the compiled kernels are made
# for, at batches up to 256, then whole rings, convolutions, the embedding and a larger layer.
_GPU = (
    *((f"llama-3-8b.q_proj/{batch}", _WINDOWS) for batch in (1, 16, 64, 256)),
    ("llama-3-8b.q_proj/1", _RING),
    ("resnet18.layer3.conv3x3/32", _WINDOWS),
    ("llama-3-8b.embed_tokens/256", _WINDOWS),
    ("llama-3-8b.gate_proj/1", _WINDOWS),
    ("llama-3-8b.q_proj/16", _RING),
    ("resnet18.layer4.conv3x3/1", _WINDOWS),
    ("llama-3-8b.gate_proj/16", _WINDOWS),
    ("resnet18.layer3.conv3x3/32", _RING),
)
# Where there is more time, with the quick suite behind them.
_GPU_LONGER = (
    ("llama-3-8b.q_proj/4096", _WINDOWS),
    ("resnet18.layer2.conv3x3/256", _WINDOWS),
    ("llama-3-8b.down_proj/1", _WINDOWS),
    ("vit-b.fc1/256", _WINDOWS),
    ("llama-3-8b.q_proj/256", _RING),
    ("llama-3-8b.gate_proj/64", _WINDOWS),
    ("llama-3-8b.k_proj/1", _WINDOWS),
    ("resnet18.layer1.conv3x3/32", _WINDOWS),
    ("resnet18.layer4.conv3x3/32", _WINDOWS),
    ("vit-b.qkv/4096", _WINDOWS),
)
SUITES = ("quick", "full", "gpu", "gpu-longer")


def suite(name: str, dtype: str) -> list[Case]:
    """The cases of a suite.

    Raises:
        ValueError: unknown suite or dtype.

    Example:
        >>> suite("gpu", "bf16")[0].setting
        '2M g64 vector bf16 w256x4'
    """
    _checks.choice("suite", name, SUITES)
    if name == "gpu":
        return list(_of_windows(_GPU, dtype))
    if name == "gpu-longer":
        return list(dict.fromkeys([*_of_windows(_GPU_LONGER, dtype), *suite("quick", dtype)]))
    if name == "quick":
        return [
            replace(
                select([case], dtype=dtype)[0], dof=dof, granularity=granularity, reflect=reflect
            )
            for case, dof, granularity, reflect in _QUICK
        ]
    cases = select([], dtype=dtype)
    for case in select(_SWEPT, dtype=dtype):
        cases += [replace(case, dof=dof) for dof in DOFS]
        cases += [replace(case, granularity=g) for g in GRANULARITIES]
        cases += [replace(case, reflect=mode) for mode in REFLECT]
    return list(dict.fromkeys(cases))


def _of_windows(
    named: Iterable[tuple[str, tuple[int | None, int | None]]], dtype: str
) -> Iterable[Case]:
    for name, (window, laps) in named:
        (case,) = select([name], dtype=dtype)
        yield replace(case, window=window, laps=laps)
