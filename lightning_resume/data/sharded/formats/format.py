"""What a format has to say of its files so that they can be read from any record on."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from lightning_resume.data.sharded.blocks import Place
from lightning_resume.data.sharded.files import Files

LARGEST_WINDOW = 1 << 25
"""Bytes after which a window ends although it could hold more records: what a lane keeps in memory."""


class Piece(NamedTuple):
    """The part of a file that one lane reads: the records that begin in bytes ``[start, stop)``."""

    path: str
    size: int
    """Of the whole file."""
    start: int
    stop: int

    @property
    def begin(self) -> Place:
        return Place(0, self.start)


class Record(NamedTuple):
    """One record as it lies in the file."""

    key: int
    """Known by this in its file, wherever reading began."""
    content: Any
    weight: int
    """Bytes."""
    end: Place
    """Where reading goes on after it."""


class Window(NamedTuple):
    """Records that are shuffled together."""

    place: Place
    keys: Sequence[int]
    contents: Sequence[Any]
    end: Place | None
    """Where the next window begins; None at the end of the piece."""


class Format(abc.ABC):
    """Reads the records of one kind of file."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    default_window: ClassVar[int] = 1024
    resume_cost: ClassVar[str] = (
        "opens the one file that each lane is in, where it was, and reads at most a window again; .gz files of one"
        " member, and .zst files of one frame, from their start"
    )

    def can_split(self, path: str) -> bool:
        """Whether parts of the file can be read for themselves."""
        return False

    @abc.abstractmethod
    def windows(self, files: Files, piece: Piece, place: Place, size: int) -> Iterator[Window]:
        """The windows of ``piece`` from ``place`` on, which is its begin or where an earlier window ended."""

    @abc.abstractmethod
    def decode(self, content: Any, url: str, key: int) -> Any:
        """The sample of a record.

        Raises:
            ValueError: It cannot be read; names the file and the byte.
        """


def cut(records: Iterable[Record], place: Place, size: int) -> Iterator[Window]:
    """Makes windows of ``size`` records, or of fewer where they are large."""
    keys: list[int] = []
    contents: list[Any] = []
    weight, end = 0, place
    for record in records:
        if len(contents) == size or weight >= LARGEST_WINDOW:
            yield Window(place, keys, contents, end)
            place, keys, contents, weight = end, [], [], 0
        keys.append(record.key)
        contents.append(record.content)
        weight += record.weight
        end = record.end
    if contents:
        yield Window(place, keys, contents, None)
