"""Reads a checkpoint of ours: what its index says is wanted, and of that only the bytes that are, verified."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import torch
import xxhash
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from lightning_resume._distributed import local_world_size
from lightning_resume.checkpoint._dcp import ObjectPath, local_boxes, local_target
from lightning_resume.checkpoint.archive import memory_of
from lightning_resume.checkpoint.catalog import TensorInfo, check_apart, check_paths
from lightning_resume.checkpoint.index import Box, Index, Pages, Placed
from lightning_resume.checkpoint.items import ItemSource
from lightning_resume.checkpoint.names import INDEX_NAME
from lightning_resume.errors import CheckpointCorruptError, CheckpointIncompleteError

T = TypeVar("T")

_PIECE_BYTES = 2**23
"""Of what one thread reads at once, and of what lies in memory beside the tensors."""
_REMOTE_PIECE_BYTES = 2**25
_REMOTE_READERS = 8
_REMOTE_PAGES = 64  # of the index at once: a request takes as long as reading some MiB


class IndexedContent:
    """What a checkpoint of ours holds.

    Args:
        source: Its files.

    Raises:
        CheckpointCorruptError: The index is missing, damaged, or no index.
    """

    def __init__(self, source: ItemSource) -> None:
        self._source = source
        size = source.checked_size(INDEX_NAME)
        pages = [item[2] for item in source.entry(INDEX_NAME).items]

        def check(number: int, page: bytes) -> None:
            expected = pages[number] if number < len(pages) else "none"
            found = xxhash.xxh3_128_hexdigest(page)
            if found != expected:
                source.reject(f"file {INDEX_NAME}, page {number}", f"xxh3-128 {expected}", found)

        at_once = _REMOTE_PAGES if source.is_remote else 1
        read = Pages(lambda offset, length: source.part(INDEX_NAME, offset, length), check, size, at_once=at_once)
        self._index = self._checked(lambda: Index(read, size, source.file_sizes()))
        self._leaf_bytes: dict[str, int] = {}
        self._one_at_a_time = threading.Lock()

    @cached_property
    def keys(self) -> dict[str, TensorInfo | None]:
        """Every key but our leaves: the shape and dtype of a tensor, None for any other object."""
        return {
            key: None if info.dtype is None else TensorInfo(shape=info.shape, dtype=info.dtype)
            for key, info in self._index.keys.items()
        }

    @cached_property
    def mappings(self) -> dict[str, ObjectPath]:
        """The path of every key in the nested state."""
        paths = {key: info.path for key, info in self._index.keys.items()}
        self._checked(lambda: check_paths(paths))
        return paths

    @property
    def leaves(self) -> list[str]:
        return self._index.leaves

    def leaf(self, key: str) -> bytes:
        """The verified bytes of a leaf."""
        placed = self._checked(lambda: self._index.leaf(key))
        assert placed is not None
        self._leaf_bytes[key] = placed.item.data
        self._check_bytes(sum(self._leaf_bytes.values()))
        return bytes(self._source.data(self._file(placed), placed.item, f"item {key!r}"))

    def check_covered(self, key: str) -> None:
        """Checks that the stored shards make up the whole tensor.

        Raises:
            CheckpointIncompleteError: They do not.
        """
        info = self._index.keys[key]
        if info.dtype is not None:
            self._check_covers(key, ((0,) * len(info.shape), info.shape), self._find(key))

    def fill(self, flat: dict[str, Any], decode: Callable[[str, bytes], Any]) -> dict[str, Any]:
        """Reads what the tensors of ``flat`` want, straight into them; returns the other values by key.

        Everything that is wanted is found before anything is read.

        Args:
            flat: Tensors, DTensors and ShardedTensors by key; any value for what is none.
            decode: Makes an object of its key and its verified bytes.
        """
        found = {key: self._wanted(key, value) for key, value in flat.items()}
        self._check_bytes(sum(placed.item.data for items in found.values() for placed in items))
        metadata = {key: self._metadata(key, items) for key, items in found.items()}
        plan = create_default_local_load_plan(flat, Metadata(state_dict_metadata=metadata), True)
        by_place = {(key, placed.box[0]): placed for key, items in found.items() for placed in items}
        reads = [self._read_of(flat, item, by_place) for item in plan.items if item.type == LoadItemType.TENSOR]
        reads.sort(key=lambda read: (read.placed.file, read.placed.item.offset, read.start))
        self._run([piece for read in reads for piece in read.pieces(self._piece_bytes)])
        objects = [item.storage_index.fqn for item in plan.items if item.type == LoadItemType.BYTE_IO]
        return {key: decode(key, self._object(key, found[key])) for key in objects}

    def verify(self, name: str, read: Callable[[int], None]) -> None:
        """Reads all of one file and checks it, as :meth:`~ItemSource.verify_pages` does."""
        if name in self._index.files:
            number = self._index.files.index(name)
            with self._one_at_a_time:  # the first one sorts what the others use as well
                items = self._checked(lambda: self._index.of_file(number))
            self._source.verify_items(name, items, read)
        else:
            self._source.verify_pages(name, read)

    def _wanted(self, key: str, value: Any) -> list[Placed]:
        """The items that hold what this rank has of ``value``, which make up all of it."""
        info = self._index.keys[key]
        if info.dtype is None:
            return self._find(key)
        wanted: dict[tuple[int, ...], Placed] = {}
        for box in local_boxes(value):
            items = self._find(key, box)
            self._check_covers(key, box, items)
            wanted |= {placed.box[0]: placed for placed in items}
        return list(wanted.values())

    def _check_bytes(self, wanted: int) -> None:
        """Checks what different keys are to be read from; a few bytes that many share would fill any memory."""
        if wanted > self._index.nbytes:
            raise self._damaged(f"items of {wanted} bytes in files of {self._index.nbytes} bytes")

    def _check_covers(self, key: str, box: Box, items: Sequence[Placed]) -> None:
        self._checked(lambda: check_apart(key, [_chunk(placed) for placed in items]))
        wanted, volume = math.prod(box[1]), sum(_shared(placed.box, box) for placed in items)
        if volume != wanted:
            raise CheckpointIncompleteError(
                f"{self._source.folder}: {volume} of {wanted} elements of {key!r} were saved; not every rank took part"
                " in the save. Load another checkpoint."
            )

    def _metadata(self, key: str, items: Sequence[Placed]) -> BytesStorageMetadata | TensorStorageMetadata:
        info = self._index.keys[key]
        if info.dtype is None:
            return BytesStorageMetadata()
        chunks = [_chunk(placed) for placed in items]
        return TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), chunks)

    def _read_of(self, flat: dict[str, Any], item: ReadItem, by_place: Mapping[Any, Placed]) -> _Read:
        key = item.storage_index.fqn
        placed = by_place[key, tuple(item.storage_index.offset or ())]
        target = local_target(flat, item.dest_index)
        for dimension, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(dimension, offset, length)
        dtype = self._index.keys[key].dtype
        assert dtype is not None
        part = (tuple(item.storage_offsets), tuple(item.lengths))
        return _Read(self._source, self._file(placed), placed, part, target, dtype, f"item {key!r}")

    def _run(self, pieces: Sequence[Callable[[], None]]) -> None:
        readers = _REMOTE_READERS if self._source.is_remote else _readers()
        if readers == 1 or len(pieces) < 2:
            for piece in pieces:
                piece()
            return
        with ThreadPoolExecutor(min(readers, len(pieces)), thread_name_prefix="lightning-resume-read") as pool:
            running = [pool.submit(piece) for piece in pieces]
            try:
                for future in running:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    @property
    def _piece_bytes(self) -> int:
        return _REMOTE_PIECE_BYTES if self._source.is_remote else _PIECE_BYTES

    def _object(self, key: str, items: Sequence[Placed]) -> bytes:
        if len(items) != 1:
            raise CheckpointIncompleteError(f"{self._source.folder} names {len(items)} places for {key!r}, not one.")
        return bytes(self._source.data(self._file(items[0]), items[0].item, f"item {key!r}"))

    def _find(self, key: str, box: Box | None = None) -> list[Placed]:
        return self._checked(lambda: self._index.items(key, box))

    def _file(self, placed: Placed) -> str:
        return self._index.files[placed.file]

    def _checked(self, look: Callable[[], T]) -> T:
        try:
            return look()
        except ValueError as error:
            raise self._damaged(error) from error

    def _damaged(self, what: object) -> CheckpointCorruptError:
        return CheckpointCorruptError(
            f"{self._source.folder / INDEX_NAME} is damaged: {what}. Load another checkpoint."
        )


class _Read:
    """One part of one stored shard on its way into ``target``."""

    def __init__(
        self,
        source: ItemSource,
        file: str,
        placed: Placed,
        part: Box,
        target: torch.Tensor,
        dtype: torch.dtype,
        what: str,
    ) -> None:
        self.placed = placed
        self._source, self._file, self._target, self._dtype, self._what = source, file, target, dtype, what
        sizes = placed.box[1]
        self._strides = [math.prod(sizes[d + 1 :]) * dtype.itemsize for d in range(len(sizes))]
        self._offsets, self._lengths = part
        self.start = sum(offset * stride for offset, stride in zip(self._offsets, self._strides, strict=True))

    def pieces(self, size: int) -> Iterator[Callable[[], None]]:
        """What is to be done, in steps of about ``size`` bytes of data that can be done in any order."""
        if self._target.numel() == 0:
            return
        if self._is_one_range() and self._is_plain():
            memory, total = memory_of(self._target), self._target.nbytes
            # a step ends where a block does, so that none is read twice
            edges = [self.start, *range((self.start // size + 1) * size, self.start + total, size), self.start + total]
            for first, end in itertools.pairwise(edges):
                yield self._direct(memory, first, end)
        else:
            yield lambda: self._by_slabs(self._target, self._offsets, 0, size)

    def _direct(self, memory: memoryview, first: int, end: int) -> Callable[[], None]:
        into = memory[first - self.start : end - self.start]
        return lambda: self._source.read_into(self._file, self.placed.item, first, end, into, self._what)

    def _by_slabs(self, target: torch.Tensor, offsets: Sequence[int], dimension: int, size: int) -> None:
        """Reads what does not lie in one range, or not as it is wanted, by way of a buffer of about ``size`` bytes."""
        lengths = target.shape
        start = sum(offset * stride for offset, stride in zip(offsets, self._strides, strict=True))
        last = sum((length - 1) * stride for length, stride in zip(lengths, self._strides, strict=True))
        span = last + self._dtype.itemsize
        if span > size and dimension < target.ndim:
            if lengths[dimension] == 1:
                self._by_slabs(target, offsets, dimension + 1, size)
                return
            rows = max(1, size // self._strides[dimension])
            for row in range(0, lengths[dimension], rows):
                inner = list(offsets)
                inner[dimension] += row
                count = min(rows, lengths[dimension] - row)
                self._by_slabs(target.narrow(dimension, row, count), inner, dimension + (count == 1), size)
            return
        buffer = torch.empty(span // self._dtype.itemsize, dtype=self._dtype)
        self._source.read_into(self._file, self.placed.item, start, start + span, memory_of(buffer), self._what)
        strides = [stride // self._dtype.itemsize for stride in self._strides]
        target.copy_(buffer.as_strided(lengths, strides))

    def _is_one_range(self) -> bool:
        """Whether what is wanted lies in one piece: whole rows, or a part of one."""
        sizes, is_whole = self.placed.box[1], True
        for length, size in zip(reversed(self._lengths), reversed(sizes), strict=True):
            if not is_whole and length != 1:
                return False
            is_whole = is_whole and length == size
        return True

    def _is_plain(self) -> bool:
        target = self._target
        return (
            target.device.type == "cpu"
            and target.dtype == self._dtype
            and target.is_contiguous()
            and not target.is_conj()
            and not target.is_neg()
        )


def _readers() -> int:
    """Threads that read at once: what this machine has for each of its ranks, up to four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores // local_world_size()))


def _chunk(placed: Placed) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(placed.box[0]), torch.Size(placed.box[1]))


def _shared(one: Box, other: Box) -> int:
    """The elements that two parts of a tensor share."""
    return math.prod(
        max(0, min(start + size, start_2 + size_2) - max(start, start_2))
        for start, size, start_2, size_2 in zip(*one, *other, strict=True)
    )
