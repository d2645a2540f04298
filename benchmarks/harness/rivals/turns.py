"""The processes of all families, and samples of everything that they have, in turn."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.rivals.worker import Orders

MIN_ROUNDS, MAX_ROUNDS = 5, 15
PATIENCE = 600.0  # seconds without an answer, after which a process is ended
_LEFT = 2.5  # times the fastest of its kind: a rival so slow is left after two rounds
STATES = ("flushed", "following")
Samples = dict[str, dict[str, list[float]]]  # name -> state -> seconds, one a round
_ROOT = Path(__file__).parents[3]


class Died(Exception):
    """A process ended, or did not answer."""


class Process:
    """A family's process.

    Args:
        orders: what it is for.
    """

    def __init__(self, orders: Orders) -> None:
        paths = [str(_ROOT), *(path for path in sys.path if path)]
        threads = str(orders.threads)
        # Threads of one family must not spin while another's turn is timed.
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads, "KMP_BLOCKTIME": "1",
        }  # fmt: skip
        self.family = orders.family
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.rivals.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=(orders.flush,),
            env=env,
        )
        self._rest = b""
        self._say(asdict(orders))

    def prepared(self) -> tuple[list[dict[str, Any]], str]:
        """What it made, way by way, and why there is nothing or no more ("" where all is well)."""
        made: list[dict[str, Any]] = []
        try:
            while True:
                answer = self._answer()
                if "refused" in answer:
                    return made, f"{self.family} was skipped: {answer['refused']}"
                if "ready" in answer:
                    return made, ""
                made.append(answer)
        except Died as error:
            return made, f"{self.family} was skipped: {error}"

    def ask(self, do: str, name: str, batch: int) -> dict[str, Any]:
        """The answer to a request; ``{"reason": ...}`` where it failed or the process ended."""
        try:
            self._say({"do": do, "name": name, "batch": batch})
            return self._answer()
        except (Died, OSError) as error:
            return {"reason": str(error)}

    def end(self) -> None:
        """Let the process go."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:
                continue  # It is gone already.
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _say(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            ready, _, _ = select.select([pipe], [], [], PATIENCE)
            more = os.read(pipe, 1 << 16) if ready else b""
            if not more:
                raise Died(self._last_words(bool(ready)))
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self, ended: bool) -> str:
        if not ended:
            self._process.kill()
            return f"no answer in {PATIENCE:.0f} seconds"
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
        return f"the process ended with {code}: {lines[-1][:200]}"


def take(
    asked: Sequence[tuple[Process, dict[str, Any]]],
    batch: int,
    seconds: float,
    order: random.Random,
) -> tuple[Samples, dict[str, str]]:
    """Samples of everything in a new order every round, and what failed meanwhile.

    Rivals far behind the fastest of their kind are left after two rounds. Rounds go on until
    the budget is spent.

    Args:
        asked: ways, as ``Process.prepared`` tells of them, with their process.
        batch: rows of x.
        seconds: budget, of which at least ``MIN_ROUNDS`` rounds are made.
        order: within a round.
    """
    samples: Samples = {way["name"]: {state: [] for state in STATES} for _, way in asked}
    failed: dict[str, str] = {}
    lasting = list(asked)
    begin = time.perf_counter()
    for round_ in range(MAX_ROUNDS):
        order.shuffle(lasting)
        for process, way in list(lasting):
            answer = process.ask("turn", way["name"], batch)
            if "reason" in answer:
                failed[way["name"]] = answer["reason"]
                lasting.remove((process, way))
                continue
            for state in STATES:
                samples[way["name"]][state].append(answer[state])
        if round_ == 1:
            lasting = [(p, way) for p, way in lasting if not _behind(way, lasting, samples)]
        if round_ + 1 >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
    return samples, failed


def _behind(
    way: Mapping[str, Any],
    among: Sequence[tuple[Process, Mapping[str, Any]]],
    samples: Samples,
) -> bool:
    """Whether a rival is far slower, in both states, than another of its kind."""
    if way["ours"]:
        return False
    others = [o["name"] for _, o in among if o["kind"] == way["kind"] and not o["ours"]]
    return all(
        min(samples[way["name"]][state]) > _LEFT * min(min(samples[o][state]) for o in others)
        for state in STATES
    )
