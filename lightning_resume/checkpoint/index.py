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
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch

from lightning_resume.checkpoint._dcp import ObjectPath
from lightning_resume.checkpoint.stored import DIGEST_BYTES, StoredItem, block_count

PAGE_BYTES = 2**16
"""The index is hashed in pages, so that a part of it can be verified."""

_MAGIC = b"LRindex1"
_PREAMBLE = struct.Struct("<8sQ")
_ROW = np.dtype(
    [("file", "<u4"), ("head", "<u4"), ("offset", "<u8"), ("length", "<u8"), ("data", "<u8"), ("digest", "<u8")]
)
_INTEGER = np.dtype("<i8")
_PAGES = 64  # of the last that were read are kept
_OF_RANK = re.compile(r"(.+)\.rank_(\d{5,})")
_DTYPES: Mapping[str, torch.dtype] = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and str(value) == f"torch.{name}"
}
# their scales are no part of what is stored
_QUANTIZED = ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")
_MAX_COUNT = 2**62

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""A part of a tensor: where it begins and its sizes, in elements along each dimension."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One stored item: its file by number, where it lies there, and, of a tensor, which part it is."""

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
        [key, list(entry.path), _name_of(entry.dtype), entry.shape, *table.add(entry.items)]
        for key, entry in entries.items()
    ]
    head = {
        "files": list(files),
        "keys": keys,
        "leaves": [[*leaf, *table.add(placed)] for leaf, placed in _grouped(leaves)],
    }
    return _joined(head, [table.rows(), table.dimensions(), b"".join(table.digests)])


