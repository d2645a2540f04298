"""What torch's operations do with the channels of their tensors, as far as pruning knows it."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Each element by itself: channels go through as they are.
ELEMENTWISE_MODULES = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Softsign,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Dropout,
)
# Each channel by itself, which is dimension 1.
BY_CHANNEL_MODULES = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Upsample,
    nn.ZeroPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
)
ELEMENTWISE: set[Any] = {
    F.relu,
    F.relu_,
    F.relu6,
    F.leaky_relu,
    F.gelu,
    F.silu,
    F.mish,
    F.elu,
    F.selu,
    F.sigmoid,
    F.tanh,
    F.softplus,
    F.hardtanh,
    F.hardswish,
    F.hardsigmoid,
    F.dropout,
    torch.relu,
    torch.relu_,
    torch.sigmoid,
    torch.tanh,
    torch.neg,
    operator.neg,
    "relu",
    "relu_",
    "sigmoid",
    "sigmoid_",
    "tanh",
    "tanh_",
    "contiguous",
    "clone",
    "detach",
    "float",
    "double",
    "half",
    "bfloat16",
}
BY_CHANNEL: set[Any] = {
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d,
    F.adaptive_max_pool2d,
    F.adaptive_max_pool3d,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.interpolate,
}
# Two tensors, element by element: their channels are bound.
PAIRWISE: set[Any] = {
    operator.add,
    operator.iadd,
    operator.sub,
    operator.isub,
    operator.mul,
    operator.imul,
    operator.truediv,
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.maximum,
    torch.minimum,
    "add",
    "add_",
    "sub",
    "sub_",
    "mul",
    "mul_",
    "div",
    "div_",
}
MEANS: set[Any] = {torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"}
FLATTENS: set[Any] = {torch.flatten, "flatten"}
VIEWS: set[Any] = {torch.reshape, "view", "reshape"}
JOINS: set[Any] = {torch.cat, torch.concat, torch.concatenate}
SIZES: set[Any] = {"size"}
