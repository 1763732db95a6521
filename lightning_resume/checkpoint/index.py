"""The index: where every stored item lies and what it hashes to, found without reading what is not asked for.

DCP's ``.metadata`` is one pickle, which every rank would have to unpickle whole: 11 s for 1000 tensors of 256 ranks.
The index says the same in columns of numbers. A load reads its head (names, shapes, files), then, of each tensor that
it wants, the rows of those shards that overlap with what it wants. ``docs/format.md`` gives the bytes.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from lightning_resume.checkpoint._dcp import ObjectPath
from lightning_resume.checkpoint.index_form import (
    INTEGER,
    MAGIC,
    PREAMBLE,
    ROW,
    Array,
    Box,
    Placed,
    name_of_rank,
    of_rank,
)
from lightning_resume.checkpoint.names import LEAF_PREFIX
from lightning_resume.checkpoint.stored import DIGEST_BYTES, StoredItem, block_count

_DTYPES: Mapping[str, torch.dtype] = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and str(value) == f"torch.{name}"
}
# their scales are no part of what is stored
_QUANTIZED = ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")
_MAX_COUNT = 2**62
_MAX_BYTES = 2**63 - 1  # beyond which torch makes no tensor, not even an empty one
_MAX_DIMENSIONS = 64  # of which NumPy and most of torch have no more

_FEW_BYTES = 2**12  # are read whole rather than searched

_Digests: TypeAlias = Callable[[int, int], bytes]


@dataclass(frozen=True, kw_only=True)
class KeyInfo:
    """What the head says of one key, and where its rows and their numbers begin, which follows from those before it."""

    path: ObjectPath
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    count: int
    along: int
    largest: int
    first: int
    dimensions: int

    @property
    def nbytes(self) -> int:
        """Of a tensor, all of its data."""
        return 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize


class Index:
    """An index that is read as it is asked.

    Args:
        read: Returns so many bytes from an offset of the file, verified.
        size: Bytes of the file.
        file_sizes: Bytes of every file that items may lie in, by name.

    Raises:
        ValueError: It is not what :func:`build_index` writes; says what is wrong. So does every method.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, file_sizes: Mapping[str, int]) -> None:
        self._read = read
        magic, length = PREAMBLE.unpack(read(0, PREAMBLE.size)) if size >= PREAMBLE.size else (b"", 0)
        _require(magic == MAGIC, "its first bytes")
        _require(length <= size - PREAMBLE.size, "the length of its head")
        head = _Head.of(read(PREAMBLE.size, length))
        rows, dimensions, digests = head.sections
        self._rows = PREAMBLE.size + length
        self._dimensions = self._rows + rows
        self._digests = self._dimensions + dimensions
        _require(self._digests + digests == size, "the lengths of its sections")
        _require(rows == head.rows * ROW.itemsize, "the number of its rows")
        _require(dimensions == head.dimensions * INTEGER.itemsize, "the number of its dimensions")
        _require(digests % DIGEST_BYTES == 0, "the number of its hashes")
        self._digest_count = digests // DIGEST_BYTES
        _require(set(head.files) <= file_sizes.keys(), "a file that the manifest does not name")
        self.files = head.files
        self.keys = head.keys
        self._row_count = head.rows
        self._leaves = head.leaves
        self._sizes = [file_sizes[name] for name in head.files]
        claimed = sum(info.nbytes for info in head.keys.values())
        # so that however many of them a load makes, they take no more memory than the checkpoint's files
        _require(claimed <= self.nbytes, f"tensors of {claimed} bytes in files of {self.nbytes} bytes")

    @property
    def nbytes(self) -> int:
        """Of all files that items lie in."""
        return sum(self._sizes)

    @cached_property
    def leaves(self) -> list[str]:
        """The names of all leaves."""
        return sorted(group.name_of(number) for group in self._leaves.values() for number in range(group.info.count))

    def leaf(self, key: str) -> Placed | None:
        """The item of one leaf."""
        if key in self._leaves and self._leaves[key].ranks is None:
            return self._placed(self._leaves[key].info, 0, 1)[0]
        name, rank = of_rank(key) or (key, 0)
        group = self._leaves.get(name)
        if group is None or group.ranks is None or rank >= group.ranks:
            return None
        return self._placed(group.info, rank, 1)[0]

    def items(self, key: str, box: Box | None = None) -> list[Placed]:
        """The items of ``key`` that overlap with ``box``, by default all."""
        info = self.keys[key]
        if box is None or not info.shape:
            return self._placed(info, 0, info.count)
        start, size = box[0][info.along], box[1][info.along]
        first, end = self._candidates(info, start, start + size)
        return self._placed(info, first, end - first, box)

    def of_file(self, number: int) -> list[tuple[str, StoredItem]]:
        """All items of one file in the order in which they lie there, each with its key."""
        rows, order, edges, digests = self._by_file
        found = order[edges[number] : edges[number + 1]].tolist()
        return [(self._name_of_row(row), self._item(rows[row], digests)) for row in found]

    @cached_property
    def _by_file(self) -> tuple[Array, Array, Array, _Digests]:
        """All rows, their order by file and offset, where each file's begin in that order, and all digests.

        For who reads everything: by the page, each file would read nearly every page again.
        """
        rows = self._numbers(self._rows, ROW, 0, self._row_count)
        order = np.lexsort((rows["offset"], rows["file"]))
        edges = np.searchsorted(rows["file"][order], np.arange(len(self.files) + 1))
        whole = self._read(self._digests, self._digest_count * DIGEST_BYTES)
        return rows, order, edges, lambda first, count: whole[first * DIGEST_BYTES :][: count * DIGEST_BYTES]

    @cached_property
    def _starts(self) -> tuple[list[int], list[_Leaf | str]]:
        """Where the rows of each key and leaf begin, and which it is; those without rows are left out."""
        whose: list[tuple[int, _Leaf | str]] = [(info.first, key) for key, info in self.keys.items() if info.count]
        whose += [(group.info.first, group) for group in self._leaves.values()]
        return [first for first, _ in whose], [what for _, what in whose]

    def _name_of_row(self, row: int) -> str:
        starts, whose = self._starts
        place = bisect_right(starts, row) - 1
        found = whose[place]
        return found if isinstance(found, str) else found.name_of(row - starts[place])

    def _candidates(self, info: KeyInfo, start: int, stop: int) -> tuple[int, int]:
        """The rows that may reach into ``start`` to ``stop`` along the dimension by which they are sorted."""
        columns = 2 * len(info.shape)
        wanted = start - info.largest + 1
        if info.count * columns * INTEGER.itemsize <= _FEW_BYTES:
            begins = self._boxes(info, 0, info.count)[:, info.along]
            first, end = (int(row) for row in np.searchsorted(begins, [wanted, stop]))
        else:
            begin = lambda row: int(self._boxes(info, row, 1)[0, info.along])  # noqa: E731
            # shards are mostly of about one size
            first = _bisect(begin, info.count, wanted, near=info.count * start // max(1, info.shape[info.along]))
            end = _bisect(begin, info.count, stop, near=first)
        return first, max(first, end)  # of what is not sorted, anything comes back

    def _placed(self, info: KeyInfo, first: int, count: int, box: Box | None = None) -> list[Placed]:
        """``count`` items from the ``first``, those of them that overlap with ``box``."""
        boxes = self._boxes(info, first, count)
        wanted = np.arange(count) if box is None else np.flatnonzero(_overlapping(boxes, box))
        if not wanted.size:
            return []
        begin, end = int(wanted[0]), int(wanted[-1]) + 1
        rows = self._numbers(self._rows, ROW, info.first + first + begin, end - begin)
        return [self._checked(info, rows[number - begin], boxes[number].tolist()) for number in wanted.tolist()]

    def _checked(self, info: KeyInfo, row: Any, numbers: list[int]) -> Placed:
        """One item, once it is found to be a part of its tensor, and of its file."""
        ndim = len(info.shape)
        offsets, sizes = tuple(numbers[:ndim]), tuple(numbers[ndim:])
        item, file = self._item(row, self._digests_of), int(row["file"])
        if info.dtype is not None:
            inside = all(o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(offsets, sizes, info.shape, strict=True))
            _require(inside, f"a shard of shape {sizes} at {offsets} in {info.shape}")
            _require(
                item.data == math.prod(sizes) * info.dtype.itemsize, f"a shard of {item.data} bytes of shape {sizes}"
            )
        return Placed(file=file, item=item, box=(offsets, sizes))

    def _item(self, row: Any, digests_of: _Digests) -> StoredItem:
        file, head, offset, length, data, digest = row.item()
        _require(file < len(self._sizes), f"the file number {file}")
        _require(offset + length <= self._sizes[file], "an item beyond its file")
        _require(head + data <= length, "an item of more data than bytes")
        count = 2 + block_count(data)
        _require(digest + count <= self._digest_count, "an item without hashes")
        return StoredItem(offset=offset, length=length, head=head, data=data, digests=digests_of(digest, count))

    def _digests_of(self, first: int, count: int) -> bytes:
        return self._read(self._digests + first * DIGEST_BYTES, count * DIGEST_BYTES)

    def _boxes(self, info: KeyInfo, first: int, count: int) -> Array:
        columns = 2 * len(info.shape)
        numbers = self._numbers(self._dimensions, INTEGER, info.dimensions + first * columns, count * columns)
        return numbers.reshape(count, columns)

    def _numbers(self, section: int, dtype: np.dtype[Any], first: int, count: int) -> Array:
        return np.frombuffer(self._read(section + first * dtype.itemsize, count * dtype.itemsize), dtype)


def _bisect(value: Callable[[int], int], count: int, wanted: int, *, near: int) -> int:
    """The first of ``count`` sorted values that is not below ``wanted``; looked for from ``near`` on, ever farther."""
    low, high, step = 0, count, 1
    probe = min(max(near, 0), count - 1)
    while low < high:
        if value(probe) < wanted:
            low, probe = probe + 1, probe + step
        else:
            high, probe = probe, probe - step
        step *= 2
        if not low <= probe < high:
            probe = (low + high) // 2
    return low


def _overlapping(boxes: Array, box: Box) -> Array:
    """Which of ``boxes`` overlap with ``box``; sums that overflow are of boxes that are refused later on."""
    begins, sizes = boxes[:, : len(box[0])], boxes[:, len(box[0]) :]
    start, size = np.array(box[0], INTEGER), np.array(box[1], INTEGER)
    return cast(Array, np.all((begins < start + size) & (start < begins + sizes), axis=1))


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """A leaf, or one that each of so many ranks has."""

    name: str
    ranks: int | None
    info: KeyInfo

    def name_of(self, number: int) -> str:
        """Of its item of this number."""
        return self.name if self.ranks is None else name_of_rank(self.name, number)


@dataclass(kw_only=True)
class _Head:
    """The names and shapes at the beginning of an index, checked."""

    files: list[str]
    sections: list[int]
    keys: dict[str, KeyInfo] = field(default_factory=dict)
    leaves: dict[str, _Leaf] = field(default_factory=dict)
    rows: int = 0
    dimensions: int = 0

    @classmethod
    def of(cls, text: bytes) -> _Head:
        try:
            body = json.loads(str(text, "utf-8"))  # of bytes, json would guess at other encodings
            head = cls(files=_texts(body["files"]), sections=[_count(section) for section in body["sections"]])
            for key, path, dtype, shape, count, along, largest in body["keys"]:
                head._add_key(key, path, dtype, shape, [_count(number) for number in (count, along, largest)])
            for name, ranks in body["leaves"]:
                head._add_leaf(name, None if ranks is None else _count(ranks))
            head._check_leaves()
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"its head: {type(error).__name__}: {error}") from error
        _require(len(head.sections) == 3, "the number of its sections")
        _require(len(set(head.files)) == len(head.files), "a file that is named twice")
        return head

    def _add_key(self, key: Any, path: Any, dtype: Any, shape: Any, numbers: list[int]) -> None:
        _require(isinstance(key, str) and key not in self.keys, "a key that is no text, or there twice")
        _require(isinstance(path, list) and len(path) > 0 and all(type(part) in (str, int) for part in path), "a path")
        _require(dtype is None or (dtype in _DTYPES and dtype not in _QUANTIZED), f"the dtype {str(dtype)[:50]!r}")
        _require(isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS, "a shape")
        kind, sizes = None if dtype is None else _DTYPES[dtype], tuple(map(_count, shape))
        _require(kind is not None or not sizes, "an object with a shape")
        strides = math.prod(max(size, 1) for size in sizes) * (1 if kind is None else kind.itemsize)
        _require(strides <= _MAX_BYTES, f"the shape {sizes}")
        count, along, largest = numbers
        _require(along < max(1, len(sizes)), f"the dimension {along} of {len(sizes)}")
        self.keys[key] = self._next(tuple(path), kind, sizes, count, along, largest)

    def _add_leaf(self, name: Any, ranks: int | None) -> None:
        _require(isinstance(name, str) and name.startswith(LEAF_PREFIX), "a leaf that has no leaf's name")
        _require(name not in self.leaves and name not in self.keys, f"two values of the name {name!r}")
        _require(ranks != 0, f"a leaf {name!r} of no rank")
        info = self._next((name,), None, (), 1 if ranks is None else ranks, 0, 0)
        self.leaves[name] = _Leaf(name=name, ranks=ranks, info=info)

    def _next(
        self, path: ObjectPath, dtype: torch.dtype | None, shape: tuple[int, ...], count: int, along: int, largest: int
    ) -> KeyInfo:
        first, dimensions = self.rows, self.dimensions
        self.rows += count
        self.dimensions += count * 2 * len(shape)
        return KeyInfo(
            path=path,
            dtype=dtype,
            shape=shape,
            count=count,
            along=along,
            largest=largest,
            first=first,
            dimensions=dimensions,
        )

    def _check_leaves(self) -> None:
        for name in (*self.leaves, *self.keys):
            match = of_rank(name)
            group = self.leaves.get(match[0]) if match else None
            inside = match is not None and group is not None and group.ranks is not None and match[1] < group.ranks
            _require(not inside, f"two values of the name {name!r}")


def _texts(values: Iterable[Any]) -> list[str]:
    texts = list(values)
    _require(all(isinstance(text, str) for text in texts), "a name that is no text")
    return texts


def _count(value: Any) -> int:
    _require(type(value) is int and 0 <= value < _MAX_COUNT, f"the number {str(value)[:50]}")
    return int(value)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
