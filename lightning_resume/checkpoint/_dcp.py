"""The only import site of what torch.distributed.checkpoint does not export, seen in torch 2.10 to 2.13."""

from __future__ import annotations

import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from io import BytesIO
from typing import Any, cast

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor import metadata as _sharded
from torch.distributed.checkpoint import metadata as _metadata
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.checkpoint.storage import StorageWriter
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.tensor import DTensor

__all__ = [
    "CheckpointException",
    "StorageInfo",
    "flatten",
    "flatten_state_dict",
    "is_distributed_tensor",
    "load_metadata",
    "local_target",
    "save",
    "set_element",
    "unflatten_state_dict",
]

ObjectPath = tuple[str | int, ...]

_PICKLE_PROTOCOL = 4


def save(state: dict[str, Any], *, writer: StorageWriter, planner: SavePlanner, no_dist: bool) -> None:
    # the public dcp.save warns in a single process, and warnings.catch_warnings is not for threads
    _save_state_dict(state_dict=state, storage_writer=writer, planner=planner, no_dist=no_dist)


def flatten(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, ObjectPath]]:
    """Returns the leaves of ``state`` by flat key, and the path of each in ``state``, as DCP's planners do it."""
    return flatten_state_dict(_flatten_sharded_tensors(state))


def is_distributed_tensor(value: object) -> bool:
    return isinstance(value, DTensor | ShardedTensor)


def local_target(flat: dict[str, Any], index: _metadata.MetadataIndex) -> torch.Tensor:
    """Returns this rank's part of the tensor at ``index``, to be written in place."""
    return cast(torch.Tensor, find_state_dict_object(flat, index)).detach()


def dump_metadata(metadata: Metadata) -> bytes:
    return pickle.dumps(metadata, protocol=_PICKLE_PROTOCOL)


def load_metadata(data: bytes) -> Metadata:
    """Reads ``.metadata``; only the classes that DCP's own metadata consists of can be made.

    Raises:
        pickle.UnpicklingError: Another class or function is named in it.
    """
    return cast(Metadata, _MetadataUnpickler(BytesIO(data)).load())


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # numbers of bits and layouts pickle as names in torch; nothing else of torch may be named
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _ALLOWED[module, name]


def _named(module: Any, *names: str) -> dict[tuple[str, str], Any]:
    return {(module.__name__, name): getattr(module, name) for name in names if hasattr(module, name)}


_ALLOWED: Mapping[tuple[str, str], Any] = {
    **_named(_metadata, "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    **_named(_metadata, "BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    **_named(_sharded, "TensorProperties", "MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    # stock writers store the checkpoint's own path; it is never opened
    **{
        (module, name): pathlib.PurePath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}
