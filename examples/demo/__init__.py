"""The main job: train dense, published and shared networks on real images and compare them.

``python -m examples.demo`` runs it; this module holds its options.
"""

from __future__ import annotations

import argparse
import math

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``python -m examples.demo`` on ``parser``."""
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data",
        metavar="PATH",
        help="CIFAR-10: torchvision's cifar-10-batches-py folder, or an .npz of JPEGs "
        "(default: scikit-learn's handwritten digits)",
    )
    data.add_argument("--images", type=_positive, help="use the first IMAGES training images")
    data.add_argument("--test-images", type=_positive, help="use the first TEST_IMAGES test images")

    network = parser.add_argument_group("networks")
    network.add_argument(
        "--model",
        choices=("small", "resnet18"),
        help="default: small for the digits, resnet18 for CIFAR-10",
    )
    network.add_argument(
        "--stem",
        choices=("cifar", "imagenet"),
        default="cifar",
        help="cifar: 3x3, full resolution; imagenet: 7x7 and pooling, a quarter of it and a "
        "sixteenth of the work (default: cifar)",
    )
    network.add_argument(
        "--dof",
        type=_positive_list,
        metavar="N,N,...",
        help="degrees of freedom to train at; the narrowed and the published network stand "
        "beside the smallest",
    )
    network.add_argument(
        "--laps",
        type=lambda text: [None if part == "none" else _positive(part) for part in text.split(",")],
        default=[4],
        metavar="N,N,...",
        help="how often slots are read close together, for all DoF or for each: a layer then takes "
        "so many times fewer multiplications; at most the compression; 'none' draws each weight "
        "from the whole bank, as the paper does (default: 4)",
    )
    network.add_argument(
        "--granularity", type=_positive, default=64, help="bank elements in a slot (default: 64)"
    )
    network.add_argument(
        "--reflect",
        choices=("element", "vector", "none"),
        default="vector",
        help="signs: per element, per slot use, or none (default: vector)",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=_positive, help="default: 6; 10 for resnet18")
    training.add_argument(
        "--lr",
        type=_positive_number,
        help="peak learning rate (default: 0.2; 0.05 for resnet18)",
    )
    training.add_argument("--batch-size", type=_positive, default=128, help="default: 128")
    training.add_argument(
        "--seeds",
        type=_positive,
        help="train each network with seeds 0 to SEEDS-1 (default: 2; 1 for resnet18)",
    )
    training.add_argument("--device", help="default: cuda where there is one, else cpu")
    training.add_argument(
        "--threads",
        type=_positive,
        help="of the processor (default: 1 for the small network, whose tensors are too small "
        "to share out; torch's choice for resnet18)",
    )
    training.add_argument(
        "--amp", choices=("off", "bfloat16"), default="off", help="autocast (default: off)"
    )
    parser.add_argument(
        "--out",
        default=".",
        metavar="DIR",
        help="where demo.json, demo.png and demo.pt (a trained state) go (default: here)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the demo with parsed options."""
    from examples.demo.experiment import experiment

    experiment(args)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a positive whole number")
    return value


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a positive number")
    return value


def _positive_list(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]
