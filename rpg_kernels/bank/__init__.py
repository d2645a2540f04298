"""The parameter bank and the virtual weights that read it: data, without anything that computes."""

from rpg_kernels.bank.config import Group, RPGConfig
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight

__all__ = ["Group", "ParameterBank", "RPGConfig", "VirtualWeight"]
