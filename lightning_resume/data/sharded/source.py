"""The order of an indexed dataset as a source of requests: positions become rows of files."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from lightning_resume.data import order
from lightning_resume.data.randomness import Batch
from lightning_resume.data.sharded import listing
from lightning_resume.data.sharded.files import Difference, Shard, difference
from lightning_resume.data.sharded.order import ShardedOrder, lanes_visited
from lightning_resume.data.sharded.table import Table
from lightning_resume.data.source import Source
from lightning_resume.errors import CheckpointMismatchError

if TYPE_CHECKING:
    from lightning_resume.data.sharded.indexed import IndexedDataset

_DAMAGED = "the saved position is damaged or was edited: load another checkpoint"


@final
class ShardedSource(Source):
    """Rows of an :class:`~lightning_resume.data.sharded.indexed.IndexedDataset`.

    How many rows the files hold is asked for only when it is needed, and a saved state tells it: a run that goes on
    opens no file but those that it goes on in.

    Args:
        dataset: Whose rows they are.
        shuffle: False for the rows as they lie.
    """

    resume_cost = "opens the files that it goes on in, and reads a unit (row group) of each"
    state_size = "O(1), and the table of files"
    lazy = True

    def __init__(self, dataset: IndexedDataset, *, shuffle: bool) -> None:
        self.dataset, self.shuffle = dataset, shuffle
        self.kind = f"sharded {dataset.format.name}, {'shuffled' if shuffle else 'sequential'}"
        self._set_plan(dataset.options.lanes or 1, 1, dataset.options.window or 1)
        self._grown: list[tuple[int, int]] = []
        """From which epoch on how many of the table's shards are read; one entry unless files were appended."""

    @property
    def length(self) -> int:  # type: ignore[override]  # read only
        return self.length_of(self._grown[-1][0] if self._grown else 0)

    def length_of(self, epoch: int) -> int:
        table = self.dataset.table
        return int(table.shard_rows[: self._shards_of(epoch)].sum())

    def _shards_of(self, epoch: int) -> int:
        if not self._grown:
            self._grown = [(0, len(self.dataset.table.shards))]
        return self._grown[max(0, bisect.bisect([first for first, _ in self._grown], epoch) - 1)][1]

    def take(self, state: order.OrderState, start: int, stop: int) -> Batch:
        taken: list[int] = []
        epochs: list[int] = []
        epoch = state.epoch
        while start < 0:  # left over from earlier epochs, which may have had fewer files
            epoch -= 1
            start, stop = start + self.length_of(epoch), stop + self.length_of(epoch)
        while start < stop:
            length = self.length_of(epoch)
            if start < length:
                rows = self._order(epoch, state.seed).take(start, min(stop, length)).tolist()
                taken += rows
                epochs += [epoch] * len(rows)
            start, stop, epoch = max(0, start - length), stop - length, epoch + 1
        return Batch(taken, epochs, taken)

    def _order(self, epoch: int, seed: int) -> ShardedOrder:
        return _order_of(
            self.dataset.table,
            self._shards_of(epoch),
            self._lanes,
            self._block,
            self._window,
            seed,
            epoch,
            self.shuffle,
        )

    def plan(self, *, readers: int, batch_size: int) -> None:
        # as they lie, the rows come file by file: with more than one lane they would not
        lanes = self.dataset.options.lanes or (readers if self.shuffle else 1)
        self._set_plan(lanes, batch_size, self._window)

    def facts(self) -> Mapping[str, Any]:
        options = self.dataset.options
        return {"lanes": options.lanes, "window": options.window, "append_files": options.append_files}

    def agree(self, *, fresh: bool) -> None:
        of_all = listing.of_all_ranks(
            lambda: dataclasses.replace(self.dataset.files, shards=tuple(self.dataset.listed))
        )
        self.dataset.relist(of_all, fresh=fresh)
        if fresh:
            self._grown = []

    def _set_plan(self, lanes: int, block: int, window: int) -> None:
        self._lanes, self._block, self._window = lanes, block, window
        self.dataset.keep = lanes * window + 1

    def visit(self, starts: Sequence[int], *, steps_apart: int, batch: int) -> None:
        read = {"lanes": self._lanes, "block": self._block, "every": steps_apart, "batch": batch}
        self.dataset.keep = max(lanes_visited(start, **read) for start in starts) * self._window + 1

    def state_dict(self) -> dict[str, Any]:
        self._shards_of(0)
        plan = {"lanes": self._lanes, "block": self._block, "window": self._window}
        return {"table": self.dataset.table_bytes, "grown": [list(entry) for entry in self._grown], **plan}

    def check(self, state: Mapping[str, Any], saved: order.OrderState, current: order.OrderState) -> None:
        _plan_of(state)
        changed = difference(_saved_shards(state), self.dataset.listed)
        if changed and not (changed.only_added and self.dataset.options.append_files):
            raise CheckpointMismatchError(
                "loader",
                "files",
                saved=f"{len(_saved_shards(state))} files",
                current=f"{len(self.dataset.listed)} files below {self.dataset.files.root}: {changed}",
                advice=_advice(changed),
            )

    def load_state_dict(self, state: Mapping[str, Any], *, seed: int) -> None:
        plan, self._grown = _plan_of(state)
        self._set_plan(*plan)
        self.dataset.adopt(_saved_table(state["table"]), state["table"])

    def grow(self, epoch: int) -> bool:
        """Takes in, from ``epoch`` on, the files that have come since the state was saved."""
        grew = self.dataset.grow()
        if grew:
            self._grown.append((epoch, len(self.dataset.table.shards)))
        return grew

    def hint(self, state: Mapping[str, Any]) -> None:
        """Takes the numbers of rows from a state that may be loaded soon, if it tells them of these very files."""
        if "table" in state and not difference(_saved_shards(state), self.dataset.listed):
            self.dataset.adopt(_saved_table(state["table"]), state["table"])


