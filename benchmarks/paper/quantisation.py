"""Banks in 8 bits: accuracy before and after, of networks trained with and without rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.paper import classification
from benchmarks.paper.classification import DENSE, RPG, Classification
from benchmarks.paper.experiment import Experiment, Metric, Record, Row
from examples.demo import train
from rpg_kernels import quantize
from rpg_kernels.bank.rounding import FORMS, round_slots
from rpg_kernels.conversion.storing import banks_in
from rpg_kernels.models.resnet import ResNet, is_block_convolution

FORM = {"int8": "int8", "fp8": "float8_e4m3fn"}  # by the names of columns


class Quantisation(Classification):
    """The classification's networks, tested with values as they were trained and in 8 bits.

    ``training`` in a row's settings is the form that values are rounded to in every step of the
    training. A vanilla network's convolutions are rounded with a scale for each out-channel.
    """

    def build(self, row: Row, seed: int) -> ResNet:
        model = super().build(row, seed)
        if "training" in row.settings:
            quantize(model, row.settings["training"], training=True)
        return model

    def run(self, row: Row, seed: int, on_step: Callable[[], object]) -> Record:
        model, record = self.train(row, seed, on_step)
        dense = row.settings["kind"] == DENSE
        if not dense:
            for bank in banks_in(model).values():
                bank.rounding = None
                record["bytes"] = bank.weight.numel() * bank.weight.element_size()
        accuracy = record["test_accuracy"] = self._accuracy(model)
        for name, form in FORM.items():
            rounded = copy.deepcopy(model)
            if dense:
                _round_convolutions(rounded, FORMS[form])
            else:
                quantize(rounded, form)
                stored = [bank.stored for bank in banks_in(rounded).values()]
                record["bytes_8_bits"] = sum(each.bytes for each in stored if each is not None)
            record[name] = self._accuracy(rounded)
            record[f"{name}_drop"] = accuracy - record[name]
        return record

    def _accuracy(self, model: nn.Module) -> float:
        return train.accuracy(model, self._pixels, self._schedule)


def _round_convolutions(model: nn.Module, dtype: torch.dtype) -> None:
    """The weights that RPG would share, to codes times the scale of their out-channel."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and is_block_convolution(module, name):
            rows = module.weight.detach().flatten(1)
            codes, scales = round_slots(rows, dtype)
            with torch.no_grad():
                module.weight.copy_((codes.float() * scales.unsqueeze(1)).view(module.weight.shape))


def task(size: str, data: str | None) -> Quantisation:
    """The images of one size; ``data`` as ``path`` of ``Classification``."""
    return Quantisation(classification.RECIPES[size], data)


def _row(
    depth: int,
    kind: str,
    dof: int | None,
    laps: int | None,
    label: str,
    training: str | None = None,
    paper: tuple[float, float] | None = None,
) -> Row:
    settings = {"depth": depth, "kind": kind, "dof": dof, "laps": laps, "training": training}
    given = {name: value for name, value in settings.items() if value is not None}
    numbers = {} if paper is None else dict(zip(("test_accuracy", "int8"), paper, strict=True))
    if paper is not None:
        numbers["int8_drop"] = round(paper[0] - paper[1], 1)
    return Row(f"ResNet-{depth}, {label}", given, numbers)


VANILLA = "ResNet-18, vanilla"
EXPERIMENT = Experiment(
    name="quantisation",
    title="Quantisation: banks in 8 bits",
    rows=(
        _row(18, DENSE, None, None, "vanilla", paper=(69.8, 69.5)),
        _row(18, RPG, classification.HALF[18], 2, "RPG 5.6M", paper=(70.2, 70.1)),
        _row(18, RPG, 2_000_000, 4, "RPG 2M"),
        _row(18, RPG, 45_000, 16, "RPG 45K"),
        _row(34, RPG, 2_000_000, 4, "RPG 2M"),
        _row(18, RPG, 2_000_000, 4, "RPG 2M, trained with int8", "int8"),
        _row(18, RPG, 2_000_000, 4, "RPG 2M, trained with fp8", "float8_e4m3fn"),
    ),
    metrics=(
        Metric("test_accuracy", "test accuracy, float (%)"),
        Metric("int8", "int8 (%)"),
        Metric("int8_drop", "drop, int8 (points)", digits=2, higher=False),
        Metric("fp8", "fp8 e4m3 (%)"),
        Metric("fp8_drop", "drop, fp8 (points)", digits=2, higher=False),
        Metric("bytes", "bank, float (bytes)", digits=0, higher=False),
        Metric("bytes_8_bits", "bank, 8 bits (bytes)", digits=0, higher=False),
    ),
    unshared=VANILLA,
    task=task,
    paper_data="ImageNet",
    text="""\
Networks, data and recipe of [classification](paper_classification.md). After training the bank is
rounded to 8 bits, symmetric, with one scale for each slot of 64 elements (`rpg.quantize`), and the
network is tested again; norms, biases, stem and classifier stay as they are, and activations are
bfloat16 throughout. The vanilla network's convolutions are rounded with one scale for each
out-channel. In the last two rows values are rounded in every step of the training
(`rpg.quantize(..., training=True)`, gradients pass straight through); the float column tests what
is behind the rounding. 5,000 test images: one of them is 0.02 points.
""",
)
