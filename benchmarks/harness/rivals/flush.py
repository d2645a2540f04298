"""Memory that is read between turns, so that nothing else is left in a cache.

The processes share it: twice the last-level cache, in pages of their own, made by the process that
starts them. A processor in a virtual machine may name a cache that it shares with others; more is
read then than needed.
"""

from __future__ import annotations

import mmap
import os
import tempfile

import torch

from rpg_kernels import native

_LEAST = 1 << 20


def shared(nbytes: int) -> int:
    """A file descriptor of so much memory, written once; processes map it with ``Flush``."""
    nbytes = max(_LEAST, nbytes)
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("flush")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.truncate(handle, nbytes)
    with mmap.mmap(handle, nbytes) as memory:
        for start in range(0, nbytes, _LEAST):
            memory[start : start + _LEAST] = b"\1" * len(memory[start : start + _LEAST])
    return handle


class Flush:
    """Reads all of that memory when called.

    Args:
        handle: of ``shared``.
        threads: that read a part each, so that no core keeps anything in caches of its own.
    """

    def __init__(self, handle: int, threads: int) -> None:
        whole = os.fstat(handle).st_size
        self._memory = mmap.mmap(handle, whole)
        words = torch.frombuffer(self._memory, dtype=torch.int64)
        count = len(words) // threads // 32 * 32
        self._words = words[: threads * count].view(threads, count)

    @property
    def nbytes(self) -> int:
        """That a call reads."""
        return self._words.nbytes

    def __call__(self) -> None:
        """Read it once."""
        if native.available():
            native.stream(self._words, write=False, passes=1)
        else:
            self._words.sum()
