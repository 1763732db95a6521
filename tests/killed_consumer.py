"""A training loop in a process of its own that writes down each step after it, and is killed somewhere."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import time
from pathlib import Path
from typing import Any

from tests.harness import die, die_after
from tests.simulated_ranks import Point, Ranks, stored

PREFETCH = 16
SECONDS_PER_STEP = 0.005  # a consumer so slow that the workers have fetched all that they may


@dataclasses.dataclass(kw_only=True)
class Progress:
    """What a run has done, and what it goes on from."""

    steps: list[Any] = dataclasses.field(default_factory=list)
    """Of each step the epoch and the content of its batch."""
    ended: int = 0
    state: Any = None


@dataclasses.dataclass(frozen=True)
class Record:
    """The file that holds the progress: at every moment all of one step, or all of the next."""

    path: Path

    def read(self) -> Progress:
        return pickle.loads(self.path.read_bytes()) if self.path.exists() else Progress()

    def write(self, progress: Progress) -> None:
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_bytes(pickle.dumps(progress))
        unfinished.replace(self.path)


def consume(*, folder: Path, case: str, data: Path, num_workers: int, epochs: int, kill: dict[str, Any] | None) -> None:
    """Goes on with the run to its end, or until it is killed so many seconds after step ``kill["step"]`` began."""
    module, _, name = case.partition(":")
    suite = getattr(importlib.import_module(module), name)()
    suite.epochs = epochs
    record = Record(folder / "record")
    progress = record.read()
    loader = suite.make(num_workers=num_workers, folder=data, prefetch_factor=PREFETCH if num_workers else None)
    run = Ranks([loader])
    if progress.state is not None:
        run.load(Point(taken=len(progress.steps), ended=progress.ended, states=[progress.state]))
    doomed = kill is not None
    while not suite.over(run):
        if kill and run.taken >= kill["step"]:
            die_after(kill["seconds"])
            kill = None
        epoch, batches = run.ended, run.step()
        progress.steps += [] if batches is None else [(epoch, suite.content(batches[0]))]
        progress.ended, progress.state = run.ended, stored(loader.state_dict())
        record.write(progress)
        time.sleep(SECONDS_PER_STEP)
    if doomed:  # it was faster than its death
        die()
