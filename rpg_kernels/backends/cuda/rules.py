"""What the CUDA kernels can run, when they are taken, and how a launch is laid out.

The back ends ``cuda`` and ``simt`` are one implementation: the second runs the kernels' own
sources on CPU tensors, a thread at a time (csrc/simt), so that tests need no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import native, settings
from rpg_kernels._tensors import LOW_PRECISION
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.registry import Backend
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import parse
from rpg_kernels.law.ring import MAX_BAND
from rpg_kernels.law.unit import UnitLaw

PRODUCTS = ("linear", "linear_input_grad", "linear_bank_grad")
OPERATORS = (*PRODUCTS, "unpack", "pack")
BLOCKS = (32, 64)
ALIGNMENT = 16  # bytes, of the bank

# Batches up to which the kernels are predicted to win (docs/cuda.md; no GPU has said so), for
# 16-bit numbers and for fp32, which has no tensor cores here.
MAX_BATCH = {"linear": (64, 32), "linear_input_grad": (32, 8), "linear_bank_grad": (64, 64)}
# A ring that fits has an entry and, in the input gradient, a product for every row. What is
# gathered block by block is read for every row too: only 16-bit numbers without signs of elements.
MAX_BATCH_OF_RINGS = {"linear": 32, "linear_input_grad": 16}
MAX_BATCH_GATHERED = {"linear": 16, "linear_input_grad": 8}
RING, GATHERED = 1, 2  # Plan.fill


@dataclass(frozen=True)
class Gpu:
    """What a launch depends on.

    Args:
        backend: ``"cuda"`` or ``"simt"``, which is also the part of the native module.
        sms: streaming multiprocessors.
        shared_bytes: shared memory that a CTA may have.
    """

    backend: str
    sms: int
    shared_bytes: int


SIMT = Gpu("simt", sms=4, shared_bytes=100 * 1024)  # small, so that small layers are divided


@lru_cache(maxsize=64)
def _cuda_gpu(device: torch.device) -> Gpu:
    p: Any = torch.cuda.get_device_properties(device)
    return Gpu("cuda", p.multi_processor_count, p.shared_memory_per_block_optin)


def gpu(device: torch.device) -> Gpu:
    """The GPU that a device is; for a CPU the one that ``simt`` makes believe."""
    return _cuda_gpu(device) if device.type == "cuda" else SIMT


def kernels(target: Gpu) -> Any:
    """The part of the native module that runs there."""
    return getattr(native.module(), target.backend)


def unsupported_kind(
    op: str, device: torch.device, dtype: torch.dtype, backend: str = "cuda"
) -> str:
    """Why no call of a kind can run here, or "".

    Args:
        op: operator name.
        device, dtype: of the call's first tensor.
        backend: ``"cuda"`` or ``"simt"``.

    Example:
        >>> unsupported_kind("linear", torch.device("cpu"), torch.float32)
        'the CUDA kernels work on CUDA tensors, not on cpu; there the back end simt runs them'
        >>> unsupported_kind("linear", torch.device("cpu"), torch.float64, "simt")
        'the CUDA kernels compute in float32, bfloat16 and float16, not in torch.float64'
    """
    if backend == "simt" and device.type != "cpu":
        return f"the back end simt works on CPU tensors, not on {device}"
    if backend == "cuda" and device.type != "cuda":
        elsewhere = "; there the back end simt runs them" if device.type == "cpu" else ""
        return f"the CUDA kernels work on CUDA tensors, not on {device}{elsewhere}"
    if op not in OPERATORS:
        return f"the CUDA kernels have no {op}"
    if dtype != torch.float32 and dtype not in LOW_PRECISION:
        return f"the CUDA kernels compute in float32, bfloat16 and float16, not in {dtype}"
    if not native.available():
        return native.why_not()
    if backend == "simt":
        absent = "the back end simt is part of development builds only (`make test` makes one)"
        return "" if hasattr(native.module(), "simt") else absent
    return _unsupported_gpu(device)


@lru_cache(maxsize=64)
def _unsupported_gpu(device: torch.device) -> str:
    """Why the compiled kernels do not run on a GPU, or ""."""
    info = native.build_info()
    if not info["cuda"]:
        return "rpg_kernels was built without CUDA kernels; `rpg-kernels doctor` says why"
    if torch.version.cuda is None:
        return "the CUDA kernels need a torch that is built with CUDA"
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    architectures = info["cuda_architectures"]
    if native.covers(architectures.split(), capability) is False:
        return (
            f"the CUDA kernels were built for {architectures}, and {device} has compute capability "
            f"{capability}: install again without RPG_KERNELS_CUDA_ARCHITECTURES"
        )
    return ""


@lru_cache(maxsize=4096)
def unsupported_weight(op: str, placement: str) -> str:
    """Why a weight cannot be read by an operator here, or "".

    Example:
        >>> from rpg_kernels.law.placement import Placement
        >>> p = Placement(Generator(100, 8, "vector"), 0, 0, (6, 16), 1.0)
        >>> unsupported_weight("linear", p.to_json())
        'the CUDA kernels read blocks of 32 or 64 elements, not of 8'
    """
    p = parse(placement)
    if not isinstance(p.generator, Generator):
        return "the CUDA kernels read weights of a packing law, not of a table"
    if p.selected_shape != p.shape:
        return "the CUDA kernels read whole weights, not a part"
    matrix = p.matrix
    if matrix.taps > 1:
        return "the CUDA kernels read matrices, not convolutions"
    if matrix.block not in BLOCKS:
        return f"the CUDA kernels read blocks of 32 or 64 elements, not of {matrix.block}"
    if matrix.blocks * matrix.block >= MAX_BAND:
        return "the CUDA kernels read rows of fewer than 2^31 elements"
    if op in PRODUCTS and -(-matrix.rows // 8) * 8 * matrix.blocks >= MAX_BAND:
        return "the CUDA kernels multiply with weights of fewer than 2^31 blocks"
    if op == "linear_bank_grad":  # uses of a slot follow one another
        if not isinstance(p.law, UnitLaw):
            return "the CUDA kernels have a bank gradient of windows, not of a whole ring"
        if p.generator.reflect == "element":
            return "the CUDA kernels have a bank gradient with one sign for a slot use"
    return ""


def copied(bank: Tensor | None, dtype: torch.dtype) -> int:
    """Bytes of the copy of a bank that a call makes: kernels read it in the dtype of x, aligned.

    Args:
        bank: that the call reads; None where it reads none.
        dtype: of x.
    """
    if bank is None or (bank.dtype == dtype and bank.is_contiguous() and _aligned(bank)):
        return 0
    return bank.numel() * dtype.itemsize


def _aligned(bank: Tensor) -> bool:
    if bank.device.type == "meta" or type(bank) not in (Tensor, torch.nn.Parameter):
        # Explained only, by meta or fake tensors, which have no address.
        return bank.storage_offset() * bank.itemsize % ALIGNMENT == 0
    return bank.data_ptr() % ALIGNMENT == 0


@lru_cache(maxsize=4096)
def _plan(
    op: str, placement: str, dtype: torch.dtype, batch: int, target: Gpu, room: int
) -> tuple[Any, int, str]:
    """(the layout of a launch whose workspace takes at most ``room`` bytes, or None; bytes of its
    workspace, or of the smallest; why the weight has none, or "")."""
    p = parse(placement)
    law = native.layer_law(p.law)
    make = getattr(kernels(target), f"plan_{op}")
    sms = target.sms
    while True:
        try:
            plan = make(law, native.dtype_code(dtype), batch, p.shape[1], sms, target.shared_bytes)
        except RuntimeError as error:
            return None, 0, str(error)
        if 4 * plan.workspace <= room:
            return plan, 4 * plan.workspace, ""
        if sms == 1:
            return None, 4 * plan.workspace, ""
        sms //= 2  # fewer parts, whose sums are what the workspace holds


def plan(
    op: str, placement: str, dtype: torch.dtype, batch: int, target: Gpu, copy: int
) -> tuple[Any, str]:
    """(the layout of a launch, "") or (None, why there is none).

    Args:
        op: operator name.
        placement: of the weight.
        dtype: of x.
        batch: rows of x, at least 1.
        target: the GPU.
        copy: bytes of the bank's copy, see ``copied``.
    """
    reason = unsupported_weight(op, placement)
    if reason:
        return None, reason
    kind = "cpu" if target.backend == "simt" else "cuda"
    limit = settings.scratch_bytes(kind)
    made, size, reason = _plan(op, placement, dtype, batch, target, max(0, limit - copy))
    if not reason and copy + size > limit:
        what = f", with a copy of the bank in {dtype}" if copy else ""
        reason = f"scratch_limit: got {limit} bytes, wanted at least {copy + size}{what}"
    return (None, reason) if reason else (made, "")


def why_slower(
    op: str, placement: str, dtype: torch.dtype, batch: int, target: Gpu, bank: Tensor | None
) -> str:
    """Why a call is left to other back ends, or "" where it is predicted to be faster here.

    Args:
        op, placement, dtype, batch, target: as for ``plan``.
        bank: that the call reads; None where it reads none.
    """
    reason = unsupported_weight(op, placement)
    if reason or op not in PRODUCTS:
        return reason
    most = MAX_BATCH[op][dtype == torch.float32]
    if not 1 <= batch <= most:
        return f"the CUDA kernels of {op} in {dtype} are for batches of 1 to {most}, not of {batch}"
    laid_out, reason = plan(op, placement, dtype, batch, target, copied(bank, dtype))
    if laid_out is None:
        return reason
    p = parse(placement)
    signs = getattr(p.generator, "reflect", "") == "element"
    if isinstance(p.law, UnitLaw) and laid_out.fill in (RING, GATHERED) and not signs:
        return (
            f"windows of {p.law.laps} laps do not fit the {target.shared_bytes} bytes of shared "
            "memory, or hold no fewer blocks than a tile has rows: the CUDA kernels would evaluate "
            "the law for each block, predicted to be slower"
        )
    if laid_out.fill == GATHERED:
        most = 0 if dtype == torch.float32 or signs else MAX_BATCH_GATHERED[op]
        if batch > most:
            upto = f" beyond batches of {most}" if most else ""
            return (
                "the CUDA kernels would gather this weight block by block, predicted to be "
                f"slower{upto}"
            )
    if laid_out.fill == RING and batch > MAX_BATCH_OF_RINGS[op]:
        most = MAX_BATCH_OF_RINGS[op]
        return f"the CUDA kernels of {op} are for batches of 1 to {most} of rings, not of {batch}"
    return ""


def parts(
    op: str, placement: str, dtype: torch.dtype, batch: int, target: Gpu, copy: int
) -> tuple[list[tuple[slice, Any]], str]:
    """([(rows of the batch, the layout of their launch), ...], "") or ([], why there is none).

    One part, unless the workspace would exceed the scratch limit. The input gradient's holds the
    rows of dx once for every tile of the weight's rows, which fewer processors do not change: it is
    then launched for some rows at a time, which are independent. Arguments are those of ``plan``.
    """
    height = batch
    while True:
        laid_out, reason = plan(op, placement, dtype, height, target, copy)
        divided = op == "linear_input_grad" and reason.startswith("scratch_limit") and height > 1
        if not divided:
            break
        height = half_of(height)
    if reason:
        return [], reason
    cuts = [slice(at, min(at + height, batch)) for at in range(0, batch, height)]
    rest = batch - cuts[-1].start
    last = laid_out if rest == height else plan(op, placement, dtype, rest, target, copy)[0]
    return [*((cut, laid_out) for cut in cuts[:-1]), (cuts[-1], last)], ""


def half_of(rows: int) -> int:
    """About half of some rows of the batch: whole tiles of 16, as long as there are two.

    Example:
        >>> half_of(64), half_of(40), half_of(17), half_of(16), half_of(3)
        (32, 32, 16, 8, 2)
    """
    half = -(-rows // 2)
    return half if rows <= 16 else -(-half // 16) * 16


def check(
    op: str,
    placement: str,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    bank: Tensor | None,
) -> list[tuple[slice, Any]]:
    """The launches of a call, as ``parts``; none for an empty batch. Arguments as for ``plan``.

    Raises:
        RuntimeError: the weight cannot be read here, or the scratch limit is too small.
    """
    target = gpu(device)
    made, reason = parts(op, placement, dtype, max(1, batch), target, copied(bank, dtype))
    if reason.startswith("scratch_limit"):
        raise RuntimeError(f"{reason}, for {op} in the {target.backend} back end")
    if reason:
        raise RuntimeError(f"backend: got {target.backend!r} for {op}, which cannot run: {reason}")
    return made if batch else []


class Cuda(Backend):
    """The compiled kernels for small batches, on CUDA tensors or, as ``simt``, on CPU tensors."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device_types = ("cuda",) if name == "cuda" else ()
        self.must_prove = name == "cuda"
        self.summary = (
            "compiled CUDA kernels; for small batches, products of slots shared by the rows that "
            "read them"
            if name == "cuda"
            else "the CUDA kernels' sources on the CPU, a thread at a time: for tests"
        )

    def unsupported(self, call: Call) -> str:
        """See ``unsupported_kind`` and ``unsupported_weight``."""
        if call.stored is not None:
            return f"the CUDA kernels read float banks, not one stored as {call.stored.form}"
        reason = unsupported_kind(call.op, call.device, call.dtype, self.name)
        if reason or not call.placement:
            return reason
        return unsupported_weight(call.op, call.placement)

    def preferred(self, call: Call) -> bool:
        """See ``why_slower``; not of any weight."""
        return bool(call.placement) and not self._why_slower(call)

    def configuration(self, call: Call) -> str:
        """Rows of the batch in eights, as tiles of it are; one row is a case of its own."""
        return "one" if call.rows == 1 else str(-(-call.rows // 8))

    def explain(self, call: Call) -> str:
        """Why a product on a CUDA device was left."""
        if self.takes(call):
            if call.forced and call.op in PRODUCTS and call.x.numel():
                given = (call.op, call.placement, call.device, call.dtype, call.rows, call.bank)
                check(*given)
            return self.summary
        if call.device.type != "cuda" or call.op not in PRODUCTS:
            return ""
        return self.unsupported(call) or self._why_slower(call)

    def _why_slower(self, call: Call) -> str:
        target = gpu(call.device)
        return why_slower(call.op, call.placement, call.dtype, call.rows, target, call.bank)
