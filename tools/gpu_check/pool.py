"""Items dealt to worker processes one by one, of which any may die without the others.

A worker reads items from its standard input, a JSON string a line, and answers each with a line of
JSON on the file descriptor that the environment names (``RECORDS``): first ``{"ready": ITEMS}``,
where ITEMS may be null, then ``{"item": NAME, "outcome": ...}`` for each. A worker that dies, that
says that its GPU is lost, or that takes too long for an item is replaced by a new one, which goes
on with the items that are left; the item is named in a record of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORDS = "GPU_CHECK_RECORDS"  # the number of the descriptor that a worker's records go to
CRASHED, TIMED_OUT, INTERRUPTED, BROKEN = "crashed", "timed out", "interrupted", "broken"
LOST = "gpu_lost"  # a key of a record: the process can do nothing more on its GPU
_GRACE = 3.0  # seconds between an interrupt and the end of a worker
_ORDERLY = 15.0  # seconds that a worker may take to end when nothing is left for it
_STARTS = 2  # of a worker that was not ready; then it is not the items that are wrong
_TAIL = 4000

Record = dict[str, Any]


@dataclass
class Queue:
    """Items by group. A worker stays with its group while that lasts, since items of a group share
    what is compiled; then it helps with the largest."""

    groups: dict[str, list[str]]

    @classmethod
    def of(cls, items: Iterable[str], group: Callable[[str], str]) -> Queue:
        """Items in groups, in their order."""
        groups: dict[str, list[str]] = {}
        for item in items:
            groups.setdefault(group(item), []).append(item)
        return cls(groups)

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))

    def take(self, group: str, busy: Iterable[str] = ()) -> tuple[str, str]:
        """(group, item): of this group where it has one, else of one that no other worker is busy
        with, else of the largest; ("", "") when nothing is left."""
        left = [name for name, items in self.groups.items() if items]
        if not left:
            return "", ""
        if group not in left:
            free = [name for name in left if name not in set(busy)]
            group = free[0] if free else max(left, key=lambda name: len(self.groups[name]))
        return group, self.groups[group].pop(0)


@dataclass
class Pool:
    """Workers for items.

    Args:
        command: of a worker.
        jobs: workers at a time.
        emit: called with each record, one at a time.
        items: to be dealt; None takes those that the first worker names when it is ready.
        group: item -> what it is to be dealt with.
        environment: variables of the workers beside this process's; "" takes one away.
        item_seconds: for an item; a worker that takes longer is ended.
        start_seconds: for a worker to be ready.
        until: on ``time.monotonic``; nothing is dealt from then on.
    """

    command: Sequence[str]
    jobs: int
    emit: Callable[[Record], None]
    items: Sequence[str] | None = None
    group: Callable[[str], str] = str
    environment: Mapping[str, str] = field(default_factory=dict)
    item_seconds: float = 60.0
    start_seconds: float = 120.0
    until: float = math.inf
    _queue: Queue | None = field(init=False, default=None)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _stopping: threading.Event = field(init=False, default_factory=threading.Event)
    _at: dict[int, str] = field(init=False, default_factory=dict)

    def run(self) -> int:
        """Deal all items; how many nobody answered.

        An interrupt ends the workers; the items that they were at are named, and it is raised on.
        """
        if self.items is not None:
            self._plan(self.items)
        count = self.jobs if self.items is None else min(self.jobs, len(self.items))
        threads = [threading.Thread(target=self._work, args=(i,)) for i in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException:
            self._stopping.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join(2 * _GRACE)
            raise
        finally:
            self._say({"left": self.left})
        return self.left

    @property
    def left(self) -> int:
        """Items that were not dealt."""
        return 0 if self._queue is None else len(self._queue)

    def again(self, item: str) -> None:
        """Deal another item next; to be called by ``emit``."""
        if self._queue is not None:
            self._queue.groups = {item: [item], **self._queue.groups}

    def _plan(self, items: Sequence[str]) -> None:
        with self._lock:
            if self._queue is not None:
                return
            self._queue = Queue.of(items, self.group)
        self._say({"planned": len(items)})

    def _say(self, record: Record) -> None:
        with self._lock:
            self.emit(record)

    def _next(self, number: int) -> str:
        with self._lock:
            over = self._stopping.is_set() or time.monotonic() >= self.until
            if self._queue is None or over:
                return ""
            busy = [name for other, name in self._at.items() if other != number]
            self._at[number], item = self._queue.take(self._at.get(number, ""), busy)
            return item

    def _work(self, number: int) -> None:
        """Deal items to one worker after the other."""
        in_vain = 0
        while in_vain < _STARTS and not self._stopping.is_set():
            if (self._queue is not None and not self.left) or time.monotonic() >= self.until:
                return
            with Worker(self.command, self.environment, self._stopping) as worker:
                ready = worker.answer(self.start_seconds)
                if ready is None:
                    in_vain += 1
                    self._say({"worker": number, "outcome": BROKEN, "message": worker.end()})
                    continue
                in_vain = 0
                self._start(ready)
                if self._deal(number, worker):
                    return

    def _start(self, ready: Record) -> None:
        with self._lock:
            first = self._queue is None
        if first:
            for record in ready.get("records", ()):
                self._say(record)
            self._plan(ready["ready"] or ())

    def _deal(self, number: int, worker: Worker) -> bool:
        """Whether all items were dealt; False where the worker has to be replaced before."""
        while item := self._next(number):
            begin = time.monotonic()
            record = worker.ask(item, self.item_seconds)
            if record is None:
                outcome = CRASHED if worker.died() else TIMED_OUT
                outcome = INTERRUPTED if self._stopping.is_set() else outcome
                seconds = round(time.monotonic() - begin, 2)
                self._say(
                    {"item": item, "outcome": outcome, "seconds": seconds, "message": worker.end()}
                )
                return False
            self._say(record)
            if record.get(LOST):
                return False
        return True


class Worker:
    """One process, to be used in a with statement, which ends it."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], stopping: threading.Event
    ) -> None:
        self._stopping = stopping
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._reads, writes = os.pipe()
        self._buffer = b""
        variables = {**os.environ, **environment, RECORDS: str(writes)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in variables.items() if value},
            pass_fds=(writes,),
            process_group=0,  # to be interrupted with what it started; the session stays
        )
        os.close(writes)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.end(orderly=not self._stopping.is_set())
        os.close(self._reads)
        self._log.close()

    def ask(self, item: str, seconds: float) -> Record | None:
        """The record of an item; None where the worker died or took longer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(item).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer(seconds)

    def answer(self, seconds: float) -> Record | None:
        """The next record."""
        limit = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = limit - time.monotonic()
            if left <= 0 or self._stopping.is_set():
                return None
            if select.select([self._reads], [], [], min(left, 0.2))[0]:
                data = os.read(self._reads, 1 << 16)
                if not data:
                    return None
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        record: Record = json.loads(line)
        return record

    def died(self) -> bool:
        """Whether it ended by itself; a process whose pipe has closed is given a moment."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.0 if self._stopping.is_set() else 1.0)
        return self._process.poll() is not None

    def end(self, orderly: bool = False) -> str:
        """End it, interrupted before it is killed; its exit status and what it last said.

        Args:
            orderly: it ends by itself when nothing is dealt to it any more, as a rule.
        """
        process = self._process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if orderly and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ORDERLY)
        if process.poll() is None:
            self._signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        self._signal(signal.SIGKILL)  # it, and what it started
        process.wait()
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL))
        said = self._log.read().decode(errors="replace").strip()
        return f"exit status {process.returncode}\n{said}".strip()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def records(path: Path) -> Iterator[Record]:
    """The records of a file of one JSON object a line, as far as they were written."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


class Lines:
    """A file of one JSON object a line, written as they come.

    Args:
        path: of the file.
        limit: bytes from which on long texts are left out.
    """

    def __init__(self, path: Path, limit: int = 10 << 20) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._limit = limit

    def write(self, record: Record) -> None:
        """One line, on the disk when this returns."""
        if self._file.tell() > self._limit:
            record = {k: v for k, v in record.items() if len(str(v)) <= 200}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
