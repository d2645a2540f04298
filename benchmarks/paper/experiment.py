"""What an experiment is: the rows of a table of the paper, and the task they are trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

Record = dict[str, Any]
# How long an experiment takes: as committed, under a minute for a reader, seconds for the tests.
SIZES = ("full", "quick", "tiny")


@dataclass(frozen=True)
class Row:
    """One network of a table.

    Args:
        name: in the table; results are filed under it.
        settings: what the network is, as JSON takes it: recorded with each run, and compared when a
            results file is continued.
        paper: the paper's numbers for its counterpart, by key of the metric, or by a title of their
            own that names data set and metric; without those it has not.
        unshared: name of the row that its memory and time stand beside, where that is not the
            experiment's.
    """

    name: str
    settings: Mapping[str, Any]
    paper: Mapping[str, float] = field(default_factory=dict)
    unshared: str = ""


@dataclass(frozen=True)
class Metric:
    """A column of a table: a number of a run's record.

    Args:
        key: in the record.
        title: of the column, with its unit.
        digits: after the point.
        higher: whether more is better.
    """

    key: str
    title: str
    digits: int = 1
    higher: bool = True


class Task(Protocol):
    """Data of one size, and a recipe that all rows of an experiment share."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Sizes, epochs, optimiser: recorded, and compared when a results file is continued."""

    @property
    def data(self) -> Mapping[str, Any]:
        """Name and sizes of the data, as the recipe."""

    def steps(self, row: Row) -> int:
        """Optimiser steps of one run, for the progress bar."""

    def build(self, row: Row, seed: int) -> nn.Module:
        """A fresh network on the CPU; the seed gives initial values, map and order of the data."""

    def run(self, row: Row, seed: int, on_step: Callable[[], object]) -> Record:
        """Build, train, test: every metric, and what else the pictures and plots need.

        Calls ``on_step`` after each optimiser step. Everything is as JSON takes it; a number that
        is not finite is None.
        """

    def training_step(self, model: nn.Module) -> Callable[[], object]:
        """A function that makes one step on one fixed batch, to be timed beside other networks'."""


@runtime_checkable
class Infers(Protocol):
    """A task whose costs have a forward without gradients too."""

    def inference(self, model: nn.Module) -> Callable[[], object]:
        """A function that runs one fixed batch, to be timed beside other networks'."""


@dataclass(frozen=True)
class Experiment:
    """A table of the paper.

    Args:
        name: of the command, and of the results file.
        title: of its page.
        rows: in the order of the table.
        metrics: of every run; the first is the one that the paper's order is about.
        unshared: name of the row that the others' memory and time stand beside.
        task: ``task(size, data)``: of one of ``SIZES``, from a file where the data are not made
            here; data is None for the experiment's own choice.
        pictures: ``pictures(records, folder)`` draws into a folder, from records alone, and
            returns markdown that shows them; None where there are none.
        text: what data, what network, what budget: markdown under the title.
        paper_data: data set of the paper's numbers that go by the key of a metric.
        quoted: rows of the paper that have no counterpart here; their settings are empty.
        also: names of experiments whose runs count here too, where row, seed, settings, recipe and
            data are the same.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...]
    unshared: str
    task: Callable[[str, str | None], Task]
    pictures: Callable[[list[Record], Path], str] | None = None
    text: str = ""
    paper_data: str = ""
    quoted: tuple[Row, ...] = ()
    also: tuple[str, ...] = ()
