"""The records of one lane in the order of the epoch, from any of them on."""

from __future__ import annotations

import abc
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

from lightning_resume.data.order import Permutation
from lightning_resume.data.randomness import keyed_seed
from lightning_resume.data.sample_rng import now_making
from lightning_resume.data.sharded.blocks import Place
from lightning_resume.data.sharded.files import Files
from lightning_resume.data.sharded.formats.format import Format, Piece
from lightning_resume.state import rng

LEFT_OUT = object()
"""Stands where a sample would be that the filter leaves out."""

Where = tuple[int, ...]
"""Where in a lane reading goes on; empty for its begin."""


class Found(NamedTuple):
    """A record that has not been decoded yet."""

    maker: Maker
    content: Any
    identity: tuple[int, str, int]
    """Epoch, file and key: what its random numbers are keyed by, whoever reads it, wherever the files lie."""
    url: str
    """What to call the file in a message."""
    before: Where
    after: Where


def key_random_numbers(*key: object) -> None:
    """Seeds all generators for what is made next, those that ``sample_rng()`` gives too."""
    rng.seed_all(keyed_seed(*key))
    now_making(key, [key])


class Maker:
    """Makes samples of records: decodes, selects columns, filters, transforms. Runs where the batch is made.

    Args:
        decode: Of content, file and key.
        columns: Which entries of a dict are kept; all when None.
        filter: Of a sample; see :class:`~lightning_resume.data.sharded.dataset.Options`.
        transform: Of a sample.
        seed: Keys the random numbers.
        decode_draws: Whether ``decode`` is the user's, too.
    """

    def __init__(
        self,
        decode: Callable[[Any, str, int], Any],
        *,
        columns: Sequence[str] | None = None,
        filter: Callable[[Any], bool] | None = None,
        transform: Callable[[Any], Any] | None = None,
        seed: int = 0,
        decode_draws: bool = False,
    ) -> None:
        self._decode, self._columns, self.filter, self._transform = decode, columns, filter, transform
        self._seed, self._decode_draws = seed, decode_draws

    @property
    def draws(self) -> bool:
        """Whether anything of the user's runs that may draw random numbers."""
        return self._decode_draws or self.filter is not None or self._transform is not None

    def kept(self, found: Found) -> Any:
        """The sample before its transform, or ``LEFT_OUT``."""
        if self._decode_draws:
            key_random_numbers("item", self._seed, *found.identity)
        sample = self._decode(found.content, found.url, found.identity[2])
        if self._columns is not None:
            sample = _selected(sample, self._columns, found.url)
        if self.filter is None:
            return sample
        key_random_numbers("filter", self._seed, *found.identity)
        return sample if self.filter(sample) else LEFT_OUT

    def content_of(self, found: Found) -> Any:
        """What lies in the file, where the sample is no more than that."""
        return found.content if self._transform is None else None

    def transformed(self, found: Found, sample: Any) -> Any:
        if self._transform is None:
            return sample
        key_random_numbers("sample", self._seed, *found.identity)
        return self._transform(sample)


class LaneReader(abc.ABC):
    """Reads lanes, in the process that makes the batches; what differs from epoch to epoch comes with ``lane``."""

    draws: bool
    """Whether samples may draw random numbers."""

    @abc.abstractmethod
    def records(self, lane: Any, where: Where) -> Iterator[Found]:
        """The records of a lane from ``where`` on; ``lane`` is what the main process says of it."""


class FileLane(NamedTuple):
    """What the reading process is told of a lane: plain values that can be sent."""

    epoch: int
    first: int
    """Number of the first piece: those before it are finished."""
    pieces: tuple[Piece, ...]


@final
class FileReader(LaneReader):
    """Reads lanes of files."""

    def __init__(
        self, files: Files, format: Format, maker: Maker, *, window: int | None, shuffle: bool, seed: int
    ) -> None:
        self._files, self._format, self._maker = files, format, maker
        self._window, self._shuffle, self._seed = window or format.default_window, shuffle, seed
        self.draws = maker.draws

    def records(self, lane: FileLane, where: Where) -> Iterator[Found]:
        number, entry, offset, served = where or begin_of(lane, lane.first)
        place = Place(entry, offset)
        for number in range(number, lane.first + len(lane.pieces)):  # noqa: B020 - goes on from where it is
            piece = lane.pieces[number - lane.first]
            url = posixpath.join(self._files.root, piece.path)
            for window in self._format.windows(self._files, piece, place, self._window):
                order = self._order(lane.epoch, piece.path, window.place, len(window.contents))
                following = begin_of(lane, number + 1) if window.end is None else (number, *window.end, 0)
                before = (number, *window.place, served)
                for turn in range(served, len(order)):
                    last = turn + 1 == len(order)
                    after = following if last else (number, *window.place, turn + 1)
                    index = order[turn]
                    identity = (lane.epoch, piece.path, window.keys[index])
                    yield Found(self._maker, window.contents[index], identity, url, before, after)
                    before = after
                served = 0
            _, *start, served = begin_of(lane, number + 1)
            place = Place(*start)

    def _order(self, epoch: int, path: str, place: Place, length: int) -> Sequence[int]:
        if not self._shuffle or not length:
            return range(length)
        seed = keyed_seed("window", self._seed, path, *place)
        order: list[int] = Permutation(length, seed=seed, epoch=epoch).take(0, length).tolist()
        return order


def begin_of(lane: FileLane, number: int) -> tuple[int, int, int, int]:
    """Where reading begins in a piece; beyond the last, what says that the lane is finished."""
    within = number - lane.first
    return (number, *(lane.pieces[within].begin if within < len(lane.pieces) else (0, 0)), 0)


def _selected(sample: Any, columns: Sequence[str], path: str) -> dict[str, Any]:
    if not isinstance(sample, Mapping):
        raise ValueError(f"{path}: a sample is a {type(sample).__name__}, which has no columns. Leave `columns` out.")
    missing = [name for name in columns if name not in sample]
    if missing:
        raise ValueError(f"{path}: a sample has no column {missing[0]!r}; it has {list(sample)}. Correct `columns`.")
    return {name: sample[name] for name in columns}