def _name_of(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _joined(head: Mapping[str, Any], sections: Sequence[bytes]) -> bytes:
    text = json.dumps({**head, "sections": [len(section) for section in sections]}, separators=(",", ":")).encode()
    return _PREAMBLE.pack(_MAGIC, len(text)) + text + b"".join(sections)


class _Table:
    """The rows of all items so far."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._dimensions: list[int] = []
        self.digests: list[bytes] = []
        self._digests = 0

    def add(self, items: Sequence[Placed]) -> list[int]:
        """Adds the items of one key; returns their first row, their number, the place of the first one's numbers among
        the dimensions, and the largest size along the first dimension.
        """
        first = [len(self._rows), len(items), len(self._dimensions)]
        for placed in sorted(items, key=lambda placed: placed.box[0]):
            item = placed.item
            self._rows.append((placed.file, item.head, item.offset, item.length, item.data, self._digests))
            self._dimensions += [*placed.box[0], *placed.box[1]]
            self.digests.append(item.digests)
            self._digests += len(item.digests) // DIGEST_BYTES
        return [*first, max((placed.box[1][0] for placed in items if placed.box[1]), default=0)]

    def rows(self) -> bytes:
        return np.array(self._rows, _ROW).tobytes()

    def dimensions(self) -> bytes:
        return np.array(self._dimensions, _INTEGER).tobytes()


def _grouped(leaves: Mapping[str, Placed]) -> Iterator[tuple[tuple[str, int | None], list[Placed]]]:
    """Leaves by name: of what every rank has, all together and how many; of anything else one by one."""
    of_ranks: dict[str, dict[int, Placed]] = {}
    for key, placed in leaves.items():
        match = _OF_RANK.fullmatch(key)
        if match and key == f"{match[1]}.rank_{int(match[2]):05d}":
            of_ranks.setdefault(match[1], {})[int(match[2])] = placed
        else:
            yield (key, None), [placed]
    for name, by_rank in of_ranks.items():
        if sorted(by_rank) == list(range(len(by_rank))):
            # an order among the rows is made by boxes, of which these have none that differ
            yield (name, len(by_rank)), [by_rank[rank] for rank in range(len(by_rank))]
        else:
            yield from (((f"{name}.rank_{rank:05d}", None), [placed]) for rank, placed in by_rank.items())


@dataclass(frozen=True, kw_only=True)
class KeyInfo:
    """What the head says of one key."""

    path: ObjectPath
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    first: int
    count: int
    dimensions: int
    largest: int


class Index:
    """An index that is read as it is asked.

    Args:
        read: Returns so many bytes from an offset of the file, verified.
        size: Bytes of the file.
        file_sizes: Bytes of every file that items may lie in, by name.

    Raises:
        ValueError: It is not what :func:`build_index` writes; says what is wrong.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, file_sizes: Mapping[str, int]) -> None:
        self._read = read
        magic, length = _PREAMBLE.unpack(read(0, _PREAMBLE.size)) if size >= _PREAMBLE.size else (b"", 0)
        _require(magic == _MAGIC, "its first bytes")
        _require(length <= size - _PREAMBLE.size, "the length of its head")
        head = _Head.of(read(_PREAMBLE.size, length))
        starts = [_PREAMBLE.size + length]
        for section in head.sections:
            starts.append(starts[-1] + section)
        _require(starts[-1] == size, "the lengths of its sections")
        self._rows, self._dimensions, self._digests = starts[:3]
        self._counts = (head.sections[0] // _ROW.itemsize, head.sections[1] // _INTEGER.itemsize)
        self._digest_count = head.sections[2] // DIGEST_BYTES
        _require(set(head.files) <= set(file_sizes), "a file that the manifest does not name")
        self.files = head.files
        self._sizes = [file_sizes[name] for name in head.files]
        self.keys = head.keys
        self._leaves = head.leaves
        for info in (*self.keys.values(), *(info for _, info in self._leaves.values())):
            self._check_place(info)

    @cached_property
    def leaves(self) -> list[str]:
        """The names of all leaves."""
        names = []
        for name, (ranks, _) in self._leaves.items():
            names += [name] if ranks is None else [f"{name}.rank_{rank:05d}" for rank in range(ranks)]
        return sorted(names)

    def leaf(self, key: str) -> Placed | None:
        """The item of one leaf."""
        if key in self._leaves and self._leaves[key][0] is None:
            return self._placed(self._leaves[key][1], 0, 1)[0]
        match = _OF_RANK.fullmatch(key)
        ranks, info = self._leaves.get(match[1], (None, None)) if match else (None, None)
        if match is None or ranks is None or info is None or int(match[2]) >= ranks:
            return None
        return self._placed(info, int(match[2]), 1)[0]

    def items(self, key: str, box: Box | None = None) -> list[Placed]:
        """The items of ``key`` that overlap with ``box``, by default all."""
        info = self.keys[key]
        if box is None or not info.shape:
            return self._placed(info, 0, info.count)
        first, end = self._candidates(info, box[0][0], box[0][0] + box[1][0])
        return [placed for placed in self._placed(info, first, end - first) if _overlap(placed.box, box)]

    def of_file(self, number: int) -> list[StoredItem]:
        """All items of one file, in the order in which they lie there."""
        rows = self._numbers(self._rows, _ROW, 0, self._counts[0])
        found = rows[rows["file"] == number]
        return [self._item(row) for row in found[np.argsort(found["offset"], kind="stable")]]

    def names_of_items(self) -> dict[tuple[int, int], str]:
        """The key of every item, by the number of its file and its offset there."""
        rows = self._numbers(self._rows, _ROW, 0, self._counts[0])
        found: dict[tuple[int, int], str] = {}
        for key, info in self.keys.items():
            found |= dict.fromkeys(_places(rows[info.first : info.first + info.count]), key)
        for name, (ranks, info) in self._leaves.items():
            for rank, place in enumerate(_places(rows[info.first : info.first + info.count])):
                found[place] = name if ranks is None else f"{name}.rank_{rank:05d}"
        return found

    def _candidates(self, info: KeyInfo, start: int, stop: int) -> tuple[int, int]:
        """The rows, sorted by where they begin along the first dimension, that may reach into ``start`` to ``stop``."""
        columns = 2 * len(info.shape)
        if info.count * columns * _INTEGER.itemsize <= 2 * PAGE_BYTES:
            begins = self._boxes(info, 0, info.count)[:, 0]
            first, end = np.searchsorted(begins, [start - info.largest + 1, stop], side="left")
            return int(first), int(end)
        begin = lambda row: int(self._boxes(info, row, 1)[0, 0])  # noqa: E731
        first = _bisect(begin, info.count, start - info.largest + 1)
        return first, _bisect(begin, info.count, stop)

    def _placed(self, info: KeyInfo, first: int, count: int) -> list[Placed]:
        rows = self._numbers(self._rows, _ROW, info.first + first, count)
        boxes = self._boxes(info, first, count) if info.shape else np.zeros((count, 0), _INTEGER)
        return [self._checked(info, row, numbers.tolist()) for row, numbers in zip(rows, boxes, strict=True)]

    def _checked(self, info: KeyInfo, row: Any, numbers: list[int]) -> Placed:
        """One item, once it is found to be a part of its tensor, and of its file."""
        ndim = len(info.shape)
        offsets, sizes = tuple(numbers[:ndim]), tuple(numbers[ndim:])
        item, file = self._item(row), int(row["file"])
        if info.dtype is not None:
            inside = all(o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(offsets, sizes, info.shape, strict=True))
            _require(inside, f"a shard of shape {sizes} at {offsets} in {info.shape}")
            _require(
                item.data == math.prod(sizes) * info.dtype.itemsize, f"a shard of {item.data} bytes of shape {sizes}"
            )
        return Placed(file=file, item=item, box=(offsets, sizes))

    def _item(self, row: Any) -> StoredItem:
        file, head, offset, length, data, digest = (int(value) for value in row)
        _require(file < len(self._sizes), f"the file number {file}")
        _require(
            max(offset, length, data) < _MAX_COUNT and offset + length <= self._sizes[file], "an item beyond its file"
        )
        _require(head + data <= length, "an item of more data than bytes")
        count = 2 + block_count(data)
        _require(digest + count <= self._digest_count, "an item without hashes")
        digests = self._read(self._digests + digest * DIGEST_BYTES, count * DIGEST_BYTES)
        return StoredItem(offset=offset, length=length, head=head, data=data, digests=digests)

    def _boxes(self, info: KeyInfo, first: int, count: int) -> np.ndarray[Any, Any]:
        columns = 2 * len(info.shape)
        numbers = self._numbers(self._dimensions, _INTEGER, info.dimensions + first * columns, count * columns)
        return numbers.reshape(count, columns)

    def _numbers(self, section: int, dtype: np.dtype[Any], first: int, count: int) -> np.ndarray[Any, Any]:
        return np.frombuffer(self._read(section + first * dtype.itemsize, count * dtype.itemsize), dtype)

    def _check_place(self, info: KeyInfo) -> None:
        rows, dimensions = self._counts
        _require(info.first + info.count <= rows, "rows beyond their section")
        needed = info.count * 2 * len(info.shape)
        _require(info.dimensions + needed <= dimensions, "numbers beyond their section")


def _places(rows: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    return list(zip(rows["file"].tolist(), rows["offset"].tolist(), strict=True))


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


def _overlap(one: Box, other: Box) -> bool:
    return all(
        start < start_2 + size_2 and start_2 < start + size
        for start, size, start_2, size_2 in zip(*one, *other, strict=True)
    )


class Pages:
    """A file that is read by pages, each verified before it is used; the last ones are kept.

    Args:
        read: Returns so many bytes from an offset.
        check: Is given the number of a page and its bytes; raises where they are not what was saved.
        size: Bytes of the file.
    """

    def __init__(self, read: Callable[[int, int], bytes], check: Callable[[int, bytes], None], size: int) -> None:
        self._read, self._check, self._size = read, check, size
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def __call__(self, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
        parts = [self._page(number) for number in range(first, last + 1)]
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        start = offset - first * PAGE_BYTES
        return whole[start : start + length]

    def _page(self, number: int) -> bytes:
        if number not in self._kept:
            start = number * PAGE_BYTES
            page = self._read(start, min(PAGE_BYTES, self._size - start))
            self._check(number, page)
            self._kept[number] = page
            if len(self._kept) > _PAGES:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(number)
        return self._kept[number]


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The names and shapes at the beginning of an index, checked."""

    files: list[str]
    sections: list[int]
    keys: dict[str, KeyInfo] = field(default_factory=dict)
    leaves: dict[str, tuple[int | None, KeyInfo]] = field(default_factory=dict)

    @classmethod
    def of(cls, text: bytes) -> _Head:
        try:
            body = json.loads(text)
            keys = {str(key): _key(*rest) for key, *rest in body["keys"]}
            leaves = {
                str(name): (None if ranks is None else _count(ranks), _key([name], None, [], *rest))
                for name, ranks, *rest in body["leaves"]
            }
            head = cls(
                files=_texts(body["files"]), sections=list(map(_count, body["sections"])), keys=keys, leaves=leaves
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"its head: {type(error).__name__}: {error}") from error
        _require(len(head.sections) == 3, "the number of its sections")
        return head


def _key(path: Any, dtype: Any, shape: Any, first: Any, count: Any, dimensions: Any, largest: Any) -> KeyInfo:
    _require(isinstance(path, list) and len(path) > 0 and all(type(part) in (str, int) for part in path), "a path")
    _require(dtype is None or (dtype in _DTYPES and dtype not in _QUANTIZED), f"the dtype {dtype!r}")
    sizes = tuple(map(_count, shape))
    kind = None if dtype is None else _DTYPES[dtype]
    _require(
        math.prod(max(size, 1) for size in sizes) * (1 if kind is None else kind.itemsize) < 2**63, f"the shape {sizes}"
    )
    numbers = [_count(number) for number in (first, count, dimensions, largest)]
    return KeyInfo(
        path=tuple(path),
        dtype=kind,
        shape=sizes,
        first=numbers[0],
        count=numbers[1],
        dimensions=numbers[2],
        largest=numbers[3],
    )


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
