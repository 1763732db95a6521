"""What ``.metadata`` says a checkpoint holds, read without running code and checked before it is used."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from lightning_resume.checkpoint._dcp import ObjectPath, StorageInfo, load_metadata
from lightning_resume.checkpoint.manifest import is_plain_name
from lightning_resume.checkpoint.names import LEAF_PREFIX
from lightning_resume.errors import CheckpointCorruptError, CheckpointIncompleteError, UnsafeCheckpointError

# longer lists and deeper dicts in a state are more likely a trap than a state
_MAX_LISTS = 10**7
_MAX_DEPTH = 500
# their scales are no part of what DCP stores
_QUANTIZED = (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)
# beyond which torch makes no tensor, not even an empty one
_MAX_BYTES = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The global shape and the dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Catalog:
    """Every key of a checkpoint: its kind, where it belongs in the nested state, where its items are stored.

    Raises:
        UnsafeCheckpointError: ``.metadata`` names a class that DCP's metadata does not consist of.
        CheckpointCorruptError: ``.metadata`` is not what DCP writes.
    """

    def __init__(self, data: bytes, *, source: str) -> None:
        self._source = source
        self.metadata = self._load(data)
        try:
            self._check()
        except ValueError as error:
            raise self._corrupt(str(error)) from error

    @cached_property
    def keys(self) -> dict[str, TensorInfo | None]:
        """Every key but our leaves: the shape and dtype of a tensor, None for any other object."""
        return {key: self._info(key) for key in self.metadata.state_dict_metadata if not self.is_leaf(key)}

    @cached_property
    def mappings(self) -> dict[str, ObjectPath]:
        """The path of every key, but our leaves, in the nested state."""
        return {key: self._path(key) for key in self.keys}

    @cached_property
    def leaves(self) -> list[str]:
        return sorted(key for key in self.metadata.state_dict_metadata if self.is_leaf(key))

    def is_leaf(self, key: str) -> bool:
        # a user's {"resume": {...}} flattens to the same keys, but to a path of two
        return key.startswith(LEAF_PREFIX) and self._path(key) == (key,)

    def where(self, index: MetadataIndex) -> StorageInfo:
        found = self._storage.get(index)
        if found is None:
            raise CheckpointIncompleteError(f"{self._source} names no file for the item {index}: the save was partial.")
        return found

    def check_item(self, index: MetadataIndex, tensor: torch.Tensor) -> None:
        """Checks that the stored ``tensor`` is the shard that ``.metadata`` says it is.

        Raises:
            CheckpointCorruptError: It is of another shape or dtype.
        """
        stored = self.metadata.state_dict_metadata[index.fqn]
        if not isinstance(stored, TensorStorageMetadata):
            raise self._corrupt(f"{index.fqn!r} is no tensor")
        shapes = [tuple(chunk.sizes) for chunk in stored.chunks if chunk.offsets == index.offset]
        if tensor.dtype != stored.properties.dtype or tuple(tensor.shape) not in shapes:
            expected = f"a {stored.properties.dtype} tensor of shape {shapes[0] if shapes else None}"
            found = f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
            raise self._corrupt(f"item {index.fqn!r}: expected {expected}, found {found}")

    def check_covered(self, key: str) -> None:
        """Checks that the stored shards make up the whole tensor.

        Raises:
            CheckpointIncompleteError: They do not; for example, not every rank took part in the save.
        """
        stored = self.metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            return
        for chunk in stored.chunks:
            self.where(MetadataIndex(key, chunk.offsets))
        volume = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
        if volume != math.prod(stored.size):
            raise CheckpointIncompleteError(
                f"{self._source}: {volume} of {math.prod(stored.size)} elements of {key!r} were saved; "
                "not every rank took part in the save. Load another checkpoint."
            )

    @property
    def _storage(self) -> Mapping[MetadataIndex, StorageInfo]:
        return self.metadata.storage_data  # type: ignore[no-any-return]

    def _load(self, data: bytes) -> Metadata:
        try:
            return load_metadata(data)
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpointError(
                f"{self._source} was not loaded, since it could run code or harm the process: it holds "
                f"{error}, which is no part of the metadata of torch.distributed.checkpoint. Do not "
                "use this checkpoint unless you know where it is from."
            ) from error
        except Exception as error:
            # what a damaged pickle raises is any of a dozen kinds
            raise self._corrupt(f"{type(error).__name__}: {error}") from error

    def _check(self) -> None:
        check_paths({key: self._path(key) for key in self.metadata.state_dict_metadata})
        for key, stored in self.metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                self._check_tensor(key, stored)
        places = {(info.relative_path, info.offset) for info in self._storage.values()}
        _require(len(places) == len(self._storage), "two items in one place")
        for index, info in self._storage.items():
            _require(is_plain_name(info.relative_path), f"the file name {info.relative_path[:200]!r} of {index}")

    def _check_tensor(self, key: str, stored: TensorStorageMetadata) -> None:
        _require(stored.properties.dtype not in _QUANTIZED, f"the dtype of {key!r}: {stored.properties.dtype}")
        strides = math.prod(max(size, 1) for size in stored.size) * stored.properties.dtype.itemsize
        _require(strides <= _MAX_BYTES, f"the shape of {key!r}: {tuple(stored.size)}")
        for chunk in stored.chunks:
            _check_chunk(key, stored, chunk)
            place = self._storage.get(MetadataIndex(key, chunk.offsets))
            claimed = math.prod(chunk.sizes) * stored.properties.dtype.itemsize
            # before anything of that size is made
            _require(
                place is None or claimed <= place.length,
                f"{key!r}: a shard of {claimed} bytes in an item of {0 if place is None else place.length} bytes",
            )
        check_apart(key, stored.chunks)

    def _info(self, key: str) -> TensorInfo | None:
        stored = self.metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            return None
        return TensorInfo(shape=tuple(stored.size), dtype=stored.properties.dtype)

    def _path(self, key: str) -> ObjectPath:
        return (self.metadata.planner_data or {}).get(key, (key,))  # type: ignore[no-any-return]

    def _corrupt(self, what: str) -> CheckpointCorruptError:
        return CheckpointCorruptError(f"{self._source} is damaged: {what}. Load another checkpoint.")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def check_paths(paths: Mapping[str, ObjectPath]) -> None:
    """Checks that the paths make up one nested state of dicts and lists, and no list of endless gaps.

    Raises:
        ValueError: They do not.
    """
    kinds: dict[ObjectPath, type] = {}
    lengths: dict[ObjectPath, int] = {}
    for key, path in paths.items():
        _require(len(path) <= _MAX_DEPTH and isinstance(path[0], str), f"the path of {key!r}")
        for place, part in enumerate(path):
            _require(
                kinds.setdefault(path[:place], type(part)) is type(part), f"the path of {key!r}: the part {part!r}"
            )
            if isinstance(part, int):
                lengths[path[:place]] = max(lengths.get(path[:place], 0), part + 1)
                _require(part >= 0, f"the path of {key!r}: the index {part}")
    ends = set(paths.values())
    _require(len(ends) == len(paths) and not ends & kinds.keys(), "a path that leads to two values")
    _require(sum(lengths.values()) <= _MAX_LISTS, f"lists of {sum(lengths.values())} values in all")


def _check_chunk(key: str, stored: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> None:
    ranks = {len(stored.size), len(chunk.sizes), len(chunk.offsets)}
    _require(len(ranks) == 1, f"the shapes of the shards of {key!r}")
    ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
    _require(
        all(end <= size for end, size in zip(ends, stored.size, strict=True)),
        f"a shard of {key!r} of shape {tuple(chunk.sizes)} at {tuple(chunk.offsets)} in {tuple(stored.size)}",
    )


def check_apart(key: str, chunks: Sequence[ChunkStorageMetadata]) -> None:
    """Checks that no two shards overlap, so that shards of the tensor's volume are the whole tensor.

    Raises:
        ValueError: Two do.
    """
    boxes = [_box(chunk) for chunk in chunks if math.prod(chunk.sizes) > 0]
    if len(boxes) < 2:
        return
    # most shardings are along one dimension, along which a sweep meets one shard at a time
    along = max(range(len(boxes[0])), key=lambda dimension: len({box[dimension] for box in boxes}), default=None)
    _require(along is not None, f"several shards of the scalar {key!r}")
    assert along is not None
    boxes.sort(key=lambda box: box[along])
    active: list[_Box] = []
    for box in boxes:
        active = [other for other in active if other[along][1] > box[along][0]]
        _require(not any(_overlap(box, other) for other in active), f"shards of {key!r} overlap")
        active.append(box)


_Box: TypeAlias = list[tuple[int, int]]


def _box(chunk: ChunkStorageMetadata) -> _Box:
    return [(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]


def _overlap(one: _Box, other: _Box) -> bool:
    return all(start < end_2 and start_2 < end for (start, end), (start_2, end_2) in zip(one, other, strict=True))
