"""The order of rows in indexed shards: a pure function of a table, a seed and an epoch, with random access.

The shards come in a permuted order, within a shard its windows of units do, and within a window its rows do. This
sequence is cut into lanes of equal length, which take turns by blocks: with a lane for each process that reads and a
block for each batch, a process reads rows of its own lanes only, so that no two open the same unit. At another topology
the order is the same, and only more units are opened.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from typing import NamedTuple, final

import numpy as np

from lightning_resume.data.order import Permutation
from lightning_resume.data.sharded.table import Rows, Table

_WINDOWS_KEPT = 256
_TURNS_TRIED = 8
"""For each lane, before all are taken to be visited."""


class Window(NamedTuple):
    """Units of one shard whose rows are shuffled together."""

    units: Rows
    starts: Rows
    """Where in the window each unit begins, and its length at the end."""
    rows: Permutation | None
    """None for the order in which they lie."""


class ShardLayout(NamedTuple):
    windows: tuple[Rows, ...]
    """The units of each window, in the order of the epoch."""
    starts: Rows
    """Where in the shard each window begins, and its length at the end."""


@final
class ShardedOrder:
    """Which row lies at each position of one epoch.

    Args:
        table: Shards, units and their rows.
        shards: How many of the table's shards belong to this epoch; the first ones.
        lanes: Number of lanes.
        block: Positions that a lane gives in each of its turns.
        window: Units of a shard that are shuffled together.
        seed: Key of the order.
        epoch: Another one is another order.
        shuffle: False for the rows as they lie.
    """

    def __init__(
        self, table: Table, *, shards: int, lanes: int, block: int, window: int, seed: int, epoch: int, shuffle: bool
    ) -> None:
        self._table, self._window, self._seed, self._epoch, self._shuffle = table, window, seed, epoch, shuffle
        self._lanes, self._block = lanes, block
        self._shards = _permuted(shards, seed, epoch) if shuffle else np.arange(shards, dtype=np.int64)
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(table.shard_rows[self._shards])])
        self._lane_rows = int(self._starts[-1]) // (lanes * block) * block
        self._layout = functools.lru_cache(maxsize=_WINDOWS_KEPT)(self._make_layout)
        self._rows_of = functools.lru_cache(maxsize=_WINDOWS_KEPT)(self._make_window)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, start: int, stop: int) -> Rows:
        """The rows, counted over the whole table, at positions ``[start, stop)``.

        Raises:
            IndexError: The positions are not a part of the epoch.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions [{start}, {stop}) are outside an epoch of {len(self)} rows")
        places = self._places(np.arange(start, stop, dtype=np.int64))
        rows = np.empty_like(places)
        edges = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
        for first, end in itertools.pairwise(edges):
            if first < end:
                self._fill(rows[first:end], int(places[first]))
        return rows

    def _places(self, positions: Rows) -> Rows:
        """Where in the sequence of all shards the lanes that take turns are at ``positions``."""
        blocks, offset = np.divmod(positions, self._block)
        turn, lane = np.divmod(blocks, self._lanes)
        # what does not fill a turn of all lanes comes at the end, in one piece
        in_turns = positions < self._lane_rows * self._lanes
        return np.where(in_turns, lane * self._lane_rows + turn * self._block + offset, positions)

    def _fill(self, rows: Rows, place: int) -> None:
        """Writes the rows from ``place`` of the sequence on, a window at a time."""
        done = 0
        while done < len(rows):
            turn = int(np.searchsorted(self._starts, place + done, side="right")) - 1
            shard, within = int(self._shards[turn]), place + done - int(self._starts[turn])
            layout = self._layout(shard)
            number = int(np.searchsorted(layout.starts, within, side="right")) - 1
            window, first = self._rows_of(shard, number), within - int(layout.starts[number])
            count = min(len(rows) - done, int(window.starts[-1]) - first)
            rows[done : done + count] = self._in_window(window, first, first + count)
            done += count

    def _in_window(self, window: Window, first: int, end: int) -> Rows:
        local = np.arange(first, end, dtype=np.int64) if window.rows is None else window.rows.take(first, end)
        which = np.searchsorted(window.starts, local, side="right") - 1
        return self._table.first_row[window.units[which]] + local - window.starts[which]

    def _make_layout(self, shard: int) -> ShardLayout:
        first, end = int(self._table.first_unit[shard]), int(self._table.first_unit[shard + 1])
        units = np.arange(first, end, dtype=np.int64)
        if self._shuffle:
            units = units[_permuted(end - first, _key("units", self._seed, shard), self._epoch)]
        windows = tuple(units[at : at + self._window] for at in range(0, end - first, self._window))
        lengths = [int(self._table.unit_rows[window].sum()) for window in windows]
        return ShardLayout(windows, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))

    def _make_window(self, shard: int, number: int) -> Window:
        units = self._layout(shard).windows[number]
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._table.unit_rows[units])])
        seed = _key("rows", self._seed, shard, number)
        rows = Permutation(int(starts[-1]), seed=seed, epoch=self._epoch) if self._shuffle and starts[-1] else None
        return Window(units, starts, rows)


def lanes_visited(start: int, *, lanes: int, block: int, every: int, batch: int) -> int:
    """How many lanes have rows at ``batch`` positions from ``start`` on, and from every ``every`` positions later."""
    seen: set[int] = set()
    # they come again after so many, if it has not been seen before that it is all of them
    for turn in range(min(lanes * block // math.gcd(every, lanes * block), _TURNS_TRIED * lanes)):
        first = start + turn * every
        seen.update(number % lanes for number in range(first // block, (first + batch - 1) // block + 1)[:lanes])
        if len(seen) == lanes:
            return lanes
    return len(seen) if lanes * block // math.gcd(every, lanes * block) <= _TURNS_TRIED * lanes else lanes


def _permuted(length: int, seed: int, epoch: int) -> Rows:
    return Permutation(length, seed=seed, epoch=epoch).take(0, length) if length else np.empty(0, dtype=np.int64)


def _key(*parts: object) -> int:
    """A seed from a hash of ``parts``: sums would alias."""
    text = "lightning_resume.sharded.v1/" + "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
