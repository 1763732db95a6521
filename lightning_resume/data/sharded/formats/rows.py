"""Parquet files row by row, for what cannot be counted beforehand: filters, packing, batches by length."""

from __future__ import annotations

import posixpath
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, final

import fsspec

from lightning_resume.data.sharded.blocks import Place
from lightning_resume.data.sharded.files import Files
from lightning_resume.data.sharded.formats.format import Format, Piece, Window
from lightning_resume.data.sharded.parquet_file import SUFFIXES, group_rows, naming, open_parquet, row_numbers
from lightning_resume.data.sharded.schemas import shaped, unified

if TYPE_CHECKING:
    import pyarrow as pa


@final
class ParquetRows(Format):
    """Rows as dicts. A window is one row group, or as many as ``window`` says; its offset is the first one's number.

    Args:
        columns: Which to read; all when None.
    """

    name = "parquet"
    suffixes = SUFFIXES
    default_window = 1
    resume_cost = "opens the one file that each lane is in, and reads its row group again"

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        self._columns = None if columns is None else list(columns)

    def windows(self, files: Files, piece: Piece, place: Place, size: int) -> Iterator[Window]:
        filesystem, _ = fsspec.url_to_fs(files.given, **files.storage_options)
        url = posixpath.join(files.root, piece.path)
        with filesystem.open(url, "rb", cache_type="none") as opened:
            file = open_parquet(opened, url, self._columns)
            counts = group_rows(file.metadata)
            for group in range(place.offset, len(counts), size):
                groups = list(range(group, min(group + size, len(counts))))
                with naming(url):
                    table = file.read_row_groups(groups, columns=self._columns, use_threads=False)
                first = sum(counts[:group])
                end = Place(0, group + size) if group + size < len(counts) else None
                rows = Rows(table, url, self)
                yield Window(Place(0, group), range(first, first + len(rows)), rows, end)
                rows.shrink()

    def decode(self, content: Row, url: str, key: int) -> dict[str, Any]:
        return content.sample()


@final
class Rows(Sequence[Any]):
    """The rows of a window, in Arrow's memory until somebody wants Python's.

    Args:
        table: Holds them.
        url: Of the file that they are of.
        format: Has read them.
    """

    def __init__(self, table: pa.Table, url: str, format: ParquetRows) -> None:
        self.table, self.url, self.format = table, url, format
        self._samples: list[dict[str, Any]] | None = None
        self._given: weakref.WeakSet[Row] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        row = Row(self, index)
        self._given.add(row)
        return row

    def sample(self, index: int) -> dict[str, Any]:
        if self._samples is None:
            self._samples = self.table.to_pylist()
        return self._samples[index]

    def shrink(self) -> None:
        """Keeps those rows only that somebody still has: a few of each window may wait for a batch to fill."""
        left = list(self._given)
        self.table, self._samples = self.table.take(row_numbers([row.index for row in left])), None
        for index, row in enumerate(left):
            row.index = index


@final
class Row:
    """One row of a window."""

    __slots__ = ("__weakref__", "index", "rows")

    def __init__(self, rows: Rows, index: int) -> None:
        self.rows, self.index = rows, index

    def sample(self) -> dict[str, Any]:
        return self.rows.sample(self.index)


def table_of(rows: Sequence[Row]) -> pa.Table | None:
    """The rows as one table, in their order; None where they are of several datasets that no type holds together.

    Raises:
        ValueError: They are of one dataset, whose files have types that do not go together.
    """
    import pyarrow as pa

    places: dict[Rows, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.rows, []).append(place)
    schema, clashes = _schema_of(list(places))
    if clashes:
        if len({group.format for group in places}) == 1:
            raise ValueError(next(iter(clashes.values())))
        return None
    parts = [
        shaped(group.table.take(row_numbers([rows[place].index for place in of_group])), schema, group.url)
        for group, of_group in places.items()
    ]
    back = [0] * len(rows)
    for number, place in enumerate(place for of_group in places.values() for place in of_group):
        back[place] = number
    return parts[0] if len(parts) == 1 else pa.concat_tables(parts).take(row_numbers(back))


def _schema_of(groups: Sequence[Rows]) -> tuple[pa.Schema, dict[str, str]]:
    schema = groups[0].table.schema
    if all(group.table.schema.equals(schema) for group in groups):  # as nearly always
        return schema, {}
    return unified((group.url, group.table.schema) for group in groups)
