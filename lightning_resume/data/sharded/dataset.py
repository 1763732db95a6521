"""Datasets of many files, whose position survives any change of topology."""

from __future__ import annotations

import dataclasses
import enum
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from lightning_resume.data import order
from lightning_resume.data.loader import check_share
from lightning_resume.data.position import Resumable
from lightning_resume.data.scenarios import merged
from lightning_resume.data.sharded.files import Files, Paths

_NOT_BOUND = (
    "This dataset has no position of its own: its loader has. Make both with `ShardedDataset.create_dataloader(...)`,"
    " keep the loader, or give the dataset to a DataLoader and this to `make_resumable`, a Trainer with ResumeCallback,"
    " or Fabric."
)


class Output(str, enum.Enum):
    """How a batch of columns arrives when neither ``transform`` nor ``collate_fn`` is given."""

    TORCH = "torch"
    """Numbers as tensors (lists of them stacked where they are of one length), all else as Python lists."""
    NUMPY = "numpy"
    ARROW = "arrow"
    """A ``pyarrow.Table``."""
    PYTHON = "python"
    """Lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the user says of how samples are read.

    Attributes:
        shuffle: False for the order in which the samples lie.
        seed: Key of the order and of the samples' random numbers.
        columns: Which to read; all by default.
        transform: Applied to each sample, with random numbers keyed by the sample.
        filter: Samples for which it is false are left out; they count as inputs.
        output: How a batch arrives where nothing else makes it.
        lanes: Sequences that the shards are divided into, each read by one process at a time: fixed when a run starts.
        window: Units that are shuffled together: row groups, or a number of records where there are none.
        append_files: Whether files may have been added since the state was saved; read from the next epoch on.
    """

    shuffle: bool = False
    seed: int = 0
    columns: Sequence[str] | None = None
    transform: Callable[[Any], Any] | None = None
    filter: Callable[[Any], bool] | None = None
    output: Output = Output.TORCH
    lanes: int | None = None
    window: int | None = None
    append_files: bool = False

    def __post_init__(self) -> None:
        for name in ("lanes", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; pass at least 1, or None for the default.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; pass at least 0.")
        if isinstance(self.columns, str):
            raise ValueError(f"columns is {self.columns!r}; pass a list of names.")
        if self.columns is not None:
            object.__setattr__(self, "columns", _names(self.columns))


def _names(columns: Iterable[str]) -> tuple[str, ...]:
    names = tuple(columns)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"columns names {twice[0]!r} twice.")
    return names


