"""Makes streamed datasets and their loaders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, final

from torch.utils.data import IterableDataset

from lightning_resume.data import order
from lightning_resume.data.sharded import listing
from lightning_resume.data.sharded.dataset import Options, ShardedDataset
from lightning_resume.data.sharded.files import Files, Paths, list_files
from lightning_resume.data.sharded.formats.format import Format
from lightning_resume.data.sharded.formats.lines import JsonLines, TextLines
from lightning_resume.data.sharded.formats.rows import ParquetRows
from lightning_resume.data.sharded.formats.tar import Tar
from lightning_resume.data.sharded.grouping import Group
from lightning_resume.data.sharded.lane_source import FileSource
from lightning_resume.data.sharded.records import FileReader, Maker
from lightning_resume.data.sharded.streamed import StreamedLoader

FORMATS = ("jsonl", "text", "tar", "webdataset", "parquet")


@final
class StreamedDataset(ShardedDataset, IterableDataset[Any]):
    """Files that do not say how many samples they hold, or of which not all samples are taken one by one."""

    def __init__(self, files: Files, options: Options, format: Format) -> None:
        super().__init__(files, options)
        self.format = format

    def __iter__(self) -> Any:
        raise TypeError(
            "This dataset is read by the loader that `ShardedDataset.create_dataloader` returned with it: iterate over"
            " that."
        )


def create(
    path: Paths,
    *,
    format: str,
    options: Options,
    group: Group | None,
    share: tuple[int, int] | None,
    of_group: bool,
    tail: order.Tail | None,
    storage_options: Mapping[str, Any] | None,
    batch_size: int | None,
    num_workers: int,
    collate_fn: Callable[[Any], Any] | None,
    drop_last: bool,
    **dataloader_options: Any,
) -> tuple[StreamedLoader, StreamedDataset]:
    """What ``ShardedDataset.create_dataloader`` returns for formats that are read as streams."""
    if tail is order.Tail.CARRY:
        raise ValueError(f"tail is {tail.value!r}, which a {format} stream cannot have; pass 'even' or 'drop'.")
    reads = _format(format, options)
    listed = functools.partial(list_files, path, suffixes=reads.suffixes, storage_options=storage_options)
    files = listing.of_all_ranks(listed) if of_group else listed()
    dataset = StreamedDataset(files, options, reads)
    loader = StreamedLoader(
        dataset,
        source=file_source(files, options, reads),
        group=group,
        seed=options.seed,
        share=share,
        lanes=options.lanes,
        output=options.output,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_fn,
        drop_last=drop_last or tail is order.Tail.DROP,
        **dataloader_options,
    )
    dataset.bind(loader)
    return loader, dataset


def file_source(files: Files, options: Options, reads: Format) -> FileSource:
    """The lanes of some files."""
    maker = Maker(
        reads.decode,
        columns=None if isinstance(reads, ParquetRows) else options.columns,
        filter=options.filter,
        transform=options.transform,
        seed=options.seed,
    )
    window = options.window or reads.default_window
    reader = FileReader(files, reads, maker, window=window, shuffle=options.shuffle, seed=options.seed)
    return FileSource(
        files,
        reads,
        reader,
        shuffle=options.shuffle,
        seed=options.seed,
        window=window,
        append_files=options.append_files,
    )


def _format(name: str, options: Options) -> Format:
    if name == "parquet":
        return ParquetRows(options.columns)
    for kind in (JsonLines, TextLines, Tar):
        if name == kind.name or (name == "webdataset" and kind is Tar):
            return kind()
    raise ValueError(f"format is {name!r}; pass one of {sorted(FORMATS)}.")
