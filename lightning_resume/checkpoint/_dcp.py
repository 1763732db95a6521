"""The only import site of what torch.distributed.checkpoint does not export, seen in torch 2.10 to 2.13."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any, cast

import torch
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.remote_device import _remote_device
from torch.distributed.tensor import DTensor

from lightning_resume.checkpoint.pickles import check_pickle

__all__ = [
    "StorageInfo",
    "flatten",
    "flatten_state_dict",
    "is_distributed_tensor",
    "load_metadata",
    "local_boxes",
    "local_parts",
    "local_target",
    "set_element",
    "unflatten_state_dict",
    "with_parts",
]

ObjectPath = tuple[str | int, ...]

_PICKLE_PROTOCOL = 4


def flatten(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, ObjectPath]]:
    """Returns the leaves of ``state`` by flat key, and the path of each in ``state``, as DCP's planners do it."""
    return flatten_state_dict(_flatten_sharded_tensors(state))


def is_distributed_tensor(value: object) -> bool:
    return isinstance(value, DTensor | ShardedTensor)


def local_boxes(value: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns where in the whole tensor each part begins that this rank has of it, and its sizes."""
    if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
        return []
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in _create_chunk_list(value)]


def local_parts(value: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors in which this rank holds its part of ``value``."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor.detach() for shard in value.local_shards()]
    return [value.to_local().detach() if isinstance(value, DTensor) else value.detach()]


def with_parts(value: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``value`` with tensors on the CPU in place of its :func:`local_parts`; to be saved, and for nothing else."""
    if isinstance(value, DTensor):
        # not from_local, which moves what is on the CPU back to the device of the mesh
        return DTensor(parts[0], value._spec, requires_grad=False)
    if not isinstance(value, ShardedTensor):
        return parts[0]
    metadata = copy.deepcopy(value.metadata())
    for shard in metadata.shards_metadata:
        assert shard.placement is not None
        shard.placement = _remote_device(f"rank:{shard.placement.rank()}/cpu")
    own = {tuple(shard.shard_offsets): shard for shard in metadata.shards_metadata}
    mine = [own[tuple(shard.metadata.shard_offsets)] for shard in value.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(tensor=part, metadata=shard) for part, shard in zip(parts, mine, strict=True)],
        metadata,
        process_group=value._process_group,
    )


def local_target(flat: dict[str, Any], index: MetadataIndex) -> torch.Tensor:
    """Returns this rank's part of the tensor at ``index``, to be written in place."""
    return cast(torch.Tensor, find_state_dict_object(flat, index)).detach()


def dump_metadata(metadata: Metadata) -> bytes:
    return pickle.dumps(metadata, protocol=_PICKLE_PROTOCOL)


def load_metadata(data: bytes) -> Metadata:
    """Reads ``.metadata``; nothing but inert records is made of it, and of these the metadata.

    Raises:
        pickle.UnpicklingError: A class or function that is no part of DCP's own metadata is named in it, or what no
            save writes.
        Exception: Whatever else a damaged pickle leads to.
    """
    check_pickle(data)
    return cast(Metadata, _real(_MetadataUnpickler(BytesIO(data)).load(), Metadata))


class _Sealed(type):
    def __setattr__(cls, name: str, value: object) -> None:
        # a pickle may give a state to a class as well, which would change it for the whole process
        raise pickle.UnpicklingError(f"a change of {cls.__name__}")


class _Record(metaclass=_Sealed):
    """Stands for an object of ``.metadata``: what it is called with and its state, neither of which does anything."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Record:
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataRecord(_Record):
    __slots__ = ()


class _IndexRecord(_Record):
    __slots__ = ()


class _PropertiesRecord(_Record):
    __slots__ = ()


class _TensorRecord(_Record):
    __slots__ = ()


class _BytesRecord(_Record):
    __slots__ = ()


class _ChunkRecord(_Record):
    __slots__ = ()


class _StorageRecord(_Record):
    __slots__ = ()


class _SizeRecord(_Record):
    __slots__ = ()


class _Unused(_Record):
    """What DCP keeps beside that nobody here reads: layouts, memory formats, paths, the save's id."""

    __slots__ = ()


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _ALLOWED[module, name]


def _real(value: Any, kind: type) -> Any:
    """Returns the object that the record ``value`` stands for, which must be a ``kind``."""
    if type(value) is not _RECORDS[kind]:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return _MAKE[kind](value)


