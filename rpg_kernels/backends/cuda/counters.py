"""Counters of arrived CTAs: zero before a launch, and zero again after it.

Launches of one stream follow each other, so they share counters. What a CUDA graph captured may be
replayed on any stream, beside anything: it gets counters of its own, which are never given again.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

RESERVED = 1 << 18  # counters of a device for captured launches, 1 MiB; one has some dozens

_lock = threading.Lock()
_of_stream: dict[tuple[int, int], Tensor] = {}
_reserved: dict[int, Tensor] = {}  # what is left, by device


def zeros(count: int, device: torch.device) -> Tensor:
    """int32 ``[count or more]`` for one launch on the current stream of ``device``.

    Args:
        count: counters that the launch needs.
        device: the current CUDA device, or the CPU.
    """
    if device.type != "cuda" or count == 0:
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    index = stream.device_index
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            left = _reserved.get(index)
            if left is None or left.numel() < count:  # then filled by the graph, in every replay
                return torch.zeros(count, dtype=torch.int32, device=device)
            _reserved[index] = left[count:]
            return left[:count]
        if index not in _reserved:
            made = _lasting(RESERVED, stream)
            stream.synchronize()  # captures may be replayed on any stream
            _reserved[index] = made
        mine = _of_stream.get((index, stream.cuda_stream))
        if mine is None or mine.numel() < count:
            mine = _lasting(max(1024, 2 * count), stream)
            _of_stream[index, stream.cuda_stream] = mine
        return mine


def forget(device: torch.device) -> None:
    """After a launch that failed: the next one of the current stream gets new counters, as those
    of the failed one need not be zero."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        with _lock:
            _of_stream.pop((stream.device_index, stream.cuda_stream), None)


def _lasting(count: int, stream: torch.cuda.Stream) -> Tensor:
    """Zeros that stay: made by another thread, as torch.compile's warm-up before a capture takes
    what its own thread allocates for the graph's memory."""

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(count, dtype=torch.int32, device=stream.device)

    with ThreadPoolExecutor(1) as other:
        return other.submit(make).result()  # raises what make raised
