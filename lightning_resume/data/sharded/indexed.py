"""Sharded datasets whose files say how many rows they hold: map-style, in an order of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from lightning_resume import _distributed
from lightning_resume.data.sharded.columns import Columns
from lightning_resume.data.sharded.dataset import Options, Output, ShardedDataset
from lightning_resume.data.sharded.files import Files, Shard
from lightning_resume.data.sharded.parquet import Parquet, UnitReader, to_batch
from lightning_resume.data.sharded.source import ShardedSource
from lightning_resume.data.sharded.table import Table

if TYPE_CHECKING:
    import pyarrow as pa


@final
class IndexedDataset(ShardedDataset, Dataset[Any]):
    """Rows of parquet files by number: a map-style dataset that any sampler can draw from."""

    def __init__(self, files: Files, options: Options, *, format: Parquet) -> None:
        ShardedDataset.__init__(self, files, options)
        self.format = format
        self.columnar = False
        """Whether a batch is to come as one table, for :class:`ColumnCollate`."""
        self.listed: Sequence[Shard] = files.shards
        """The files that were there when the dataset was made."""
        self._table: Table | None = None
        self._packed: bytes | None = None
        self._reader: UnitReader | None = None
        self.keep = 2
        """How many units rows are taken from in turn, and one more."""

    @property
    def table(self) -> Table:
        """The files and their numbers of rows; reads all footers when nothing has told them yet."""
        if self._table is None:
            self._table = self.format.measure(self.files, columns=self.options.columns)
        return self._table

    @property
    def table_bytes(self) -> bytes:
        if self._packed is None:
            self._packed = self.table.to_bytes()
        return self._packed

    def adopt(self, table: Table, packed: bytes) -> None:
        """Takes files and numbers of rows from a saved state."""
        self.files = dataclasses.replace(self.files, shards=table.shards)
        self._table, self._packed, self._reader = table, packed, None

    def relist(self, files: Files, *, fresh: bool) -> None:
        """Takes another rank's list of the files; of a ``fresh`` dataset they are what it consists of."""
        if files.shards != tuple(self.listed) and fresh:
            self.files, self._table, self._packed, self._reader = files, None, None, None
        self.listed = files.shards

    def grow(self) -> bool:
        """Takes in files that are listed and not yet in the table; whether there were any."""
        known = {shard.path for shard in self.table.shards}
        new = dataclasses.replace(self.files, shards=tuple(s for s in self.listed if s.path not in known))
        if not new.shards:
            return False
        found = self.format.measure(new, columns=self.options.columns, known=self.table.schema)
        table = self.table.extended(found)
        self.adopt(table, table.to_bytes())
        return True

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Any:
        place = row + len(self) if row < 0 else row
        if not 0 <= place < len(self):
            raise IndexError(f"row {row} is outside a dataset of {len(self)} rows")
        return self.__getitems__([place])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        return self._samples(self._rows(rows), lambda _: None)

    def fetch_keyed(self, rows: Sequence[int], seed: Callable[[int], None]) -> Any:
        """The samples of a batch; ``seed(n)`` sets the random numbers of the n-th before anything may draw them."""
        table = self._rows(rows)
        return table if self.columnar else self._samples(table, seed)

    def _samples(self, table: pa.Table, seed: Callable[[int], None]) -> list[Any]:
        samples: list[Any] = table.to_pylist()
        transform = self.options.transform
        if transform is None:
            return samples
        for n, sample in enumerate(samples):
            seed(n)
            samples[n] = transform(sample)
        return samples

    def _rows(self, rows: Sequence[int]) -> pa.Table:
        if self._reader is None:
            self._reader = UnitReader(self.files, self.table, columns=self.options.columns, keep=self.keep)
        self._reader.keep = self.keep
        return self._reader.take(np.asarray(rows, dtype=np.int64))

    def order_source(self, *, shuffle: bool) -> ShardedSource:
        """The order in which its rows are best read."""
        return ShardedSource(self, shuffle=shuffle)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_reader": None}


@final
class ColumnCollate:
    """Makes a batch of the rows that :meth:`IndexedDataset.fetch_keyed` gives as one table, or of a list of rows."""

    def __init__(self, output: Output) -> None:
        self.output = output

    def __call__(self, rows: pa.Table | list[dict[str, Any]]) -> Any:
        return Columns(self.output)(rows) if isinstance(rows, list) else to_batch(rows, self.output)


@final
class OwnOrder(DistributedSampler[int]):
    """Stands where a sampler is expected: the order is the dataset's own, and Lightning is not to put in another.

    Lightning leaves a loader alone whose sampler is a ``DistributedSampler``.
    """

    shares_with_ranks = True
    dataset: IndexedDataset

    def __init__(self, dataset: IndexedDataset, *, shuffle: bool, seed: int, drop_last: bool) -> None:
        self.dataset, self.shuffle, self.seed, self.drop_last = dataset, shuffle, seed, drop_last

    # iterated over only in a loader that is not ours, as Lightning makes to predict with
    def __iter__(self) -> Any:
        return iter(range(_distributed.rank(), len(self.dataset), _distributed.world_size()))

    def __len__(self) -> int:
        return len(range(_distributed.rank(), len(self.dataset), _distributed.world_size()))

    def set_epoch(self, epoch: int) -> None:
        """Epochs are counted by the loader."""
