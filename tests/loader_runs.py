"""Runs over a loader that a subclass makes: uninterrupted, resumed, recorded at every step."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_resume.data.order import Tail
from lightning_resume.data.position import Resumable
from tests.killed_consumer import PREFETCH
from tests.simulated_ranks import Point, Ranks, Topology, bits
from tests.toy_data import reseed

ALONE, WITH_WORKERS, TWO_RANKS = Topology(), Topology(num_workers=2), Topology(world_size=2)

Step = tuple[int, list[Any]]
"""An epoch, and what each rank got."""


class LoaderRuns:
    """What :class:`tests.conformance.LoaderConformance` does with a loader; see there for what a subclass gives."""

    length: int | None
    unique = True
    of_one_length = True
    """Whether each epoch holds ``length`` samples; a mixture's end where a dataset does."""
    evens_out = False
    """Whether it repeats samples in every epoch so that the ranks' parts are equal."""
    piece = 1
    """So many of what ``ids`` counts come together only, as the tokens of a packed row do."""
    epochs = 3
    endless_steps = 10
    """How far a stream without end is followed."""
    tail = Tail.EVEN
    workers: Sequence[int] = (0, 2)
    world_sizes: Sequence[int] = (1, 2, 3)
    batch_sizes: Sequence[int] = (4, 3, 7)
    ends_alike = True
    """Whether its state at the end of an epoch has the same bits where it was resumed when nothing was left of it."""
    called: Mapping[str, str] = {}
    """What an error calls the ``world_size``, ``num_workers`` or ``batch_size`` that is not the saved one."""

    # -- what a subclass gives

    def prepare(self, folder: Path) -> None:
        """Writes the data, once per class."""

    def make(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        batch_size: int = 4,
        seed: int = 3,
        folder: Path,
        prefetch_factor: int | None = None,
    ) -> Resumable:
        raise NotImplementedError

    def ids(self, batch: Any) -> list[int]:
        raise NotImplementedError

    def noise(self, batch: Any) -> list[Any] | None:
        raise NotImplementedError

    def content(self, batch: Any) -> Any:
        return bits(batch)

    # -- runs

    def loader(self, topology: Topology, folder: Path, rank: int = 0) -> Resumable:
        """A fresh loader of one rank; the global generators are somewhere else each time."""
        reseed(random.getrandbits(31))
        prefetch = PREFETCH if topology.num_workers else None
        return self.make(rank=rank, folder=folder, prefetch_factor=prefetch, **dataclasses.asdict(topology))

    def begun(self, topology: Topology, folder: Path) -> Ranks:
        return Ranks([self.loader(topology, folder, rank) for rank in range(topology.world_size)])

    def resumed(self, point: Point, topology: Topology, folder: Path) -> Ranks:
        run = self.begun(topology, folder)
        run.load(point)
        return run

    def over(self, run: Ranks, epochs: int | None = None) -> bool:
        return run.ended >= (self.epochs if epochs is None else epochs) or (
            self.length is None and run.taken >= self.endless_steps
        )

    def steps(self, run: Ranks, epochs: int | None = None) -> Iterator[tuple[int, list[Any] | None]]:
        """The rest of the run: the epoch and the batches of each step, and ``None`` at the end of each epoch."""
        while not self.over(run, epochs):
            epoch = run.ended
            batches = run.step()
            yield epoch, batches

    def rest(self, run: Ranks, epochs: int | None = None) -> list[Step]:
        steps = self.steps(run, epochs)
        return [(epoch, list(map(self.content, batches))) for epoch, batches in steps if batches is not None]

    def record(self, topology: Topology, folder: Path) -> tuple[list[Step], list[Point]]:
        """An uninterrupted run, and every moment that it could be saved at."""
        run = self.begun(topology, folder)
        whole: list[Step] = []
        points = [run.point()]
        for epoch, batches in self.steps(run):
            if batches is not None:
                whole.append((epoch, list(map(self.content, batches))))
            points.append(run.point())
        return whole, points

    def middle(self, folder: Path) -> tuple[list[Step], list[Point]]:
        """An uninterrupted run alone, and its points after the first step of epoch 0 and the second of epoch 1."""
        whole, points = self.record(ALONE, folder)
        first = sum(epoch == 0 for epoch, _ in whole)
        second = first + 2 if self.length is not None else 3
        return whole, [point for point in points if point.taken in (1, second)]