class ShardedDataset:
    """Samples in many files: parquet, JSON lines, text, tar; local or remote.

    Made by :meth:`create_dataloader`. ``state_dict``, ``load_state_dict`` and ``set_epoch`` are those of the loader
    that iterates over it.
    """

    def __init__(self, files: Files, options: Options | None = None) -> None:
        if options is None:
            raise TypeError(
                f"Make it by ShardedDataset.create_dataloader({files!r}, ...), which gives the loader and the dataset,"
                " or by ShardedDataset.from_path, the dataset alone."
            )
        self.files, self.options = files, options
        self._loader: Callable[[], Resumable | None] = _nobody

    @classmethod
    def create_dataloader(
        cls,
        path: Paths,
        *,
        format: str = "parquet",
        batch_size: int | None = 1,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        columns: Sequence[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        filter: Callable[[Any], bool] | None = None,
        group: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        output: Output | str = Output.TORCH,
        drop_last: bool = False,
        tail: order.Tail | str | None = None,
        lanes: int | None = None,
        window: int | None = None,
        append_files: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        **dataloader_options: Any,
    ) -> tuple[DataLoader[Any], ShardedDataset]:
        """Returns a loader over the files at ``path``, and its dataset.

        Every sample of every epoch comes once, over all ranks. The position may be saved at any batch, by the loader's
        or the dataset's ``state_dict``, by a Trainer with ``ResumeCallback`` or by Fabric, and gone on with at any
        world size, number of workers and batch size. Files that are finished are not opened again.

        Args:
            path: A folder (all files below it with the format's suffix), a glob (every file that it matches), a file,
                or a list of these; local, or a URL that fsspec knows (``s3://...``).
            format: ``"parquet"``, ``"jsonl"`` (also .gz and .zst), ``"text"`` or ``"tar"`` (WebDataset).
            batch_size: Samples of one rank in one step; None for parquet rows one by one, as dicts.
            shuffle: Whether to permute files, units within files, and samples within ``window`` units. False: the order
                in which they lie.
            seed: Key of the order and of the samples' random numbers.
            num_workers: Worker processes of this rank.
            rank: This process's index among those that see different data; by default from the strategy or the process
                group.
            world_size: Number of those processes; by default as for ``rank``.
            columns: Which columns to read, of parquet also parts of them (``"meta.url"``); all by default.
            transform: Applied to each sample (a dict for parquet and JSON lines), with random numbers keyed by the
                sample.
            filter: Samples for which it is false are left out.
            group: What makes samples of samples: ``Packing`` or ``BatchByLength``.
            collate_fn: Makes a batch of a list of samples. By default a batch of dicts becomes a dict of columns.
            output: How those columns arrive: ``"torch"``, ``"numpy"``, ``"arrow"`` or ``"python"``.
            drop_last: Leave out the samples at the end of an epoch that fill no batch.
            tail: What else becomes of them: see :class:`~lightning_resume.Tail`.
            lanes: Sequences that the files are divided into, so that no two processes read the same part; kept for the
                whole run. By default as many as there are processes that read when the run starts.
            window: Units (row groups, or records where there are none) that are shuffled together, within a file.
            append_files: Whether files may have come since the state was saved. They are read from the next epoch on.
            storage_options: For the filesystem of ``path``.
            dataloader_options: Anything else that :class:`torch.utils.data.DataLoader` takes.

        Raises:
            FileNotFoundError: There are no files at ``path``.
            ValueError: An argument is out of its bounds, or ``format`` is not known.
            MissingPackageError: The URL or the format needs a package that is not installed.
        """
        from lightning_resume.data.sharded import create  # it imports this module

        options = Options(
            shuffle=shuffle,
            seed=seed,
            columns=columns,
            transform=transform,
            filter=filter,
            output=Output(output),
            lanes=lanes,
            window=window,
            append_files=append_files,
        )
        return create.create(
            path,
            format=format,
            options=options,
            group=group,
            share=share_of(rank, world_size),
            tail=None if tail is None else order.Tail(tail),
            storage_options=storage_options,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn,
            drop_last=drop_last,
            **dataloader_options,
        )

    @classmethod
    def from_path(
        cls,
        path: Paths,
        *,
        format: str = "parquet",
        columns: Sequence[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        window: int | None = None,
        lanes: int | None = None,
        append_files: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> ShardedDataset:
        """Returns the dataset alone, for a ``DataLoader`` of your own or a :class:`~lightning_resume.Mixture`.

        It is map-style: a sample is a dict, or what ``transform`` makes of it. In a loader that is resumable (by a
        Trainer with ``ResumeCallback``, by Fabric, or by ``make_resumable``) ``shuffle=True`` is the order that reads
        little.

        Args and Raises: as for :meth:`create_dataloader`; ``format`` is one whose files tell how many rows they hold.
        """
        from lightning_resume.data.sharded import create  # it imports this module

        options = Options(columns=columns, transform=transform, window=window, lanes=lanes, append_files=append_files)
        return create.indexed_dataset(path, format=format, options=options, storage_options=storage_options)

    # -- the position, which is the loader's

    def bind(self, loader: Resumable) -> None:
        """Says which loader iterates over this dataset."""
        # weak, so that a dropped loader takes its workers with it at once
        self._loader = weakref.ref(loader)

    def state_dict(self) -> dict[str, Any]:
        """This rank's position, after the last batch that the loader gave."""
        return self._bound().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Goes on from ``state_dict``: this rank's, or a list of those of all ranks.

        Raises:
            CheckpointMismatchError: It belongs to other files or another order; nothing was changed.
        """
        loader = self._bound()
        loader.load_state_dict(merged(state_dict) if isinstance(state_dict, Sequence) else state_dict)

    def set_epoch(self, epoch: int) -> None:
        """Makes ``epoch`` the next, from its start; a position in it that was just loaded is kept."""
        self._bound().set_epoch(epoch)

    @property
    def epoch(self) -> int:
        return self._bound().epoch

    @property
    def fingerprint(self) -> str:
        """Changes with the path, size and order of the files."""
        return self.files.fingerprint

    def _bound(self) -> Resumable:
        loader = self._loader()
        if loader is None:
            raise RuntimeError(_NOT_BOUND)
        return loader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loader": _nobody}  # a worker has no use for it, and it cannot be sent


def share_of(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """Rank and world size that were both given, or None."""
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise ValueError(f"rank is {rank} and world_size is {world_size}; pass both or none.")
    check_share(rank, world_size)
    return rank, world_size


def _nobody() -> None:
    """Stands for the loader of a dataset that has none."""
