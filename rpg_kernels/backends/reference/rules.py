"""The reference runs every call; where another back end lends kernels for tiles, with those."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rpg_kernels import settings
from rpg_kernels.backends import proving, registry
from rpg_kernels.backends.call import OPERATORS, Call
from rpg_kernels.backends.registry import Backend, TileKernels
from rpg_kernels.law.placement import Placement, parse


def fits(p: Placement, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether lent kernels can work within the scratch limit in at most 16 parts: many small
    products cost more than unpacking once gains."""
    part = p.numel // min(16, *p.selected_shape[:2]) * dtype.itemsize
    return part <= settings.scratch_bytes(device.type)


class Reference(Backend):
    """What runs where nothing else does: PyTorch, and the native module's unpack and pack."""

    name = "reference"
    summary = "plain PyTorch, unpacked tile by tile within the scratch limit"

    def unsupported(self, call: Call) -> str:
        """Nothing is."""
        return ""

    def preferred(self, call: Call) -> bool:
        """It is asked last."""
        return True

    def explain(self, call: Call) -> str:
        """What unpacks the tiles."""
        lender = self._lender(call)
        if lender is None:
            return self.summary
        wrong = proving.refused(self, call)
        if wrong:
            return f"{self.summary}; {self.on_trial(call)} failed its test: {wrong}"
        return (
            f"unpacked by a kernel of {lender[0].name} within the scratch limit, multiplied by the "
            "vendor's library"
        )

    def adds(self, call: Call) -> bool:
        """Of every product and lookup: a sum for each layer would be as large as the bank."""
        return True

    def on_trial(self, call: Call) -> str:
        """What it is lent by a back end that has to prove itself."""
        lender = self._lender(call)
        if lender is None or not lender[0].must_prove:
            return ""
        return f"{self.name} with kernels of {lender[0].name}"

    def configuration(self, call: Call) -> str:
        """Nothing: lent kernels are given tiles of the weight, whatever the batch is."""
        return ""

    def operator(self, call: Call) -> Callable[..., Tensor]:
        """With the kernels that it is lent, where they were proved."""
        if proving.proved(self, call):
            return self.untried(call)
        proving.warn_once(self, call, f"{self.name} without them")
        return super().operator(call)

    def untried(self, call: Call) -> Callable[..., Tensor]:
        """With the kernels that it is lent."""
        function = super().operator(call)
        lender = self._lender(call)
        return function if lender is None else partial(function, kernels=lender[1])

    def _lender(self, call: Call) -> tuple[Backend, TileKernels] | None:
        """Who lends kernels for a product. Nobody where the reference was forced: it is the way
        out when a kernel fails."""
        if call.forced or not call.placement or OPERATORS[call.op] not in ("linear", "conv2d"):
            return None
        for backend in registry.backends():
            kernels = backend.tile_kernels(call)
            if kernels is not None:
                able = fits(parse(call.placement), call.dtype, call.device)
                return (backend, kernels) if able else None
        return None
