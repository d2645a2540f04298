"""What a network of transformers or timm is in the table of ``architectures.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import other_torchvision  # noqa: F401  (before transformers and timm)
import timm
import torch
import transformers
from torch import Tensor, nn

transformers.logging.set_verbosity_error()  # it advises, on tiny networks more than once each

Inputs = dict[str, Tensor]

VOCABULARY = 48
PIXELS = 64
# Not transformers' defaults, which lie outside of a vocabulary of this size.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Architecture:
    """A network of another library, in two sizes.

    Args:
        library: ``"transformers"``, where name is a class, or ``"timm"``, where it is a model.
        name: what the library calls it.
        inputs: makes a batch that a tiny one takes: keyword arguments of its forward.
        tiny: options that make it small, of its configuration or its constructor.
        large: options where the library's defaults are not a size that is used.
        small: the class or the model of timm that is tiny with those options, where timm's
            constructor of the large one does not take them.
        generates: whether it has ``generate``.
        refused: a part of the reason, where it has no layer that can be shared.
    """

    library: str
    name: str
    inputs: Callable[[], Inputs]
    tiny: Mapping[str, Any]
    large: Mapping[str, Any] = field(default_factory=dict)
    small: str = ""
    generates: bool = False
    refused: str = ""

    def build(self) -> nn.Module:
        """A tiny one, in evaluation mode, with weights as the library draws them."""
        return self._make(self.small or self.name, self.tiny)

    def build_large(self) -> nn.Module:
        """One of a size that is used, on meta."""
        with torch.device("meta"):
            return self._make(self.name, self.large)

    def _make(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        model: nn.Module
        if self.library == "transformers":
            kind = getattr(transformers, name)
            model = kind(kind.config_class(**options))
        elif timm.is_model(name):
            model = timm.create_model(name, **options)
        else:
            model = getattr(timm.models, name)(**options)
        return model.eval()


def outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """All floating-point tensors that a forward returns, by name."""
    got = model(**inputs)
    named = got.items() if isinstance(got, Mapping) else [("output", got)]
    return {n: t for n, t in named if isinstance(t, Tensor) and t.is_floating_point()}


def loss(got: Mapping[str, Tensor]) -> Tensor:
    """The network's own loss where it has one, otherwise how far what it returns is from 1."""
    return got["loss"] if "loss" in got else sum((t - 1).square().mean() for t in got.values())


def tokens() -> Inputs:
    """Text, and the same text to predict."""
    text = torch.randint(3, VOCABULARY, (2, 6))
    return {"input_ids": text, "labels": text}


def images() -> Inputs:
    """Images for a network of transformers, and their classes."""
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def images_and_text() -> Inputs:
    """Images and a caption of each."""
    text = torch.randint(3, VOCABULARY, (2, 6))
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    return {"input_ids": text, "pixel_values": pixels, "return_loss": torch.tensor(True)}


def spectrograms() -> Inputs:
    """Sound in 8 mel bands, and its text."""
    return {
        "input_features": torch.randn(2, 8, 16),
        "labels": torch.randint(3, VOCABULARY, (2, 6)),
    }


def waves() -> Inputs:
    """Sound as samples, and its text."""
    return {"input_values": torch.randn(2, 400), "labels": torch.randint(3, VOCABULARY, (2, 3))}


def spectrograms_alone() -> Inputs:
    """Sound in 8 mel bands for a vocoder, which makes samples of it."""
    return {"spectrogram": torch.randn(2, 16, 8)}


def pixels_alone() -> Inputs:
    """Images for a network of transformers that says something of each pixel."""
    return {"pixel_values": torch.randn(2, 3, PIXELS, PIXELS)}


def only_images() -> Inputs:
    """Images for a network of timm."""
    return {"x": torch.randn(2, 3, PIXELS, PIXELS)}
