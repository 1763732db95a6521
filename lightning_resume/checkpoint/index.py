"""The index: where every stored item lies and what it hashes to, found without reading what is not asked for.

DCP's ``.metadata`` is one pickle, which every rank would have to unpickle whole: 11 s for 1000 tensors of 256 ranks.
The index says the same in columns of numbers. A load reads its head (names, shapes, files), then, of each tensor that
it wants, the rows of those shards that overlap with what it wants. ``docs/format.md`` gives the bytes.
"""

from __future__ import annotations

import json
import math
import re
import struct
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch

from lightning_resume.checkpoint._dcp import ObjectPath
from lightning_resume.checkpoint.names import LEAF_PREFIX
from lightning_resume.checkpoint.stored import DIGEST_BYTES, StoredItem, block_count

PAGE_BYTES = 2**16
"""The index is hashed in pages, so that a part of it can be verified."""

_MAGIC = b"LRindex1"
_PREAMBLE = struct.Struct("<8sQ")
_ROW = np.dtype(
    [("file", "<u4"), ("head", "<u4"), ("offset", "<u8"), ("length", "<u8"), ("data", "<u8"), ("digest", "<u8")]
)
_INTEGER = np.dtype("<i8")
_PAGES = 64  # of the last that were used are kept
_PIECES = 4  # of those read at once, since a load goes through three sections side by side
_OF_RANK = re.compile(r"(.+)\.rank_([0-9]{5,18})", re.DOTALL)
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

_Array: TypeAlias = np.ndarray[Any, Any]
_Digests: TypeAlias = Callable[[int, int], bytes]
Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""A part of a tensor: where it begins and its sizes, in elements along each dimension."""


class Placed(NamedTuple):
    """One stored item: its file by number, where it lies there, and, of a tensor, which part it is."""

    # no dataclass: a save of 1024 ranks makes a million of them, each in a third of the time
    file: int
    item: StoredItem
    box: Box = ((), ())


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One key: where it belongs in the nested state, the dtype and shape of a tensor, and its items."""

    path: ObjectPath
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    items: Sequence[Placed]


def build_index(files: Sequence[str], entries: Mapping[str, Entry], leaves: Mapping[str, Placed]) -> bytes:
    """The bytes of the index over ``entries`` and over the opaque ``leaves``, both by key."""
    table = _Table()
    keys = [
        [key, list(entry.path), _name_of(entry.dtype), entry.shape, *table.add(entry.items, len(entry.shape))]
        for key, entry in entries.items()
    ]
    grouped = []
    for leaf, placed in _grouped(leaves):
        table.add(placed, 0)
        grouped.append(leaf)
    head = {"files": list(files), "keys": keys, "leaves": grouped}
    return _joined(head, [table.rows(), table.dimensions(), table.digests()])


