"""Where batches are made: in this process, or in workers, each of which has lanes of its own.

Every worker is a ``DataLoader`` of one worker process, so that its batches can be asked for in the order of the lanes,
whatever the number of workers; what a ``DataLoader`` does for its workers is torch's: prefetching, pinned memory,
errors, timeouts, their end.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lightning_resume.data.sharded.reader import Answer, Plan, Reader
from lightning_resume.state import rng


class Processes(abc.ABC):
    """The processes that make batches, each with a plan of its own."""

    count: int

    @abc.abstractmethod
    def start(self, plans: list[Plan]) -> None:
        """Gives every process its plan, instead of the one before."""

    @abc.abstractmethod
    def answer(self, process: int) -> Answer:
        """The next answer of a process to its plan."""

    @abc.abstractmethod
    def rest(self) -> None:
        """Says that no plan is open: what is held for it is let go."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends what has been started."""


@final
class ThisProcess(Processes):
    """Makes batches where they are asked for; nobody outside notices that random numbers were drawn."""

    count = 1

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._plan: Plan | None = None

    def start(self, plans: list[Plan]) -> None:
        (self._plan,) = plans

    def answer(self, process: int) -> Answer:
        plan, self._plan = self._plan, None
        if not self._reader.draws:
            return self._reader.answer(plan)
        with rng.apart():
            return self._reader.answer(plan)

    def rest(self) -> None:
        self._reader.close()

    close = rest


@final
class Workers(Processes):
    """Worker processes.

    Args:
        reader: What each of them runs.
        dataset: What ``get_worker_info().dataset`` is there.
        count: How many.
        worker_init_fn: The user's.
        persistent: Whether they go on to the next epoch.
        options: For each ``DataLoader``.
    """

    def __init__(
        self,
        reader: Reader,
        dataset: Any,
        count: int,
        *,
        worker_init_fn: Callable[[int], None] | None,
        persistent: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.count, self._persistent = count, persistent
        self._requests = [Requests() for _ in range(count)]
        self._plans = [-1] * count
        # the seed of a worker matters to nobody: what is drawn there is keyed by sample
        self._loaders: list[DataLoader[Any]] = [
            DataLoader(
                Remote(reader),
                batch_size=None,
                sampler=self._requests[number],
                num_workers=1,
                collate_fn=_as_it_is,
                worker_init_fn=functools.partial(_begin, worker_init_fn, number, count, dataset),
                generator=torch.Generator().manual_seed(number),
                **options,
            )
            for number in range(count)
        ]
        self._open: list[Iterator[Any]] = []

    def start(self, plans: list[Plan]) -> None:
        for requests, plan in zip(self._requests, plans, strict=True):
            requests.pending = plan
        self._plans = [plan.number for plan in plans]
        if not self._open:
            with rng.preserved():
                self._open = [iter(loader) for loader in self._loaders]

    def answer(self, process: int) -> Answer:
        while True:
            answer = Answer(*next(self._open[process]))
            if answer.plan == self._plans[process]:  # what was asked for ahead of the plan is no answer to it
                return answer

    def rest(self) -> None:
        if not self._persistent:
            self.close()

    def close(self) -> None:
        for batches in self._open:
            batches._shutdown_workers()  # type: ignore[attr-defined]
        self._open = []


@final
class Requests:
    """The sampler of a worker's ``DataLoader``: a plan when there is one, and the wish for more of it."""

    def __init__(self) -> None:
        self.pending: Plan | None = None

    def __iter__(self) -> Iterator[Plan | None]:
        while True:
            plan, self.pending = self.pending, None
            yield plan


@final
class Remote(Dataset[Any]):
    """The reader as a dataset that is asked in a worker."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, plan: Plan | None) -> Any:
        return self.reader.answer(plan)


def _as_it_is(answer: Any) -> Any:
    return answer


def _begin(worker_init_fn: Callable[[int], None] | None, number: int, count: int, dataset: Any, _only_one: int) -> None:
    """Makes the worker look like one of all, which has the user's dataset, and runs the user's function."""
    info = get_worker_info()
    assert info is not None
    for name, value in {"id": number, "num_workers": count, "dataset": dataset}.items():
        object.__setattr__(info, name, value)  # WorkerInfo refuses ordinary assignment
    if worker_init_fn is not None:
        worker_init_fn(number)
