"""Parquet files: rows by row group, as Arrow tables until a batch is made of them."""

from __future__ import annotations

import collections
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from lightning_resume.data.sharded.dataset import Output
from lightning_resume.data.sharded.files import Files
from lightning_resume.data.sharded.parquet_file import (
    SUFFIXES,
    check_columns,
    group_rows,
    naming,
    open_parquet,
    pyarrow_parquet,
    row_numbers,
)
from lightning_resume.data.sharded.schemas import Conforming, unified, unpacked
from lightning_resume.data.sharded.table import Rows, Table
from lightning_resume.errors import CheckpointMismatchError

if TYPE_CHECKING:
    import pyarrow as pa

_THREADS = 16
"""Footers read at a time: each is a round trip or two to a store."""


@final
class Parquet:
    """What a parquet file holds, and where."""

    name = "parquet"
    suffixes = SUFFIXES

    def __init__(self) -> None:
        pyarrow_parquet()  # here, so that worker processes that are forked have it, and that its lack is told at once

    def measure(self, files: Files, *, columns: Sequence[str] | None, known: bytes | None = None) -> Table:
        """Reads all footers.

        Args:
            files: Which.
            columns: That are to be read.
            known: The schema of files that these come to.

        Raises:
            ValueError: A file cannot be read, lacks a column, or has it in a type that does not go with the others'.
        """
        parquet = pyarrow_parquet()

        def footer(index: int) -> tuple[list[int], pa.Schema]:
            url = files.url(index)
            with files.open(index, cache_type="none") as opened, naming(url):
                metadata = parquet.read_metadata(opened)
            check_columns(metadata, url, columns)
            return group_rows(metadata), metadata.schema.to_arrow_schema()

        with ThreadPoolExecutor(min(_THREADS, len(files.shards))) as threads:
            footers = list(threads.map(footer, range(len(files.shards))))
        schemas = [(files.url(index), schema) for index, (_, schema) in enumerate(footers)]
        if known is not None:
            schemas.insert(0, ("the files before", unpacked(known)))
        schema, clashes = unified(schemas)
        for name, text in clashes.items():
            if columns is None or name in {column.split(".")[0] for column in columns}:
                raise ValueError(text)
        return Table(files.shards, (rows for rows, _ in footers), schema=schema.serialize().to_pybytes())


