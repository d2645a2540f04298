"""The networks of the paper, dense or shared."""

from rpg_kernels.models.resnet import ResNet, kaiming_fan_out, resnet18, resnet34

__all__ = ["ResNet", "kaiming_fan_out", "resnet18", "resnet34"]
