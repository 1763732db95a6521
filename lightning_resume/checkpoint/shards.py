"""Writes each rank's shards in the layout of stock DCP, hashed and durable, and ``.metadata`` over them."""

from __future__ import annotations

import contextlib
import io
import math
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import xxhash
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan, SavePlanner, StorageWriter, WriteItem
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lightning_resume._distributed import group, is_distributed, sendable, together
from lightning_resume.checkpoint._dcp import CheckpointException, StorageInfo, dump_metadata, save
from lightning_resume.checkpoint.filesystem import HashedFile, torch_save
from lightning_resume.checkpoint.manifest import FileEntry, Item
from lightning_resume.checkpoint.names import METADATA_NAME, data_name
from lightning_resume.checkpoint.paths import AnyPath
from lightning_resume.errors import CheckpointSaveError

__all__ = ["CheckpointException", "Data", "Shards", "write_items", "write_shards", "writing_with"]

_DCP_VERSION = "1.0.0"
_UPLOADS = 4  # at once, from each rank
_LEAST_PART_BYTES = 2**24
_MOST_NAMES = 20

Data: TypeAlias = torch.Tensor | io.BytesIO
WriteItems: TypeAlias = Callable[[Path, Sequence[tuple[WriteItem, Data]], frozenset[str]], list[WriteResult]]
_of_thread = threading.local()


@dataclass(frozen=True, kw_only=True)
class Shards:
    """What was written: every file by name, and what is known of the weights among it."""

    files: dict[str, FileEntry]
    weights_hash: str | None
    nonfinite: tuple[str, ...]


def write_shards(folder: AnyPath, state: dict[str, Any], *, weights: Collection[str] = ()) -> Shards:
    """Writes ``state`` of all ranks into ``folder``; returns on rank 0 what was written.

    Must be called on all ranks. ``weights`` names, by flat key, the tensors that training changes.

    Raises:
        CheckpointException: It failed on at least one rank; raised on all. This is a BaseException.
        RankLostError: A rank is gone.
    """
    writer = _ShardWriter(folder, frozenset(weights))
    with together():  # what a rank's own errors become is no RuntimeError
        save(state, writer=writer, planner=_Planner(), no_dist=not is_distributed(), group=group())
    return writer.shards


class _Planner(DefaultSavePlanner):
    """DCP's planner, which divides replicated tensors among ranks, made exact for values that ranks disagree on."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        _check_same_tensors(all_plans)
        return super().create_global_plan(_keep_lowest_rank(all_plans))


@dataclass(frozen=True)
class _Written(WriteResult):
    """One written item; carries its hash and the entry of its file to the coordinator."""

    file: FileEntry
    hash: str
    finite: bool


class _ShardWriter(StorageWriter):
    def __init__(self, folder: AnyPath, weights: frozenset[str]) -> None:
        self.shards = Shards(files={}, weights_hash=None, nonfinite=())
        self._folder, self._weights = folder, weights

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            written = _write_plan(self._folder, plan, planner, self._weights)
        except Exception as error:
            # one that does not survive the pickling between ranks would leave the others waiting
            raise sendable(error) from error
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for results_of_rank in results for result in results_of_rank]
        _check_all_written(metadata, written)
        metadata.version = _DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for result in written}
        files = {result.storage_data.relative_path: result.file for result in written}  # type: ignore[attr-defined]
        with HashedFile(self._folder / METADATA_NAME) as file:
            file.write(dump_metadata(metadata))
        files[METADATA_NAME] = file.entry()
        nonfinite = sorted({result.index.fqn for result in written if not result.finite})  # type: ignore[attr-defined]
        self.shards = Shards(
            files=files, weights_hash=_hash_of(written, self._weights), nonfinite=tuple(nonfinite[:_MOST_NAMES])
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 - torch's name
        return True


def _write_plan(folder: AnyPath, plan: SavePlan, planner: SavePlanner, weights: frozenset[str]) -> list[WriteResult]:
    """Writes this rank's items: to one local file, or to several remote ones at once."""

    def write(part: int, items: Sequence[WriteItem]) -> list[WriteResult]:
        return _write_part(folder / data_name(plan.storage_data, part), items, planner, weights)

    if isinstance(folder, Path):
        return write(0, plan.items) if plan.items else []
    parts = _divide(plan.items)
    with ThreadPoolExecutor(_UPLOADS) as uploads:
        results = list(uploads.map(write, range(len(parts)), parts))
    return [result for of_part in results for result in of_part]


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
) -> list[WriteResult]:
    resolved = [(item, planner.resolve_data(item)) for item in _in_order(items)]
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


