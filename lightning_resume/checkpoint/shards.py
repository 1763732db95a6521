"""Writes each rank's shards in the layout of stock DCP, hashed and durable, and what says where everything lies."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import xxhash
from torch.distributed.checkpoint import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType

from lightning_resume._distributed import agree, gather_object, rank
from lightning_resume.checkpoint._dcp import StorageInfo, dump_metadata
from lightning_resume.checkpoint.archive import contiguous, frame_of, memory_of
from lightning_resume.checkpoint.filesystem import HashedFile, new_file
from lightning_resume.checkpoint.index_build import Entry, build_index
from lightning_resume.checkpoint.index_form import Box, Placed
from lightning_resume.checkpoint.manifest import FileEntry
from lightning_resume.checkpoint.names import INDEX_NAME, LEAF_PREFIX, METADATA_NAME, data_name
from lightning_resume.checkpoint.pages import hashes_of_pages
from lightning_resume.checkpoint.paths import AnyPath
from lightning_resume.checkpoint.planning import Planned, plan_save
from lightning_resume.checkpoint.stored import StoredItem, blocks_of, hash_of_items
from lightning_resume.errors import CheckpointSaveError

_DCP_VERSION = "1.0.0"
_UPLOADS = 4  # at once, from each rank
_LEAST_PART_BYTES = 2**24
_MOST_NAMES = 20


Data: TypeAlias = torch.Tensor | io.BytesIO
WriteItems: TypeAlias = "Callable[[Path, Sequence[tuple[WriteItem, Data]], frozenset[str]], WrittenFile]"
_Place: TypeAlias = "tuple[str, tuple[int, ...] | None]"
"""Of an item: its key, and of a tensor where the shard begins."""
_of_thread = threading.local()


@dataclass(frozen=True, kw_only=True)
class Shards:
    """What was written: every file by name, and what is known of the weights among it."""

    files: dict[str, FileEntry]
    weights_hash: str | None
    nonfinite: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """One file of one rank: its items in the order in which they lie there, and which of them are not finite."""

    name: str
    indexes: list[MetadataIndex]
    items: list[StoredItem]
    nonfinite: list[str]

    @property
    def entry(self) -> FileEntry:
        size = sum(item.length for item in self.items)
        return FileEntry(bytes=size, hash=hash_of_items(item.digests for item in self.items))


def write_shards(folder: AnyPath, state: dict[str, Any], *, weights: Collection[str] = ()) -> Written | None:
    """Writes ``state`` of all ranks into ``folder``; returns on rank 0 what was written, of which it has to tell.

    Must be called on all ranks. ``weights`` names, by flat key, the tensors that training changes.

    Raises:
        Exception: It failed on at least one rank; raised on all.
        RankLostError: A rank is gone.
    """
    planner, planned = plan_save(state)
    mine = agree("writing", partial(_write_plan, folder, planned.mine, planner, frozenset(weights)))
    of_ranks = gather_object(mine, dst=0)
    if of_ranks is None:
        return None
    return Written(planned, [file for files in of_ranks for file in files], frozenset(weights))


def _write_plan(folder: AnyPath, plan: SavePlan, planner: SavePlanner, weights: frozenset[str]) -> list[WrittenFile]:
    """Writes this rank's items: to one local file, or to several remote ones at once."""

    of_rank = rank()  # asked here: the threads that upload have no group

    def write(part: int, items: Sequence[WriteItem]) -> WrittenFile:
        return _write_part(folder / data_name(of_rank, part), items, planner, weights)

    if isinstance(folder, Path):
        return [write(0, plan.items)] if plan.items else []
    parts = _divide(plan.items)
    with ThreadPoolExecutor(_UPLOADS) as uploads:
        return list(uploads.map(write, range(len(parts)), parts))