def _name_of(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _joined(head: Mapping[str, Any], sections: Sequence[bytes]) -> bytes:
    text = json.dumps({**head, "sections": [len(section) for section in sections]}, separators=(",", ":")).encode()
    return b"".join([_PREAMBLE.pack(_MAGIC, len(text)), text, *sections])


class _Table:
    """The rows of all items so far."""

    def __init__(self) -> None:
        self._items: list[Placed] = []
        self._boxes: list[bytes] = []

    def add(self, items: Sequence[Placed], ndim: int) -> list[int]:
        """Adds the items of one key; returns their number, the dimension along which they are sorted, and the largest
        size along it.
        """
        boxes = np.array([placed.box for placed in items], _INTEGER).reshape(len(items), 2, ndim)
        if ndim == 0 or not items:
            self._items += items
            return [len(items), 0, 0]
        begins = boxes[:, 0]
        along = max(range(ndim), key=lambda dimension: np.unique(begins[:, dimension]).size)
        order = np.lexsort((*begins.T[::-1], begins[:, along]))  # the last one counts first
        self._items += [items[number] for number in order.tolist()]
        self._boxes.append(boxes[order].tobytes())
        return [len(items), along, int(boxes[:, 1, along].max())]

    def rows(self) -> bytes:
        items = [placed.item for placed in self._items]
        rows = np.empty(len(items), _ROW)
        rows["file"] = [placed.file for placed in self._items]
        rows["head"] = [item.head for item in items]
        rows["offset"] = [item.offset for item in items]
        rows["length"] = [item.length for item in items]
        rows["data"] = [item.data for item in items]
        counts = np.array([len(item.digests) // DIGEST_BYTES for item in items], "<u8")
        rows["digest"] = np.cumsum(counts) - counts
        return rows.tobytes()

    def dimensions(self) -> bytes:
        return b"".join(self._boxes)

    def digests(self) -> bytes:
        return b"".join([placed.item.digests for placed in self._items])


def _grouped(leaves: Mapping[str, Placed]) -> Iterator[tuple[tuple[str, int | None], list[Placed]]]:
    """Leaves by name: of what every rank has, all together and how many; of anything else one by one."""
    of_ranks: dict[str, dict[int, Placed]] = {}
    for key, placed in leaves.items():
        match = _of_rank(key)
        if match is None:
            yield (key, None), [placed]
        else:
            of_ranks.setdefault(match[0], {})[match[1]] = placed
    for name, by_rank in of_ranks.items():
        if name not in leaves and sorted(by_rank) == list(range(len(by_rank))):
            yield (name, len(by_rank)), [by_rank[rank] for rank in range(len(by_rank))]
        else:
            yield from (((_name_of_rank(name, rank), None), [placed]) for rank, placed in by_rank.items())


def _of_rank(key: str) -> tuple[str, int] | None:
    """The name of a leaf without its rank, and the rank; None of a leaf that is no rank's."""
    match = _OF_RANK.fullmatch(key)
    return (match[1], int(match[2])) if match and key == _name_of_rank(match[1], int(match[2])) else None


def _name_of_rank(name: str, rank: int) -> str:
    return f"{name}.rank_{rank:05d}"


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
        magic, length = _PREAMBLE.unpack(read(0, _PREAMBLE.size)) if size >= _PREAMBLE.size else (b"", 0)
        _require(magic == _MAGIC, "its first bytes")
        _require(length <= size - _PREAMBLE.size, "the length of its head")
        head = _Head.of(read(_PREAMBLE.size, length))
        rows, dimensions, digests = head.sections
        self._rows = _PREAMBLE.size + length
        self._dimensions = self._rows + rows
        self._digests = self._dimensions + dimensions
        _require(self._digests + digests == size, "the lengths of its sections")
        _require(rows == head.rows * _ROW.itemsize, "the number of its rows")
        _require(dimensions == head.dimensions * _INTEGER.itemsize, "the number of its dimensions")
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
        name, rank = _of_rank(key) or (key, 0)
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
    def _by_file(self) -> tuple[_Array, _Array, _Array, _Digests]:
        """All rows, their order by file and offset, where each file's begin in that order, and all digests.

        For who reads everything: by the page, each file would read nearly every page again.
        """
        rows = self._numbers(self._rows, _ROW, 0, self._row_count)
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
        if info.count * columns * _INTEGER.itemsize <= 2 * PAGE_BYTES:
            begins = self._boxes(info, 0, info.count)[:, info.along]
            first, end = (int(row) for row in np.searchsorted(begins, [wanted, stop]))
        else:
            begin = lambda row: int(self._boxes(info, row, 1)[0, info.along])  # noqa: E731
            first, end = _bisect(begin, info.count, wanted), _bisect(begin, info.count, stop)
        return first, max(first, end)  # of what is not sorted, anything comes back

    def _placed(self, info: KeyInfo, first: int, count: int, box: Box | None = None) -> list[Placed]:
        """``count`` items from the ``first``, those of them that overlap with ``box``."""
        boxes = self._boxes(info, first, count)
        wanted = np.arange(count) if box is None else np.flatnonzero(_overlapping(boxes, box))
        if not wanted.size:
            return []
        begin, end = int(wanted[0]), int(wanted[-1]) + 1
        rows = self._numbers(self._rows, _ROW, info.first + first + begin, end - begin)
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

    def _boxes(self, info: KeyInfo, first: int, count: int) -> _Array:
        columns = 2 * len(info.shape)
        numbers = self._numbers(self._dimensions, _INTEGER, info.dimensions + first * columns, count * columns)
        return numbers.reshape(count, columns)

    def _numbers(self, section: int, dtype: np.dtype[Any], first: int, count: int) -> _Array:
        return np.frombuffer(self._read(section + first * dtype.itemsize, count * dtype.itemsize), dtype)


def _bisect(value: Callable[[int], int], count: int, wanted: int) -> int:
    """The first of ``count`` sorted values that is not below ``wanted``."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if value(middle) < wanted:
            low = middle + 1
        else:
            high = middle
    return low


def _overlapping(boxes: _Array, box: Box) -> _Array:
    """Which of ``boxes`` overlap with ``box``; sums that overflow are of boxes that are refused later on."""
    begins, sizes = boxes[:, : len(box[0])], boxes[:, len(box[0]) :]
    start, size = np.array(box[0], _INTEGER), np.array(box[1], _INTEGER)
    return cast(_Array, np.all((begins < start + size) & (start < begins + sizes), axis=1))


class Pages:
    """A file that is read by pages, each verified before it is used; the last ones are kept.

    Args:
        read: Returns so many bytes from an offset.
        check: Is given the number of a page and its bytes; raises where they are not what was saved.
        size: Bytes of the file.
        at_once: Pages that are asked for at once. Those that nobody uses are not verified.
    """

    def __init__(
        self, read: Callable[[int, int], bytes], check: Callable[[int, bytes], None], size: int, *, at_once: int = 1
    ) -> None:
        self._read, self._check, self._size, self._at_once = read, check, size, at_once
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._ahead: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
        with self._lock:
            parts = [self._page(number) for number in range(first, last + 1)]
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        start = offset - first * PAGE_BYTES
        return whole[start : start + length]

    def _page(self, number: int) -> bytes:
        if number not in self._kept:
            page = self._read_page(number)
            self._check(number, page)
            self._kept[number] = page
            if len(self._kept) > _PAGES:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(number)
        return self._kept[number]

    def _read_page(self, number: int) -> bytes:
        piece, place = divmod(number, self._at_once)
        if piece not in self._ahead:
            start, length = piece * self._at_once * PAGE_BYTES, self._at_once * PAGE_BYTES
            self._ahead[piece] = self._read(start, min(length, self._size - start))
            if len(self._ahead) > _PIECES:
                self._ahead.popitem(last=False)
        return self._ahead[piece][place * PAGE_BYTES : (place + 1) * PAGE_BYTES]


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """A leaf, or one that each of so many ranks has."""

    name: str
    ranks: int | None
    info: KeyInfo

    def name_of(self, number: int) -> str:
        """Of its item of this number."""
        return self.name if self.ranks is None else _name_of_rank(self.name, number)


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
            body = json.loads(text)
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
            match = _of_rank(name)
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
