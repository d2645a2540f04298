"""What runs an operator: the back ends, in the order in which they are asked.

Each is a folder: ``rules.py`` says what it can run and when it is taken, and beside it is one file
for each operator that it has. This is the only place that names them.
"""

from rpg_kernels.backends import registry
from rpg_kernels.backends.cpu.rules import Cpu
from rpg_kernels.backends.cuda.rules import Cuda
from rpg_kernels.backends.reference.rules import Reference
from rpg_kernels.backends.triton.rules import Triton

for _backend in (Cuda("cuda"), Triton(), Cpu(), Cuda("simt"), Reference()):
    registry.register(_backend)