@final
class UnitReader:
    """Reads row groups, and keeps those that were used last: a batch takes rows here and there of a few.

    Args:
        files: Where they lie.
        table: What they should hold.
        columns: Which to read; all when None.
        keep: Number of row groups, and of open files, that are kept.
    """

    def __init__(self, files: Files, table: Table, *, columns: Sequence[str] | None, keep: int) -> None:
        self._files, self._table, self.keep = files, table, keep
        self._columns = None if columns is None else list(columns)
        self._units: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._opened: collections.OrderedDict[int, tuple[Any, Any]] = collections.OrderedDict()
        self._conforming: Conforming | None = None
        self._process = os.getpid()
        weakref.finalize(self, _close_all, self._opened)

    def take(self, rows: Rows) -> pa.Table:
        """Returns ``rows``, counted over the whole table, in their order."""
        import pyarrow as pa

        units = np.searchsorted(self._table.first_row, rows, side="right") - 1
        parts, places = [], []
        for unit in dict.fromkeys(units.tolist()):
            here = np.flatnonzero(units == unit)
            parts.append(self._unit(unit).take(row_numbers(rows[here] - self._table.first_row[unit])))
            places.append(here)
        if len(parts) == 1:
            return parts[0]
        back = np.argsort(np.concatenate(places), kind="stable")
        return pa.concat_tables(parts).take(row_numbers(back))

    def _unit(self, unit: int) -> pa.Table:
        if self._process != os.getpid():  # forked: what the parent opened is the parent's
            self._opened, self._process = collections.OrderedDict(), os.getpid()
        if unit in self._units:
            self._units.move_to_end(unit)
        else:
            shard = int(np.searchsorted(self._table.first_unit, unit, side="right")) - 1
            group = unit - int(self._table.first_unit[shard])
            while len(self._units) >= self.keep:
                self._units.popitem(last=False)
            file = self._file(shard)
            with naming(self._files.url(shard)):
                table = file.read_row_group(group, columns=self._columns, use_threads=False)
            self._units[unit] = self._conformed(table, shard)
        return self._units[unit]

    def _conformed(self, table: pa.Table, shard: int) -> pa.Table:
        if self._conforming is None:
            packed = self._table.schema
            self._conforming = Conforming(None if packed is None else unpacked(packed), self._columns)
        return self._conforming(table, self._files.url(shard))

    def _file(self, shard: int) -> Any:
        if shard not in self._opened:
            while len(self._opened) >= self.keep:
                _close(self._opened.popitem(last=False)[1])
            # the reader asks for just what it needs, in few pieces: a cache in between would read more
            opened = self._files.open(shard, cache_type="none")
            try:
                self._opened[shard] = opened, self._checked(shard, opened)
            except BaseException:
                opened.close()
                raise
        self._opened.move_to_end(shard)
        return self._opened[shard][1]

    def _checked(self, shard: int, opened: Any) -> Any:
        file = open_parquet(opened, self._files.url(shard), self._columns)
        if tuple(group_rows(file.metadata)) != self._table.rows[shard]:
            raise CheckpointMismatchError(
                "dataset",
                f"row groups of {self._files.url(shard)}",
                saved=f"rows {_short(self._table.rows[shard])}",
                current=f"rows {_short(group_rows(file.metadata))}",
                advice="The file was written anew since its rows were counted. Put it back, or start anew.",
            )
        return file


def to_batch(table: pa.Table, output: Output) -> Any:
    """A batch of columns: ``{name: values}``, or the table itself."""
    if output is Output.ARROW:
        return table
    return {name: _values(table.column(name), output) for name in table.column_names}


def _values(column: Any, output: Output) -> Any:
    """Numbers as tensors or arrays; Python objects where a number is missing and where they are no numbers."""
    import pyarrow as pa

    if output is Output.PYTHON or column.null_count:
        return column.to_pylist()
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=column.type)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return _lists(array, output)
    numbers = _numbers(array)
    return column.to_pylist() if numbers is None else _wrapped(numbers, output)


def _numbers(array: Any) -> Any:
    import pyarrow as pa

    kind = array.type
    if array.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return None
    # not array.to_numpy(), which imports pandas: in every worker process, at its first batch
    if pa.types.is_boolean(kind):
        return np.from_dlpack(array.cast(pa.uint8())).astype(np.bool_)
    return np.from_dlpack(array).copy()  # Arrow's memory is not to be written to


def _lists(array: Any, output: Output) -> Any:
    """Lists of numbers: stacked where they are of one length."""
    numbers = _numbers(array.flatten())
    if numbers is None:
        return array.to_pylist()
    lengths = np.array([array.type.list_size] * len(array)) if _is_fixed(array) else array.value_lengths().to_numpy()
    if len(array) and (lengths == lengths[0]).all():
        return _wrapped(numbers.reshape(len(array), int(lengths[0])), output)
    return [_wrapped(part, output) for part in np.split(numbers, np.cumsum(lengths)[:-1])] if len(array) else []


def _is_fixed(array: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_fixed_size_list(array.type))


def _wrapped(numbers: Any, output: Output) -> Any:
    return torch.from_numpy(numbers) if output is Output.TORCH else numbers


def _short(rows: Sequence[int]) -> str:
    return str(list(rows)) if len(rows) <= 8 else f"{list(rows[:8])} and {len(rows) - 8} more"


def _close_all(opened: dict[int, tuple[Any, Any]]) -> None:
    while opened:
        _close(opened.popitem()[1])


def _close(pair: tuple[Any, Any]) -> None:
    opened, file = pair
    file.close()
    opened.close()
