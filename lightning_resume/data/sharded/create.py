"""Chooses what a sharded dataset and its loader are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from lightning_resume import _distributed
from lightning_resume.data import order
from lightning_resume.data.handshake import is_of_group
from lightning_resume.data.loader import ElasticLoader
from lightning_resume.data.resumable import make_resumable
from lightning_resume.data.sharded import create_streamed, listing
from lightning_resume.data.sharded.dataset import Options, ShardedDataset
from lightning_resume.data.sharded.files import Paths, list_files
from lightning_resume.data.sharded.indexed import ColumnCollate, IndexedDataset, OwnOrder
from lightning_resume.data.sharded.parquet import Parquet

_INDEXED = {Parquet.name: Parquet}


def create(
    path: Paths,
    *,
    format: str,
    options: Options,
    group: Any,
    share: tuple[int, int] | None,
    tail: order.Tail | None,
    storage_options: Mapping[str, Any] | None,
    **dataloader_options: Any,
) -> tuple[DataLoader[Any], ShardedDataset]:
    """What :meth:`ShardedDataset.create_dataloader` returns."""
    if format in _INDEXED and options.filter is None and group is None:
        dataset = indexed_dataset(
            path, format=format, options=options, storage_options=storage_options, of_group=_is_of_group(share)
        )
        return _indexed(dataset, options, share=share, tail=tail, **dataloader_options)
    return create_streamed.create(
        path,
        format=format,
        options=options,
        group=group,
        share=share,
        of_group=_is_of_group(share),
        tail=tail,
        storage_options=storage_options,
        **dataloader_options,
    )


def _is_of_group(share: tuple[int, int] | None) -> bool:
    return is_of_group(*(share or (_distributed.rank(), _distributed.world_size())))


def indexed_dataset(
    path: Paths,
    *,
    format: str,
    options: Options,
    storage_options: Mapping[str, Any] | None,
    of_group: bool = False,
) -> IndexedDataset:
    """What :meth:`ShardedDataset.from_path` returns. ``of_group``: all ranks call it, and take rank 0's files."""
    if format not in _INDEXED:
        raise ValueError(
            f"format is {format!r}; pass one of {sorted(_INDEXED)}. Files of other formats are read as streams: use"
            " `ShardedDataset.create_dataloader`, and `StreamMixture` to mix them."
        )
    made = _INDEXED[format]()
    listed = functools.partial(list_files, path, suffixes=made.suffixes, storage_options=storage_options)
    return IndexedDataset(listing.of_all_ranks(listed) if of_group else listed(), options, format=made)


def _indexed(
    dataset: IndexedDataset,
    options: Options,
    *,
    share: tuple[int, int] | None,
    tail: order.Tail | None,
    collate_fn: Callable[[Any], Any] | None,
    drop_last: bool,
    **dataloader_options: Any,
) -> tuple[DataLoader[Any], ShardedDataset]:
    dataset.columnar = collate_fn is None and options.transform is None
    if collate_fn is None and dataloader_options.get("batch_size", 1) is not None:  # without batches rows are rows
        collate_fn = ColumnCollate(options.output)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        sampler=OwnOrder(dataset, shuffle=options.shuffle, seed=options.seed, drop_last=drop_last),
        collate_fn=collate_fn,
        drop_last=drop_last,
        **dataloader_options,
    )
    rank, world_size = share or (_distributed.rank(), _distributed.world_size())
    elastic: ElasticLoader = make_resumable(
        loader, rank=rank, world_size=world_size, seed=options.seed, tail=tail, shared=True
    )
    if share is None:
        elastic.leave_share_open()
    return elastic, dataset  # type: ignore[return-value]
