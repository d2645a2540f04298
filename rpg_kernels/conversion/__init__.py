"""Whole models: conversion to virtual weights and back, summary, ownership of the bank."""

from rpg_kernels.conversion.convert import convert
from rpg_kernels.conversion.freezing import freeze, unfreeze
from rpg_kernels.conversion.materialize import materialize
from rpg_kernels.conversion.ownership import attach, initialize, param_groups
from rpg_kernels.conversion.reuse import Reused, reuse
from rpg_kernels.conversion.storing import compact, dequantize, expand, quantize
from rpg_kernels.conversion.summary import summary

__all__ = [
    "Reused",
    "attach",
    "compact",
    "convert",
    "dequantize",
    "expand",
    "freeze",
    "initialize",
    "materialize",
    "param_groups",
    "quantize",
    "reuse",
    "summary",
    "unfreeze",
]
