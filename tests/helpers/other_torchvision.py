"""Makes torchvision importable where it was built for another torch: its operators do not load.

A torchvision for CUDA beside a torch for CPUs, which is what installing both from different places
gives, fails at its import with "operator torchvision::nms does not exist". transformers and timm
import torchvision where it is installed, so they fail too. Of its operators they need none here,
and torchvision itself only asks at its import that two of them are declared.

Importing this module before them is enough. It changes nothing where torchvision is importable, or
is not installed.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare() -> None:
    """Declare torchvision's missing operators, if it cannot be imported for want of them.

    Raises:
        RuntimeError: torchvision cannot be imported, and declaring operators does not help.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        # What the failed import has left would keep the next one from running.
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", SCHEMA)
        import torchvision  # noqa: F401


declare()
