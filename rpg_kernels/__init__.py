"""rpg-kernels: networks whose weights are generated instead of stored.

Ŵ = scale · G · w: every weight of every layer is read from one small parameter bank w by a
generating matrix G that permutes, reflects and samples it evenly (Wang et al., "Compact and
Optimal Deep Learning with Recurrent Parameter Generators", WACV 2023).
"""

from rpg_kernels import flops, functional, nn
from rpg_kernels._version import __version__
from rpg_kernels.backends.dispatch import backend
from rpg_kernels.bank.config import Group, RPGConfig
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.checkpoint import load, save
from rpg_kernels.conversion import (
    attach,
    compact,
    convert,
    dequantize,
    expand,
    freeze,
    initialize,
    materialize,
    param_groups,
    quantize,
    reuse,
    summary,
    unfreeze,
)
from rpg_kernels.explanation import explain
from rpg_kernels.law.generator import Generator, TableGenerator
from rpg_kernels.proof import prove
from rpg_kernels.pruning import finish_pruning, prune, rewind
from rpg_kernels.settings import scratch_limit

__all__ = [
    "Generator",
    "Group",
    "ParameterBank",
    "RPGConfig",
    "TableGenerator",
    "VirtualWeight",
    "__version__",
    "attach",
    "backend",
    "compact",
    "convert",
    "dequantize",
    "expand",
    "explain",
    "finish_pruning",
    "flops",
    "freeze",
    "functional",
    "initialize",
    "load",
    "materialize",
    "nn",
    "param_groups",
    "prove",
    "prune",
    "quantize",
    "reuse",
    "rewind",
    "save",
    "scratch_limit",
    "summary",
    "unfreeze",
]
