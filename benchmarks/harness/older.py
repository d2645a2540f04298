"""Tables of the result files that older scripts write, each in a format of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness.table import NOT_MEASURED, markdown


def cifar10_resnet18(results: Path) -> list[str]:
    """What ``make demo`` measured on CIFAR-10."""
    record = _load(results / "cifar10_resnet18.json")
    if record is None:
        return [NOT_MEASURED]
    # When the first network of ours is through with its training.
    budget = min(n["seconds"] for n in record["networks"] if n["kind"] == "rpg")
    rows = []
    for network in record["networks"]:
        bold = "**" if network["kind"] == "rpg" else ""
        label = {"as published": "RPG as published (tables, materialised)"}.get(
            network["label"], network["label"]
        )
        rows.append(
            (
                f"{bold}{label}{bold}",
                f"{network['dof']:,}",
                f"{bold}{network['state_bytes'] / 1e6:.1f} MB{bold}",
                f"{network['saved_bytes_beyond_activations'] / 1e6:.2f} MB",
                f"{bold}{network['images_per_second']:.0f}{bold}",
                f"{network['seconds']:.0f} s",
                _after(network, len(network["curves"][0]) * budget / network["seconds"]),
                f"{bold}{_after(network, len(network['curves'][0]))}{bold}",
            )
        )
    head = (
        "ResNet-18 on CIFAR-10",
        "degrees of freedom",
        "weights + gradients + optimiser",
        "saved for backward beyond activations",
        "images/s",
        "training",
        f"test accuracy after {budget:.0f} s",
        "at the end",
    )
    return markdown(head, rows)


def _after(network: dict[str, Any], epochs: float) -> str:
    """The mean test accuracy after the last epoch that is whole by then."""
    whole = min(int(epochs + 1e-9), len(network["curves"][0]))
    if not whole:
        return "no epoch yet"
    return f"{sum(curve[whole - 1] for curve in network['curves']) / len(network['curves']):.1f} %"


def bank_training(results: Path) -> list[str]:
    """What ``benchmarks/bank_training.py`` measured: mean and half the range over seeds."""
    record = _load(results / "bank_training_digits.json")
    if record is None:
        return [NOT_MEASURED]
    rows = [
        (name, f"{sum(values) / len(values):.1f} ± {(max(values) - min(values)) / 2:.1f}")
        for name, values in record["accuracy"].items()
    ]
    return markdown(("setting of the bank", "accuracy"), rows)


def law(results: Path) -> list[str]:
    """What ``benchmarks/law.py`` measured, in millions per second."""
    record = _load(results / "law.json")
    if record is None:
        return [NOT_MEASURED]
    rows = [
        (
            f"{row['rows']} x {row['blocks']}",
            row["rounds"],
            str(row["threads"]),
            *(
                f"{row[key] / 1e6:.1f}"
                for key in ("forward_per_s", "inverse_per_s", "slots_and_signs_per_s")
            ),
        )
        for row in record["rows"]
    ]
    head = ("rows x blocks", "permutation", "threads", "forward", "inverse", "slots and signs")
    return markdown(head, rows)


TABLES = {
    "cifar10-resnet18": cifar10_resnet18,
    "bank-training": bank_training,
    "law": law,
}


def _load(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
