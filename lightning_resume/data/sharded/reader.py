"""Makes batches of lanes, in the main process or in a worker: as one plan after the other says."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, final

from lightning_resume.data.sample_rng import making
from lightning_resume.data.sharded import tail
from lightning_resume.data.sharded.columns import Columns
from lightning_resume.data.sharded.formats.rows import Row, table_of
from lightning_resume.data.sharded.grouping import Group, Unit
from lightning_resume.data.sharded.lanes import IN_TAIL, Cursor, Lane
from lightning_resume.data.sharded.parquet import to_batch
from lightning_resume.data.sharded.records import LaneReader, key_random_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a reading process is to do until the next plan. It travels to workers: plain values only.

    Attributes:
        number: Tells the answers to this plan from those to an earlier one.
        lanes: What the reader is told of each lane, and where it goes on.
        batch_size: Samples of one rank in one step.
        tail: Whether the lanes are read as one sequence, of which ``rank`` of ``world_size`` takes its part.
        every: In the tail, this process makes the steps ``first``, ``first + every``, ...
    """

    number: int
    lanes: Mapping[Lane, tuple[Any, Cursor]]
    batch_size: int
    drop_last: bool = False
    tail: bool = False
    rank: int = 0
    world_size: int = 1
    first: int = 0
    every: int = 1


class Answer(NamedTuple):
    """A batch, or what there is to say instead of one."""

    plan: int
    batch: Any
    changes: dict[str, list[int]]
    """The cursors that the batch moves, by lane."""
    ended: str = ""
    """The lane that has no more full batches; ``"all"``: nothing is left to do of the plan."""
    left: list[str] = []  # noqa: RUF012 - never changed
    """Lanes of what was too little for a step."""


ALL = "all"


@final
class Reader:
    """Carries out plans.

    Args:
        lanes: Reads lanes.
        group: Makes units of samples.
        collate: Makes a batch of a list of samples.
        collate_draws: Whether ``collate`` may draw random numbers, so that these have to be keyed.
        seed: Keys them.
    """

    def __init__(
        self, lanes: LaneReader, group: Group, collate: Callable[[list[Any]], Any], *, collate_draws: bool, seed: int
    ) -> None:
        self.lanes, self.group, self.collate, self.seed = lanes, group, collate, seed
        self._collate_draws = collate_draws
        self.draws = collate_draws or lanes.draws
        self._answers: Iterator[Answer] = iter(())
        self._plan = -1

    def answer(self, plan: Plan | None) -> Answer:
        """The next answer to ``plan``, or to the plan before when it is None."""
        if plan is not None:
            self.close()
            self._plan = plan.number
            self._answers = self._tail(plan) if plan.tail else self._turns(plan)
        with making():
            return next(self._answers, None) or Answer(self._plan, None, {}, ALL)

    def close(self) -> None:
        """Closes the files that are open."""
        self._answers = iter(())

    def _turns(self, plan: Plan) -> Iterator[Answer]:
        """Full batches; lanes take turns."""
        turns = [(cursor.turns, lane) for lane, (_, cursor) in plan.lanes.items()]
        heapq.heapify(turns)
        batches = {lane: self._full_batches(plan, lane) for lane in plan.lanes}
        while turns:
            count, lane = turns[0]
            units = next(batches[lane], None)
            if units is None:
                heapq.heappop(turns)
                yield Answer(plan.number, None, {}, lane.name)
                continue
            heapq.heapreplace(turns, (count + 1, lane))
            cursor = Cursor(count + 1, units[-1].after)
            yield Answer(plan.number, self._batch(units), {lane.name: cursor.to_plain()})

    def _full_batches(self, plan: Plan, lane: Lane) -> Iterator[list[Unit]]:
        size = 1 if self.group.makes_batches else plan.batch_size
        units: list[Unit] = []
        for unit in self._units(plan, lane):
            units.append(unit)
            if len(units) == size:
                yield units
                units = []

    def _units(self, plan: Plan, lane: Lane) -> Iterator[Unit]:
        told, cursor = plan.lanes[lane]
        key = (self.seed, lane.epoch)
        records = lambda where: self.lanes.records(told, where)  # noqa: E731
        return self.group.units(records, cursor.place, batch_size=plan.batch_size, key=key)

    def _tail(self, plan: Plan) -> Iterator[Answer]:
        """What is left of all lanes, one after the other."""
        units = (unit._replace(lane=lane.name) for lane in sorted(plan.lanes) for unit in self._units(plan, lane))
        for number, step in enumerate(self._steps(plan, units)):
            changes = {unit.lane: Cursor(IN_TAIL, unit.after).to_plain() for unit in step.units}
            if not step.parts:
                yield Answer(plan.number, None, {}, ALL, list(changes))
                return
            if number % plan.every == plan.first:
                yield Answer(plan.number, self._batch(step.parts[plan.rank]), changes)

    def _steps(self, plan: Plan, units: Iterator[Unit]) -> Iterator[tail.Step]:
        if self.group.makes_batches:
            return tail.batch_steps(units, world_size=plan.world_size, drop_last=plan.drop_last)
        return tail.sample_steps(
            units, world_size=plan.world_size, batch_size=plan.batch_size, drop_last=plan.drop_last
        )

    def _batch(self, units: list[Unit]) -> Any:
        if isinstance(self.collate, Columns):
            contents = [content for unit in units for content in unit.contents()]
            if all(isinstance(content, Row) for content in contents) and (table := table_of(contents)) is not None:
                return to_batch(table, self.collate.output)
        samples = [sample for unit in units for sample in unit.made()]
        if self._collate_draws:
            key_random_numbers("batch", self.seed, *units[0].identity)
        return self.collate(samples)
