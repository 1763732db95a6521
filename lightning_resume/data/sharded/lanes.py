"""Which lane reads which part of which file in which order: a pure function of files, seed, epoch and lanes."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lightning_resume.data.order import Permutation
from lightning_resume.data.sharded.files import Shard
from lightning_resume.data.sharded.formats.format import Piece

_UNEVEN = 1.25
"""Files are split where the fullest lane would otherwise have so many times what each lane should have."""
_PIECES_PER_LANE = 2

IN_TAIL, OVER, LEFT = -1, -2, -3
"""Stand in a cursor for the number of turns: the lane is in the tail; its epoch is over; over, with something left."""


class Lane(NamedTuple):
    """A lane of one epoch."""

    epoch: int
    number: int

    @property
    def name(self) -> str:
        return f"{self.epoch}/{self.number}"

    @classmethod
    def from_name(cls, name: str) -> Lane:
        epoch, number = name.split("/")
        return cls(int(epoch), int(number))


class Cursor(NamedTuple):
    """How far a lane has come. All that a state says of it: nothing of the content."""

    turns: int = 0
    """Batches that it has given in this epoch, or what stands for it."""
    place: tuple[int, ...] = ()
    """Where what reads the lane goes on; empty at the lane's begin."""

    def to_plain(self) -> list[int]:
        return [self.turns, *self.place]

    @classmethod
    def from_plain(cls, values: Sequence[Any]) -> Cursor:
        return cls(int(values[0]), tuple(int(value) for value in values[1:]))


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The lanes of a rank."""
    return range(rank, lanes, world_size)


def deal(
    shards: Sequence[Shard], *, lanes: int, seed: int, epoch: int, shuffle: bool, can_split: Callable[[str], bool]
) -> list[tuple[Piece, ...]]:
    """Deals the files to lanes that are about equal in bytes.

    Files come in permuted order (as they lie where ``shuffle`` is false), each to the lane with the fewest bytes, the
    largest first; a lane then has its own in permuted order. Where lanes would be uneven, files that can be split are.
    """
    pieces = [Piece(shard.path, shard.size, 0, shard.size) for shard in shards]
    dealt = _dealt(pieces, lanes=lanes, seed=seed, epoch=epoch, shuffle=shuffle)
    target = sum(shard.size for shard in shards) / lanes
    if max(map(_bytes, dealt)) <= _UNEVEN * target or not any(can_split(shard.path) for shard in shards):
        return dealt
    most = math.ceil(target / _PIECES_PER_LANE) or 1
    split = [part for piece in pieces for part in (_split(piece, most) if can_split(piece.path) else [piece])]
    return _dealt(split, lanes=lanes, seed=seed, epoch=epoch, shuffle=shuffle)


def _dealt(pieces: Sequence[Piece], *, lanes: int, seed: int, epoch: int, shuffle: bool) -> list[tuple[Piece, ...]]:
    order = Permutation(len(pieces), seed=seed, epoch=epoch).take(0, len(pieces)) if shuffle else np.arange(len(pieces))
    sizes = np.array([pieces[index].stop - pieces[index].start for index in order], dtype=np.int64)
    loads = [(0, lane) for lane in range(lanes)]
    mine: list[list[int]] = [[] for _ in range(lanes)]
    for turn in np.argsort(-sizes, kind="stable").tolist():
        load, lane = loads[0]
        mine[lane].append(turn)
        # a file of no bytes counts, too: it is opened
        heapq.heapreplace(loads, (load + int(sizes[turn]) + 1, lane))
    return [tuple(pieces[order[turn]] for turn in sorted(turns)) for turns in mine]


def _split(piece: Piece, most: int) -> list[Piece]:
    count = max(1, math.ceil(piece.size / most))
    edges = [piece.size * n // count for n in range(count + 1)]
    return [piece._replace(start=start, stop=stop) for start, stop in itertools.pairwise(edges)]


def _bytes(pieces: Sequence[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in pieces)
