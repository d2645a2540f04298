"""Reading what other implementations wrote."""

from rpg_kernels.interop import numpy_files, official, official_resnet

__all__ = ["numpy_files", "official", "official_resnet"]