def _divide(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Divides items into parts of about equal size, the largest first; a part has at least so many bytes."""
    sizes = {id(item): _bytes_of(item) for item in items}
    count = max(1, min(_UPLOADS, sum(sizes.values()) // _LEAST_PART_BYTES, len(items)))
    parts: list[list[WriteItem]] = [[] for _ in range(count)]
    filled = [0] * count
    for item in sorted(items, key=lambda item: sizes[id(item)], reverse=True):
        least = filled.index(min(filled))
        parts[least].append(item)
        filled[least] += sizes[id(item)]
    return [part for part in parts if part]


def _bytes_of(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _write_part(
    path: AnyPath, items: Sequence[WriteItem], planner: SavePlanner, weights: frozenset[str]
) -> WrittenFile:
    ordered = sorted(items, key=lambda item: item.type != WriteItemType.BYTE_IO)
    resolved = [(item, planner.resolve_data(item)) for item in ordered]
    elsewhere: WriteItems | None = getattr(_of_thread, "write", None)
    if elsewhere is not None and isinstance(path, Path):
        return elsewhere(path, resolved, weights)
    return write_items(path, resolved, weights)


@contextlib.contextmanager
def writing_with(write: WriteItems | None) -> Iterator[None]:
    """Inside, this thread writes local files with ``write`` in place of :func:`write_items`, unless it is ``None``."""
    _of_thread.write = write
    try:
        yield
    finally:
        _of_thread.write = None


def write_items(path: AnyPath, items: Sequence[tuple[WriteItem, Data]], weights: frozenset[str]) -> WrittenFile:
    """Writes one file of tensors and packed values, hashed and durable."""
    written = WrittenFile(name=path.name, indexes=[item.index for item, _ in items], items=[], nonfinite=[])
    with ShardFile(path) as file:
        for item, data in items:
            stored, is_finite = _write_item(file, item, data, weights)
            written.items.append(stored)
            written.nonfinite.extend([] if is_finite else [item.index.fqn])
    return written


def _write_item(file: ShardFile, item: WriteItem, data: Data, weights: frozenset[str]) -> tuple[StoredItem, bool]:
    if isinstance(data, io.BytesIO):
        return file.write(b"", data.getbuffer(), b""), True
    if data.is_quantized:
        raise CheckpointSaveError(f"{item.index.fqn!r} is a quantized tensor, which no load accepts. Save its parts.")
    tensor = contiguous(data)
    frame = frame_of(tensor)
    finite = _Finite(tensor) if item.index.fqn in weights else None
    stored = file.write(frame.head, memory_of(tensor), frame.tail, look=finite)
    return stored, finite is None or finite.confirmed()


class ShardFile:
    """A new file of items, each hashed in parts as it is written; durable once closed.

    Raises:
        FileExistsError: There is a local file of that name.
    """

    def __init__(self, path: AnyPath) -> None:
        self._file = new_file(path)
        self._position = 0

    def write(self, head: bytes, data: memoryview, tail: bytes, *, look: _Finite | None = None) -> StoredItem:
        """Writes one item; ``look`` is shown each block of it while that is in the processor's cache."""
        digests = [self._put(head)]
        for _, start, stop in blocks_of(len(data)):
            digests.append(self._put(data[start:stop]))
            if look is not None:
                look(start, stop)
        digests.append(self._put(tail))
        length = len(head) + len(data) + len(tail)
        item = StoredItem(
            offset=self._position, length=length, head=len(head), data=len(data), digests=b"".join(digests)
        )
        self._position += length
        return item

    def _put(self, data: bytes | memoryview) -> bytes:
        digest = xxhash.xxh3_128_digest(data)
        if len(data):
            self._file.write(data)
        return digest

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._file.close()
        else:
            self._file.discard()


class _Finite:
    """Looks whether all values of a tensor are finite, a block at a time."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._flat = tensor.reshape(-1)
        self._wanted = tensor.is_floating_point() or tensor.is_complex()
        self._seen = True

    def __call__(self, start: int, stop: int) -> None:
        if self._wanted and self._seen:
            size = self._flat.itemsize
            self._seen = _is_finite(self._flat[start // size : stop // size])

    def confirmed(self) -> bool:
        return self._seen


def _is_finite(values: torch.Tensor) -> bool:
    # one value that is not finite makes the sum so; the sum is one pass without a copy, but may overflow by itself
    if values.itemsize == 1:  # float8, for which torch has neither
        values = values.float()
    wide = torch.complex128 if values.is_complex() else torch.float32
    return bool(values.sum(dtype=wide).isfinite()) or bool(values.isfinite().all())


class Written:
    """All that was written, on rank 0, which says where everything is."""

    def __init__(self, planned: Planned, files: Sequence[WrittenFile], weights: frozenset[str]) -> None:
        assert planned.metadata is not None
        self._metadata, self._weights = planned.metadata, weights
        self._files = files
        # not by MetadataIndex, of which there are a million at 1024 ranks: it compares in Python
        self._places: dict[_Place, tuple[int, StoredItem]] = {
            (index.fqn, index.offset): (number, item)
            for number, file in enumerate(files)
            for index, item in zip(file.indexes, file.items, strict=True)
        }

    def describe(self, folder: AnyPath) -> Shards:
        """Writes ``.metadata`` and the index.

        Raises:
            CheckpointSaveError: Something that was planned is not among what was written.
            OSError: They could not be written.
        """
        self._check_all_written()
        entries = {file.name: file.entry for file in self._files}
        with _without_collecting():
            metadata, index = self._stock_metadata(), self._index()
        entries[METADATA_NAME] = _write_whole(folder / METADATA_NAME, metadata)
        entries[INDEX_NAME] = _write_pages(folder / INDEX_NAME, index)
        nonfinite = sorted({name for file in self._files for name in file.nonfinite})
        return Shards(files=entries, weights_hash=self._weights_hash(), nonfinite=tuple(nonfinite[:_MOST_NAMES]))

    def _check_all_written(self) -> None:
        planned = [place for key in self._metadata.state_dict_metadata for place, _ in self._parts(key)]
        missing = [fqn for fqn, offset in planned if (fqn, offset) not in self._places]
        if missing:
            names = ", ".join(sorted(set(missing))[:5])
            raise CheckpointSaveError(f"{len(missing)} of {len(planned)} planned items were not written: {names}")

    def _stock_metadata(self) -> bytes:
        stored = {
            index: StorageInfo(file.name, item.offset, item.length)
            for file in self._files
            for index, item in zip(file.indexes, file.items, strict=True)
        }
        return dump_metadata(replace(self._metadata, storage_data=stored, version=_DCP_VERSION))

    def _index(self) -> bytes:
        entries: dict[str, Entry] = {}
        leaves: dict[str, Placed] = {}
        for key, stored in self._metadata.state_dict_metadata.items():
            path = (self._metadata.planner_data or {}).get(key, (key,))
            placed = [self._placed(place, box) for place, box in self._parts(key)]
            if key.startswith(LEAF_PREFIX) and path == (key,):  # a user's {"resume": {...}} has a path of two
                leaves[key] = placed[0]._replace(box=((), ()))
                continue
            dtype = stored.properties.dtype if isinstance(stored, TensorStorageMetadata) else None
            shape = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else ()
            entries[key] = Entry(path=path, dtype=dtype, shape=shape, items=placed)
        return build_index([file.name for file in self._files], entries, leaves)

    def _placed(self, place: _Place, box: Box) -> Placed:
        number, item = self._places[place]
        return Placed(file=number, item=item, box=box)

    def _parts(self, key: str) -> Iterable[tuple[_Place, Box]]:
        """Which items ``key`` consists of, and which part of the tensor each is."""
        stored = self._metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            return [((key, None), ((), ()))]
        return [((key, chunk.offsets), (chunk.offsets, chunk.sizes)) for chunk in stored.chunks]

    def _weights_hash(self) -> str | None:
        """Hashes the hashes of the weights, so in time that does not depend on their size."""
        told = sorted(
            (fqn, tuple(offset or ()), item.hash)
            for (fqn, offset), (_, item) in self._places.items()
            if fqn in self._weights
        )
        return xxhash.xxh3_128_hexdigest(repr(told).encode()) if told else None


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Python's collector would look at the same million objects over and over; none of them is in a cycle."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _write_whole(path: AnyPath, data: bytes) -> FileEntry:
    with HashedFile(path) as file:
        file.write(data)
    return file.entry()


def _write_pages(path: AnyPath, data: bytes) -> FileEntry:
    with HashedFile(path) as file:
        for part in (data, *hashes_of_pages(data)):
            file.write(part)
            file.end_item()
    return file.entry()
