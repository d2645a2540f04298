"""Modules of suite ``networks`` in every way that they can be run, judged and ready to be timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import mkldnn

from benchmarks.harness import memory
from benchmarks.harness.cpu.grid import FORWARD, TRAINING
from benchmarks.harness.cpu.networks import Point
from benchmarks.harness.cpu.opponents import HIGHEST, MEDIUM, Job
from rpg_kernels import materialize
from rpg_kernels.backends.cpu.processor import dense_gain
from rpg_kernels.nn import Conv2d

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels-last"
_FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}
Data = tuple[Tensor, Tensor]


@dataclass
class Way:
    """One way to run a module: in a layout of images, a dtype and a precision of fp32 products.

    A layer's training is its forward and all gradients; a network's has a loss and an optimiser.

    Args:
        module: that runs; it is brought into dtype and layout.
        point: what is asked of it.
        data: a batch, and its classes.
        dtype: ``"fp32"``, or ``"bf16"``: of a layer everything, of a network by autocast.
        layout: of images; "" where there are none.
        precision: of fp32 products.
    """

    module: nn.Module
    point: Point
    data: Data
    dtype: str
    layout: str = ""
    precision: str = HIGHEST

    def __post_init__(self) -> None:
        x, self._target = self.data
        self._cast = self.dtype == "bf16" and not self.point.case.is_layer
        if self.dtype == "bf16" and self.point.case.is_layer:
            self.module.bfloat16()
            x = x.bfloat16()
        if self.layout:
            x = x.to(memory_format=_FORMATS[self.layout])
            # torch's annotations of Module.to leave memory_format out.
            self.module.to(memory_format=_FORMATS[self.layout])  # type: ignore[call-overload]
        self.x = x
        self.module.train(self.point.what == TRAINING)
        self._dy: Tensor | None = None
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)

    def job(self, name: str) -> Job:
        """What is timed."""
        medium = MEDIUM if self.precision == MEDIUM else ""
        words = ", ".join(word for word in (self.dtype, self.layout, medium) if word)
        return Job(f"{name}: {words}", lambda i: self(), 1, self.precision)

    def __call__(self) -> tuple[Tensor, ...]:
        if self.point.what != TRAINING:
            with torch.no_grad():
                return (self.forward(self.x),)
        if self.point.case.is_layer:
            return self.products()
        self._optimizer.zero_grad()
        y = self.forward(self.x)
        loss = F.cross_entropy(y.reshape(-1, y.shape[-1]).float(), self._target)
        loss.backward()
        self._optimizer.step()
        return (loss.detach(),)

    def memory(self) -> dict[str, int]:
        """Bytes between steps, saved beyond activations, and the most alive within a step."""
        saved = memory.saved_by_model(self.module, self.x, self._cast)
        return {
            "state": memory.of_model(self.module, self._optimizer).total,
            "saved_beyond_activations": saved.beyond_activations,
            "peak": memory.peak(lambda: self, torch.device("cpu")).peak,
        }

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._cast):
            y: Tensor = self.module(x)
        return y

    def products(self) -> tuple[Tensor, ...]:
        """y, dx and the gradient of the weight or bank; dy is the same in every call."""
        x = self.x.detach().requires_grad_()
        y = self.forward(x)
        if self._dy is None:
            self._dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return (y.detach(), *torch.autograd.grad(y, (x, *self.module.parameters()), self._dy))


def ways(model: nn.Module, point: Point, data: Data, *dtypes: str) -> list[Way]:
    """Copies of a model, one for each layout, dtype and, where it is a matter of linear layers,
    precision."""
    layouts = (CHANNELS_LAST, CONTIGUOUS) if _convolves(point) else ("",)
    found = []
    for dtype in dict.fromkeys(dtypes):
        precisions = (HIGHEST,) if _convolves(point) or dtype == "bf16" else (HIGHEST, MEDIUM)
        for layout in layouts:
            for precision in precisions:
                made = copy.deepcopy(model)
                found.append(Way(made, point, data, dtype, layout, precision))
    return found


def dense(model: nn.Module, point: Point, data: Data) -> list[Way]:
    """Every way of a dense model: fp32 beside bf16 too, and weights that oneDNN has packed.

    In bf16 only where the processor has instructions for it: emulated, it takes many times as long.
    """
    able = point.dtype == "fp32" or dense_gain(torch.bfloat16) > 1
    found = ways(model, point, data, "fp32", *([point.dtype] if able else []))
    if point.what != TRAINING and _convolves(point):
        packed = _Packed(mkldnn.to_mkldnn(copy.deepcopy(model).eval()))
        found.append(_PackedWay(packed, point, data, "fp32"))
    return found


class _Packed(nn.Module):
    """A model whose weights are in the layout that oneDNN chose, for images that are not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x.to_mkldnn())
        return y.to_dense()


class _PackedWay(Way):
    def __post_init__(self) -> None:
        self.x, self._cast = self.data[0], False

    def job(self, name: str) -> Job:
        return Job(f"{name}: fp32, oneDNN packed", lambda i: self(), 1)


def error(model: nn.Module, point: Point, data: Data) -> float:
    """Of the outputs and, of layers, dx: the largest difference from the same weights held dense,
    in float32, relative to the largest value."""
    twin = _dense_twin(model)
    way = ways(model, point, data, point.dtype)[0]
    plain = Way(twin, point, data, "fp32", way.layout)
    for one in (way, plain):
        one.module.eval()
    worst = 0.0
    for got, wanted in zip(_outputs(way), _outputs(plain), strict=True):
        difference = (got.float() - wanted).abs().max() / wanted.abs().max()
        worst = max(worst, float(difference) if difference.isfinite() else float("inf"))
    return worst


def _outputs(way: Way) -> tuple[Tensor, ...]:
    if way.point.case.is_layer and way.point.what != FORWARD:
        return way.products()[:2]
    return (way.forward(way.x).detach(),)


def _dense_twin(model: nn.Module) -> nn.Module:
    if not isinstance(model, Conv2d):
        return materialize(model)
    twin = nn.Conv2d(
        model.in_channels,
        model.out_channels,
        model.kernel_size,  # type: ignore[arg-type]
        model.stride,  # type: ignore[arg-type]
        model.padding,  # type: ignore[arg-type]
        bias=False,
    )
    with torch.no_grad():
        twin.weight.copy_(model.virtual_weight.unpack())
    return twin


def _convolves(point: Point) -> bool:
    return point.case.name.startswith(("conv", "resnet"))
