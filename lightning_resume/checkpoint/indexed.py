"""Reads a checkpoint of ours: what its index says is wanted, and of that only the bytes that are, verified."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any, TypeVar, final

import torch
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from lightning_resume._distributed import Carrier, all_gather_object, world_size
from lightning_resume.checkpoint._dcp import ObjectPath, local_boxes, local_target
from lightning_resume.checkpoint.catalog import TensorInfo, check_apart, check_paths
from lightning_resume.checkpoint.index import Index
from lightning_resume.checkpoint.index_form import Box, Placed
from lightning_resume.checkpoint.items import ItemSource
from lightning_resume.checkpoint.names import INDEX_NAME
from lightning_resume.checkpoint.pages import HASH_BYTES, HASHES_AT_ONCE, PAGE_BYTES, Pages
from lightning_resume.checkpoint.reads import Piece, Read, digest_of, fetch_all, fetch_shared, local_readers
from lightning_resume.errors import CheckpointCorruptError, CheckpointIncompleteError

T = TypeVar("T")

_PIECE_BYTES = 2**23
"""Of what one thread reads at once, and of what lies in memory beside the tensors."""
_REMOTE_PIECE_BYTES = 2**25
_REMOTE_READERS = 8
_REMOTE_BYTES = 2**22  # of the index at once: a request takes as long as reading some MiB


class IndexedContent:
    """What a checkpoint of ours holds.

    Args:
        source: Its files.

    Raises:
        CheckpointCorruptError: The index is missing, damaged, or no index.
    """

    def __init__(self, source: ItemSource) -> None:
        self._source = source
        source.checked_size(INDEX_NAME)
        (_, size, _), *hashes = source.entry(INDEX_NAME).items or [(0, 0, "")]

        @cache
        def hashes_of(piece: int) -> bytes:
            offset, length, expected = hashes[piece]
            found = source.part(INDEX_NAME, offset, length)
            source.compare(f"file {INDEX_NAME}, piece {piece} of the hashes of its pages", expected, found)
            return found

        def check(number: int, page: bytes) -> None:
            piece, place = divmod(number, HASHES_AT_ONCE)
            known = hashes_of(piece) if piece < len(hashes) else b""
            expected = known[place * HASH_BYTES : (place + 1) * HASH_BYTES].hex() or "none"
            source.compare(f"file {INDEX_NAME}, page {number}", expected, page)

        at_once = _REMOTE_BYTES // PAGE_BYTES if source.is_remote else 1
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

    def fill(self, flat: dict[str, Any], decode: Callable[[str, bytes], Any]) -> Filling:
        """Finds what the tensors of ``flat`` want, which :meth:`Filling.run` reads straight into them.

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
        size, readers = (_REMOTE_PIECE_BYTES, _REMOTE_READERS) if self._source.is_remote else (_PIECE_BYTES, 0)
        pieces = [piece for read in reads for piece in read.pieces(size)]
        objects = [item.storage_index.fqn for item in plan.items if item.type == LoadItemType.BYTE_IO]
        decoded = {key: partial(self._decoded, key, found[key], decode) for key in objects}
        return Filling(pieces, decoded, readers=readers or local_readers(), is_remote=self._source.is_remote)

    def _decoded(self, key: str, items: Sequence[Placed], decode: Callable[[str, bytes], Any]) -> Any:
        return decode(key, self._object(key, items))

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

    def _read_of(self, flat: dict[str, Any], item: ReadItem, by_place: Mapping[Any, Placed]) -> Read:
        key = item.storage_index.fqn
        placed = by_place[key, tuple(item.storage_index.offset or ())]
        target = local_target(flat, item.dest_index)
        for dimension, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(dimension, offset, length)
        dtype = self._index.keys[key].dtype
        assert dtype is not None
        part = (tuple(item.storage_offsets), tuple(item.lengths))
        return Read(self._source, self._file(placed), placed, part, target, dtype, f"item {key!r}")

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


@final
class Filling:
    """What is to be read into tensors, found and not yet read."""

    def __init__(
        self, pieces: Sequence[Piece], objects: Mapping[str, Callable[[], Any]], *, readers: int, is_remote: bool
    ) -> None:
        self._pieces, self._objects, self._readers, self._is_remote = pieces, objects, readers, is_remote
        self._carrier: Carrier | None = None

    def share(self) -> None:
        """Has each byte that all ranks want read by one of them, and sent to the others. A collective.

        Of a local disk all read alike: what one has read lies in memory, for all of a machine, and comes from there
        faster than from another rank.
        """
        wanted = all_gather_object((digest_of(self._pieces), self._is_remote))
        if world_size() > 1 and set(wanted) == {(digest_of(self._pieces), True)} and self._pieces:
            self._carrier = Carrier()

    def run(self) -> dict[str, Any]:
        """Reads it; returns the values that are no tensors by key."""
        if self._carrier is None:
            fetch_all(self._pieces, self._readers)
        else:
            with contextlib.closing(self._carrier):
                fetch_shared(self._pieces, self._readers, self._carrier)
        return {key: decoded() for key, decoded in self._objects.items()}


def _chunk(placed: Placed) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(placed.box[0]), torch.Size(placed.box[1]))


def _shared(one: Box, other: Box) -> int:
    """The elements that two parts of a tensor share."""
    return math.prod(
        max(0, min(start + size, start_2 + size_2) - max(start, start_2))
        for start, size, start_2, size_2 in zip(*one, *other, strict=True)
    )