@functools.lru_cache(maxsize=4)  # the current epoch and its neighbours, in training and in validation
def _order_of(
    table: Table, shards: int, lanes: int, block: int, window: int, seed: int, epoch: int, shuffle: bool
) -> ShardedOrder:
    return ShardedOrder(
        table, shards=shards, lanes=lanes, block=block, window=window, seed=seed, epoch=epoch, shuffle=shuffle
    )


@functools.lru_cache(maxsize=4)
def _saved_table(data: bytes) -> Table:
    return Table.from_bytes(data)


def _saved_shards(state: Mapping[str, Any]) -> Sequence[Shard]:
    return _saved_table(state["table"]).shards


def _plan_of(state: Mapping[str, Any]) -> tuple[tuple[int, int, int], list[tuple[int, int]]]:
    """Lanes, block and window, and from which epoch on how many shards are read."""
    plan = _count(state, "lanes"), _count(state, "block"), _count(state, "window")
    grown = [(int(epoch), int(shards)) for epoch, shards in state["grown"]]
    known = [shards for _, shards in grown]
    if (
        not grown
        or grown[0][0] != 0
        or grown != sorted(grown)
        or known[-1] > len(_saved_shards(state))
        or min(known) < 1
    ):
        raise ValueError(f"position in the data: grown is {grown}; {_DAMAGED}")
    return plan, grown


def _count(state: Mapping[str, Any], name: str) -> int:
    value = state[name]
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"position in the data: {name} is {value!r}, but must be at least 1; {_DAMAGED}")
    return value


def _advice(changed: Difference) -> str:
    if changed.only_added:
        return (
            "Files have come since. Pass `append_files=True` to finish this epoch without them and read them from the"
            " next one on, or take them away."
        )
    return (
        "Another set of files is another order: samples would repeat or be lost. Put the files back as they were, or"
        " start anew. (`fabric.load(..., strict=False)` leaves this loader's position out.)"
    )