def _metadata(record: _Record) -> Metadata:
    state = record.state
    return Metadata(
        state_dict_metadata={_text(key): _stored(value) for key, value in state["state_dict_metadata"].items()},
        planner_data=_mappings(state.get("planner_data")),
        storage_data={
            _real(index, MetadataIndex): _real(info, StorageInfo) for index, info in state["storage_data"].items()
        },
        version=state.get("version"),
    )


def _stored(record: Any) -> Any:
    return _real(record, BytesStorageMetadata if type(record) is _BytesRecord else TensorStorageMetadata)


def _mappings(planner_data: Any) -> dict[str, ObjectPath] | None:
    return None if planner_data is None else {_text(key): _path(path) for key, path in planner_data.items()}


def _path(path: Any) -> ObjectPath:
    if type(path) is not tuple or not path or not all(type(part) in (str, int) for part in path):
        raise TypeError("a path that is no tuple of names and indexes")
    return path


def _index(record: _Record) -> MetadataIndex:
    offset = record.state.get("offset")
    return MetadataIndex(_text(record.state["fqn"]), None if offset is None else _real(offset, torch.Size))


def _tensor(record: _Record) -> TensorStorageMetadata:
    state = record.state
    properties, size = _real(state["properties"], TensorProperties), _real(state["size"], torch.Size)
    return TensorStorageMetadata(properties, size, [_real(chunk, ChunkStorageMetadata) for chunk in state["chunks"]])


def _properties(record: _Record) -> TensorProperties:
    # torch.save keeps the others with each tensor; DCP calls them deprecated
    dtype = record.state[0] if type(record.state) is tuple else record.state["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a dtype that is none")
    return TensorProperties(dtype=dtype)


def _chunk(record: _Record) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(_real(record.state["offsets"], torch.Size), _real(record.state["sizes"], torch.Size))


def _storage(record: _Record) -> StorageInfo:
    state = record.state
    if state.get("transform_descriptors"):
        raise ValueError("items written through stream extensions, which only stock torch reads")
    return StorageInfo(_text(state["relative_path"]), _count(state["offset"]), _count(state["length"]))


def _size(record: _Record) -> torch.Size:
    (numbers,) = record.args
    if type(numbers) not in (tuple, list):
        raise TypeError("a size that is no list of numbers")
    return torch.Size(map(_count, numbers))


def _text(value: object) -> str:
    if type(value) is not str:
        raise TypeError(f"a {type(value).__name__} in place of a name")
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise ValueError("a negative number, one beyond 63 bits, or none")
    return value


_MAX_COUNT = 2**63 - 1

_RECORDS: Mapping[type, type[_Record]] = {
    Metadata: _MetadataRecord,
    MetadataIndex: _IndexRecord,
    TensorProperties: _PropertiesRecord,
    TensorStorageMetadata: _TensorRecord,
    BytesStorageMetadata: _BytesRecord,
    ChunkStorageMetadata: _ChunkRecord,
    StorageInfo: _StorageRecord,
    torch.Size: _SizeRecord,
}
_MAKE: Mapping[type, Callable[[Any], Any]] = {
    Metadata: _metadata,
    MetadataIndex: _index,
    TensorProperties: _properties,
    TensorStorageMetadata: _tensor,
    BytesStorageMetadata: lambda _: BytesStorageMetadata(),
    ChunkStorageMetadata: _chunk,
    StorageInfo: _storage,
    torch.Size: _size,
}
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_SHARDED_MODULE = "torch.distributed._shard.sharded_tensor.metadata"
_ALLOWED: Mapping[tuple[str, str], Any] = {
    **{
        (_METADATA_MODULE, kind.__name__): record
        for kind, record in _RECORDS.items()
        if kind not in (StorageInfo, torch.Size)
    },
    (_METADATA_MODULE, "StorageMeta"): _Unused,
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"): _Unused,
    (_SHARDED_MODULE, "TensorProperties"): _PropertiesRecord,
    (_SHARDED_MODULE, "MEM_FORMAT_ENCODING"): _Unused,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageRecord,
    ("torch", "Size"): _SizeRecord,
    ("torch.serialization", "_get_layout"): _Unused,
    # stock writers store the checkpoint's own path; it is never opened
    **{
        (module, name): _Unused
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    # not getattr(torch, name), which imports what torch imports only when it is asked for
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
}
