"""Times calls on a CUDA device: in a captured graph, and as Python launches them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rpg_kernels.bench.timing import Sample, Work

_SHORTEST = 5e-3  # seconds that a sample of eager calls should last
_CALLS = (3, 50)


@dataclass
class _Graphs:
    """Graphs of some calls of one implementation in one state."""

    calls: int
    forward: torch.cuda.CUDAGraph
    with_grad: torch.cuda.CUDAGraph
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
        self._notes: dict[int, str] = {}
        self._graphs: dict[tuple[int, str], _Graphs | None] = {}
        self._use_graphs = graphs
        self._calls: dict[tuple[int, str, str], int] = {}

    def sample(self, work: Work, kind: str, state: str) -> Sample:
        """Seconds of a call on each clock that there is."""
        key = (id(work), state)
        if key not in self._graphs:
            self._warm_up(work, state)
            self._graphs[key] = self._capture(work, state) if self._use_graphs else None
        graphs = self._graphs[key]
        result = {"eager": self._eager(work, kind, state)}
        if graphs is not None:
            start, stop = _events(1)[0]
            start.record()
            graphs.replay(kind)
            stop.record()
            torch.cuda.synchronize()
            result["graph"] = start.elapsed_time(stop) * 1e-3 / graphs.calls
        return result

    def note(self, work: Work) -> str | None:
        """Why an implementation has no graph."""
        return self._notes.get(id(work))

    def forget(self) -> None:
        """Free the graphs and their memory."""
        for kept in (self._graphs, self._calls, self._notes):
            kept.clear()

    def _warm_up(self, work: Work, state: str) -> None:
        """On another stream, as a capture asks for; libraries make their handles here."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for kind in ("forward", "full", "full"):
                work.prepare(kind, state)()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def _capture(self, work: Work, state: str) -> _Graphs | None:
        """All layers once when cold, the first as often when warm; None where torch cannot."""
        layers = [work.layer(state) for _ in range(max(8, work.stack.copies))]
        forward, with_grad, backward = (torch.cuda.CUDAGraph() for _ in range(3))
        kept: list[Tensor] = []
        try:
            with torch.cuda.graph(forward), torch.no_grad():
                for i in layers:
                    work.stack.forward(i)
            outputs = []
            with torch.cuda.graph(with_grad):
                for i in layers:
                    outputs.append(work.stack.forward(i))
            with torch.cuda.graph(backward, pool=with_grad.pool()):
                for i, y in zip(layers, outputs, strict=True):
                    # Retained: a replay must find what the forward saved.
                    work.backward(i, y, retain=True)
            kept += outputs
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()
            self._notes[id(work)] = f"not captured in a graph: {str(error).splitlines()[0]}"
            return None
        return _Graphs(len(layers), forward, with_grad, backward, kept)

    def _eager(self, work: Work, kind: str, state: str) -> float:
        key = (id(work), kind, state)
        if key not in self._calls:
            once = self._run(work, kind, state, _CALLS[0])
            self._calls[key] = min(_CALLS[1], max(_CALLS[0], int(_SHORTEST / max(once, 1e-9))))
        return self._run(work, kind, state, self._calls[key])

    def _run(self, work: Work, kind: str, state: str, calls: int) -> float:
        events = _events(calls)
        for start, stop in events:
            call = work.prepare(kind, state)
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        milliseconds: float = sum(start.elapsed_time(stop) for start, stop in events)
        return milliseconds * 1e-3 / calls


def _events(count: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    return [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
