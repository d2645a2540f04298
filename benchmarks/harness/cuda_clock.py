"""Times calls on a CUDA device: in a captured graph, and as Python launches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.timing import Sample, Work

_EAGER_SAMPLE, _GRAPH_SAMPLE = 5e-3, 1e-3  # seconds that a sample should last, about
_CALLS = (3, 50)  # eager calls of a sample, at least and at most
_REPLAYS = 50  # of a graph in a sample, at most
_LAYERS = 8  # calls in a graph, at least
_LONGEST = 1.0  # seconds of eager calls that are worth capturing: beyond, launches do not matter


@dataclass
class _Graphs:
    """Graphs of some calls of one implementation in one state."""

    calls: int
    forward: torch.cuda.CUDAGraph
    with_grad: torch.cuda.CUDAGraph  # this and the next one are empty where only a forward runs
    backward: torch.cuda.CUDAGraph
    kept: list[Tensor]  # what the graphs write; freed memory would be given to others

    def replay(self, kind: str) -> None:
        if kind == "forward":
            self.forward.replay()
        if kind == "full":
            self.with_grad.replay()
        if kind != "forward":
            self.backward.replay()


class CudaClock:
    """Times calls on the current CUDA device.

    Args:
        graphs: False only times calls as Python launches them.
    """

    def __init__(self, graphs: bool = True) -> None:
        self.headline = "graph" if graphs else "eager"
        self._use_graphs = graphs
        self._notes: dict[int, str] = {}
        self._graphs: dict[tuple[int, str], _Graphs | None] = {}
        self._calls: dict[tuple[int, str, str, str], int] = {}

    def sample(self, work: Work, kind: str, state: str) -> Sample:
        """Seconds of a call on each clock that there is."""
        key = (id(work), state)
        if key not in self._graphs:
            self._graphs[key] = self._capture(work, state) if self._use_graphs else None
        graphs = self._graphs[key]
        result = {"eager": self._eager(work, kind, state)}
        if graphs is not None:
            result["graph"] = self._replayed(graphs, work, kind, state)
        return result

    def note(self, work: Work) -> str | None:
        """Why an implementation has no graph."""
        return self._notes.get(id(work))

    def forget(self) -> None:
        """Free the graphs and their memory."""
        for kept in (self._graphs, self._calls, self._notes):
            kept.clear()

    def _capture(self, work: Work, state: str) -> _Graphs | None:
        """All layers once when cold, the first as often when warm; None where that fails."""
        layers = [work.layer(state) for _ in range(max(_LAYERS, work.stack.copies))]
        seconds = _warm_up(work, layers)
        if seconds * len(layers) > _LONGEST:
            self._notes[id(work)] = f"a call takes {seconds * 1e3:.0f} ms: timed as launched"
            return None
        forward, with_grad, backward = (torch.cuda.CUDAGraph() for _ in range(3))
        outputs: list[Tensor] = []
        try:
            with torch.cuda.graph(forward), torch.no_grad():
                for i in layers:
                    work.stack.forward(i)
            if work.with_gradients:
                with torch.cuda.graph(with_grad):
                    outputs += [work.stack.forward(i) for i in layers]
                with torch.cuda.graph(backward, pool=with_grad.pool()):
                    for i, y in zip(layers, outputs, strict=True):
                        # Retained: a replay must find what the forward saved.
                        work.backward(i, y, retain=True)
        except RuntimeError as error:
            torch.cuda.synchronize()
            self._notes[id(work)] = f"timed as launched, no graph: {str(error).splitlines()[0]}"
            return None
        return _Graphs(len(layers), forward, with_grad, backward, outputs)

    def _replayed(self, graphs: _Graphs, work: Work, kind: str, state: str) -> float:
        """Seconds of a call inside a graph."""

        def measure(replays: int) -> float:
            def replay() -> None:
                for _ in range(replays):
                    graphs.replay(kind)

            return _seconds([_timed(replay)]) / replays

        key = (id(work), "graph", kind, state)
        if key not in self._calls:
            once = measure(1)
            self._calls[key] = min(_REPLAYS, max(1, int(_GRAPH_SAMPLE / max(once, 1e-9))))
        return measure(self._calls[key]) / graphs.calls

    def _eager(self, work: Work, kind: str, state: str) -> float:
        """Seconds of a call as launched; a backward's forward lies between the timed parts."""

        def measure(calls: int) -> float:
            return _seconds([_timed(work.prepare(kind, state)) for _ in range(calls)]) / calls

        key = (id(work), "eager", kind, state)
        if key not in self._calls:
            once = measure(_CALLS[0])
            wanted = int(_EAGER_SAMPLE / max(once, 1e-9))
            self._calls[key] = min(_CALLS[1], max(_CALLS[0], wanted))
        return measure(self._calls[key])


def _warm_up(work: Work, layers: list[int]) -> float:
    """Run every layer on another stream, as a capture asks for; seconds of one call.

    Libraries make their handles here, and kernels are compiled. Slow calls are not all run.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def call(i: int) -> None:
        with torch.no_grad():
            work.stack.forward(i)
        if work.with_gradients:
            work.backward(i, work.stack.forward(i))

    with torch.cuda.stream(stream):
        for _ in range(2):
            call(layers[0])
        seconds = _seconds([_timed(lambda: call(layers[0]))])
        if seconds * len(layers) <= _LONGEST:
            for i in dict.fromkeys(layers):
                call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return seconds


Events = tuple[torch.cuda.Event, torch.cuda.Event]


def _timed(call: Callable[[], object]) -> Events:
    """Events before and after a call; nothing waits for it."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    return start, stop


def _seconds(pairs: list[Events]) -> float:
    """Seconds on the device between the events of all pairs together."""
    torch.cuda.synchronize()
    milliseconds: float = sum(start.elapsed_time(stop) for start, stop in pairs)
    return milliseconds * 1e-3
