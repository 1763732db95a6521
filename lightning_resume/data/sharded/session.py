"""The batches of one rank in what is left of one epoch: first those of its lanes, then its part of the tail."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple, final

from lightning_resume.data.sharded.lanes import IN_TAIL, Cursor, Lane
from lightning_resume.data.sharded.peers import Peers
from lightning_resume.data.sharded.processes import Processes
from lightning_resume.data.sharded.reader import ALL, Answer, Plan

Changes = dict[Lane, Cursor]


class Taken(NamedTuple):
    """A batch, and the cursors that it moves."""

    batch: Any
    changes: Changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """This rank's share of each step of the tail."""

    rank: int
    world_size: int
    batch_size: int
    drop_last: bool


_numbers = itertools.count()


@final
class Session:
    """Goes through the rest of an epoch.

    Where ranks have ``peers``, none takes a batch of its lanes before all are known to have one: they look a few
    batches ahead, and say how many these are. The first rank that runs out ends this part for all. What is then left of
    any lane is the tail, read by all ranks, of which each takes its part of every step.

    Args:
        processes: Make the batches.
        tell: What a process is told of a lane, to go on from a cursor.
        share: This rank's.
        peers: The other ranks; None where there are none, or where they cannot be asked.
        ahead: How many batches to look ahead for.
    """

    def __init__(
        self,
        processes: Processes,
        tell: Callable[[Lane, Cursor], Any],
        share: Share,
        *,
        peers: Peers | None,
        ahead: int,
    ) -> None:
        self._processes, self._tell, self._share, self._peers, self._ahead = processes, tell, share, peers, ahead
        self.left: list[Lane] = []
        """After the end: the lanes of which something is left, too little for a step."""
        self.read_by_all: Changes = {}
        """The lanes of the tail where it began."""

    def batches(self, mine: Mapping[Lane, Cursor], waiting: Mapping[Lane, Cursor]) -> Iterator[Taken]:
        """All batches that are left.

        Args:
            mine: The lanes of this rank that are read for themselves.
            waiting: Lanes that are part of the tail from the start: on all ranks the same.
        """
        lanes = dict(mine)
        for taken in self._agreed(mine) if self._peers is not None else self._turns(mine):
            lanes.update(taken.changes)
            yield taken
        if self._peers is not None:
            for of_rank in self._peers.gather({lane.name: cursor.to_plain() for lane, cursor in lanes.items()}):
                lanes.update({Lane.from_name(name): Cursor.from_plain(plain) for name, plain in of_rank.items()})
        yield from self.tail({**lanes, **waiting})

    def tail(self, lanes: Mapping[Lane, Cursor]) -> Iterator[Taken]:
        """The part of this rank in all that is left of ``lanes``."""
        everything = {lane: cursor._replace(turns=IN_TAIL) for lane, cursor in lanes.items()}
        self.read_by_all = everything
        self._start(
            [everything] * self._processes.count,
            tail=True,
            drop_last=self._share.drop_last,
            rank=self._share.rank,
            world_size=self._share.world_size,
        )
        steps = self._steps(everything)
        yield from steps if self._peers is None else self._together(steps)

    def _steps(self, everything: Changes) -> Iterator[Taken]:
        first = dict(everything)
        for step in itertools.count():
            answer = self._processes.answer(step % self._processes.count)
            if answer.ended:
                self.left = [Lane.from_name(name) for name in answer.left]
                return
            yield Taken(answer.batch, {**first, **_changes(answer)})
            first = {}

    def _together(self, steps: Iterator[Taken]) -> Iterator[Taken]:
        """The steps of the tail, which are as many on all ranks: asked after so that an error of one reaches all."""
        ready: collections.deque[Taken] = collections.deque()
        while True:
            self._look_ahead(steps, ready)
            self._smallest(len(ready))
            for _ in range(min(self._ahead, len(ready))):
                yield ready.popleft()
            if not ready:
                return

    def _turns(self, mine: Mapping[Lane, Cursor]) -> Generator[Taken, None, None]:
        """Full batches of the lanes, in turns."""
        order = sorted(mine)
        process_of = {lane: place % self._processes.count for place, lane in enumerate(order)}
        plans: list[dict[Lane, Cursor]] = [{} for _ in range(self._processes.count)]
        for lane in order:
            plans[process_of[lane]][lane] = mine[lane]
        self._start(plans)
        turns = [(mine[lane].turns, lane) for lane in order]
        heapq.heapify(turns)
        while turns:
            count, lane = turns[0]
            answer = self._processes.answer(process_of[lane])
            if answer.ended:
                assert answer.ended in (lane.name, ALL)
                heapq.heappop(turns)
                continue
            heapq.heapreplace(turns, (count + 1, lane))
            yield Taken(answer.batch, _changes(answer))

    def _agreed(self, mine: Mapping[Lane, Cursor]) -> Iterator[Taken]:
        """As many full batches as every rank has, but the last, of which the tail may need to be made."""
        assert self._peers is not None
        turns = self._turns(mine)
        ready: collections.deque[Taken] = collections.deque()
        while True:
            self._look_ahead(turns, ready)
            fewest = self._smallest(len(ready))
            for _ in range(fewest - 1):
                yield ready.popleft()
            if fewest <= self._ahead:
                turns.close()
                return

    def _look_ahead(self, turns: Iterator[Taken], ready: collections.deque[Taken]) -> None:
        assert self._peers is not None
        try:
            ready.extend(itertools.islice(turns, self._ahead + 1 - len(ready)))
        except Exception:
            self._peers.smallest(-1)  # the others are waiting for the answer
            raise

    def _smallest(self, ready: int) -> int:
        assert self._peers is not None
        fewest = self._peers.smallest(ready)
        if fewest < 0:
            raise RuntimeError("Another rank failed while it read its samples. Look for its error in its log.")
        return fewest

    def _start(self, lanes: list[dict[Lane, Cursor]], **options: Any) -> None:
        number = next(_numbers)
        self._processes.start(
            [
                Plan(
                    number=number,
                    lanes={lane: (self._tell(lane, cursor), cursor) for lane, cursor in of_process.items()},
                    batch_size=self._share.batch_size,
                    first=process,
                    every=self._processes.count,
                    **options,
                )
                for process, of_process in enumerate(lanes)
            ]
        )


def _changes(answer: Answer) -> Changes:
    return {Lane.from_name(name): Cursor.from_plain(plain) for name, plain in answer.changes.items()}
