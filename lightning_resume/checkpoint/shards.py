"""Writes each rank's shards in the layout of stock DCP, hashed and durable, and ``.metadata`` over them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan, SavePlanner, StorageWriter, WriteItem
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lightning_resume._distributed import is_distributed
from lightning_resume.checkpoint._dcp import CheckpointException, StorageInfo, dump_metadata, save
from lightning_resume.checkpoint.filesystem import HashedFile, torch_save
from lightning_resume.checkpoint.manifest import FileEntry, Item
from lightning_resume.checkpoint.names import METADATA_NAME, data_name
from lightning_resume.errors import CheckpointSaveError

__all__ = ["CheckpointException", "write_shards"]

_DCP_VERSION = "1.0.0"


def write_shards(folder: Path, state: dict[str, Any]) -> dict[str, FileEntry]:
    """Writes ``state`` of all ranks into ``folder``; returns on rank 0 what was written, by file name.

    Must be called on all ranks.

    Raises:
        CheckpointException: It failed on at least one rank; raised on all. This is a BaseException.
    """
    writer = _ShardWriter(folder)
    save(state, writer=writer, planner=_Planner(), no_dist=not is_distributed())
    return writer.files


class _Planner(DefaultSavePlanner):
    """DCP's planner, which divides replicated tensors among ranks, made exact for values that ranks disagree on."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        _check_same_tensors(all_plans)
        return super().create_global_plan(_keep_lowest_rank(all_plans))


@dataclass(frozen=True)
class _Written(WriteResult):
    """One written item; carries the entry of its file to the coordinator."""

    file: FileEntry


class _ShardWriter(StorageWriter):
    def __init__(self, folder: Path) -> None:
        self.files: dict[str, FileEntry] = {}
        self._folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=data_name(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            written = _write_plan(self._folder, plan, planner)
        except OSError:
            raise
        except Exception as error:
            # the error of a user's object may not survive the pickling between ranks, which would then hang
            raise CheckpointSaveError(f"{type(error).__name__}: {error}") from error
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for results_of_rank in results for result in results_of_rank]
        _check_all_written(metadata, written)
        metadata.version = _DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for result in written}
        self.files = {result.storage_data.relative_path: result.file for result in written}  # type: ignore[attr-defined]
        with HashedFile(self._folder / METADATA_NAME) as file:
            file.write(dump_metadata(metadata))
        self.files[METADATA_NAME] = file.entry()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 - torch's name
        return True


def _write_plan(folder: Path, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
    if not plan.items:
        return []
    name: str = plan.storage_data
    with HashedFile(folder / name) as file:
        items = [(item.index, _write_item(file, planner.resolve_data(item))) for item in _in_order(plan.items)]
    entry = file.entry()
    return [_result(index, name, item, entry) for index, item in items]


def _in_order(items: Iterable[WriteItem]) -> list[WriteItem]:
    return sorted(items, key=lambda item: item.type != WriteItemType.BYTE_IO)


def _write_item(file: HashedFile, data: torch.Tensor | io.BytesIO) -> Item:
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
    else:
        torch_save(_compact(data.detach().cpu()), file)
    return file.end_item()


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    # a view is saved with the whole storage under it
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _result(index: MetadataIndex, name: str, item: Item, file: FileEntry) -> _Written:
    offset, length, _ = item
    return _Written(index, length, StorageInfo(name, offset, length), file)


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
