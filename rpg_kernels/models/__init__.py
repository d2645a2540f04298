"""The networks of the paper, and a small decoder, dense or shared."""

from rpg_kernels.models.decoder import Cache, Decoder, DecoderConfig
from rpg_kernels.models.resnet import ResNet, blocks, kaiming_fan_out, resnet18, resnet34

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "ResNet",
    "blocks",
    "kaiming_fan_out",
    "resnet18",
    "resnet34",
]