def write_items(path: AnyPath, items: Sequence[tuple[WriteItem, Data]], weights: frozenset[str]) -> list[WriteResult]:
    """Writes one file of tensors and packed values, hashed and durable."""
    with HashedFile(path) as file:
        written = [_write_item(file, item, data, weights) for item, data in items]
    entry = file.entry()
    return [
        _Written(index, item[1], StorageInfo(path.name, item[0], item[1]), file=entry, hash=item[2], finite=finite)
        for index, item, finite in written
    ]


def _in_order(items: Iterable[WriteItem]) -> list[WriteItem]:
    return sorted(items, key=lambda item: item.type != WriteItemType.BYTE_IO)


def _write_item(
    file: HashedFile, item: WriteItem, data: Data, weights: frozenset[str]
) -> tuple[MetadataIndex, Item, bool]:
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
        return item.index, file.end_item(), True
    if data.is_quantized:
        raise CheckpointSaveError(f"{item.index.fqn!r} is a quantized tensor, which no load accepts. Save its parts.")
    tensor = _compact(data.detach().cpu())
    torch_save(tensor, file)
    return item.index, file.end_item(), item.index.fqn not in weights or _is_finite(tensor)


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    # one value that is not finite makes the sum so; the sum is one pass without a copy, but may overflow by itself
    if tensor.itemsize == 1:  # float8, for which torch has neither
        tensor = tensor.float()
    wide = torch.complex128 if tensor.is_complex() else torch.float32
    return bool(tensor.sum(dtype=wide).isfinite()) or bool(tensor.isfinite().all())


def _hash_of(written: Iterable[WriteResult], weights: frozenset[str]) -> str | None:
    """Hashes the hashes of the weights, so in time that does not depend on their size."""
    told = sorted(
        (result.index.fqn, tuple(result.index.offset or ()), result.hash)  # type: ignore[attr-defined]
        for result in written
        if result.index.fqn in weights
    )
    return xxhash.xxh3_128_hexdigest(repr(told).encode()) if told else None


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    # a view is saved with the whole storage under it
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _check_same_tensors(plans: list[SavePlan]) -> None:
    first: dict[MetadataIndex, tuple[int, WriteItem]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            rank_0, item_0 = first.setdefault(item.index, (rank, item))
            if _kind(item) != _kind(item_0):
                raise ValueError(
                    f"{item.index.fqn!r} is {_kind(item_0)} on rank {rank_0} and {_kind(item)} on rank {rank}; "
                    "what several ranks hold under one key must be equal. Give each rank a key of its own."
                )


def _kind(item: WriteItem) -> str:
    if item.tensor_data is None:
        return "a plain value"
    return f"a {item.tensor_data.properties.dtype} tensor of shape {tuple(item.tensor_data.size)}"


def _keep_lowest_rank(plans: list[SavePlan]) -> list[SavePlan]:
    """Leaves each plain value to the lowest rank that has it; DCP would take any rank's, of one dict even several."""
    owner: dict[str, int] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            owner.setdefault(item.index.fqn, rank)
    return [replace(plan, items=[i for i in plan.items if _is_kept(i, rank, owner)]) for rank, plan in enumerate(plans)]


def _is_kept(item: WriteItem, rank: int, owner: Mapping[str, int]) -> bool:
    return item.type != WriteItemType.BYTE_IO or owner[item.index.fqn] == rank


def _check_all_written(metadata: Metadata, written: Iterable[WriteResult]) -> None:
    # the writer threads of DCP were seen to lose failures, so what counts is what was really written
    planned = {index for key in metadata.state_dict_metadata for index in _indices(metadata, key)}
    missing = planned - {result.index for result in written}
    if missing:
        names = ", ".join(sorted({index.fqn for index in missing})[:5])
        raise CheckpointSaveError(f"{len(missing)} of {len(planned)} planned items were not written: {names}")


def _indices(metadata: Metadata, key: str) -> list[MetadataIndex]:
    stored = metadata.state_dict_metadata[key]
    if not isinstance(stored, TensorStorageMetadata):
        return [MetadataIndex(key)]
    return [MetadataIndex(key, chunk.offsets) for chunk in stored.chunks]
