"""The networks of the paper, dense or shared."""

from rpg_kernels.models.resnet import ResNet, resnet18, resnet34

__all__ = ["ResNet", "resnet18", "resnet34"]
