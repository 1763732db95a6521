"""What ``.metadata`` says a checkpoint holds, read without running code and checked before it is used."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from lightning_resume.checkpoint._dcp import ObjectPath, StorageInfo, load_metadata
from lightning_resume.checkpoint.manifest import is_plain_name
from lightning_resume.checkpoint.names import LEAF_PREFIX
from lightning_resume.errors import CheckpointCorruptError, CheckpointIncompleteError, UnsafeCheckpointError

# a longer list in a state dict is more likely a trap than a state
_MAX_LIST_INDEX = 10**7


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
        except (AttributeError, TypeError, ValueError) as error:
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

    def leaf_index(self, key: str) -> MetadataIndex:
        return MetadataIndex(key, (0,))

    def check_covered(self, key: str) -> None:
        """Checks that the stored shards make up the whole tensor.

        Raises:
            CheckpointIncompleteError: They do not; for example, not every rank took part in the save.
        """
        stored = self.metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            return
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
                f"{self._source} was not loaded, since it could run code: it names {error}, which is no part of the "
                "metadata of torch.distributed.checkpoint. Do not use this checkpoint unless you know where it is from."
            ) from error
        except Exception as error:
            # what a damaged pickle raises is any of a dozen kinds
            raise self._corrupt(f"{type(error).__name__}: {error}") from error

    def _check(self) -> None:
        _require(isinstance(self.metadata, Metadata), "not the metadata of a checkpoint")
        for key, stored in self.metadata.state_dict_metadata.items():
            _require(isinstance(key, str), f"the key {key!r}")
            _check_stored(key, stored)
            _check_path(key, self._path(key))
        for index, info in self._storage.items():
            _check_info(index, info)

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


def _check_stored(key: str, stored: object) -> None:
    if isinstance(stored, BytesStorageMetadata):
        return
    _require(isinstance(stored, TensorStorageMetadata), f"{key!r} is a {type(stored).__name__}")
    assert isinstance(stored, TensorStorageMetadata)
    _require(isinstance(stored.properties.dtype, torch.dtype), f"the dtype of {key!r}")
    sizes = [stored.size, *(size for chunk in stored.chunks for size in (chunk.sizes, chunk.offsets))]
    _require({torch.Size} == {type(size) for size in sizes}, f"the shape of {key!r}")
    _require(len({len(size) for size in sizes}) == 1, f"the shapes of the shards of {key!r}")


def _check_path(key: str, path: object) -> None:
    _require(isinstance(path, tuple) and len(path) > 0, f"the path of {key!r}")
    assert isinstance(path, tuple)
    for part in path:
        is_index = isinstance(part, int) and 0 <= part <= _MAX_LIST_INDEX
        _require(isinstance(part, str) or is_index, f"the path of {key!r}: {part!r}")


def _check_info(index: object, info: object) -> None:
    _require(isinstance(index, MetadataIndex), f"the index {index!r}")
    _require(isinstance(info, StorageInfo), f"the place of {index}")
    assert isinstance(info, StorageInfo)
    _require(is_plain_name(info.relative_path), f"the file name {info.relative_path!r} of {index}")
    for number in (info.offset, info.length):
        _require(type(number) is int and number >= 0, f"the place of {index}: {number!r}")
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{index} was written through stream extensions, which only stock torch reads")
