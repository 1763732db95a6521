"""Parquet files row by row, for what cannot be counted beforehand: filters, packing, batches by length."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from typing import Any, final

import fsspec

from lightning_resume.data.sharded.blocks import Place
from lightning_resume.data.sharded.files import Files
from lightning_resume.data.sharded.formats.format import Format, Piece, Window
from lightning_resume.errors import MissingPackageError


@final
class ParquetRows(Format):
    """Rows as dicts. A window is one row group, or as many as ``window`` says; its offset is the first one's number.

    Args:
        columns: Which to read; all when None.
    """

    name = "parquet"
    suffixes = (".parquet", ".pq")
    default_window = 1
    resume_cost = "opens the one file that each lane is in, and reads its row group again"

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        self._columns = None if columns is None else list(columns)

    def windows(self, files: Files, piece: Piece, place: Place, size: int) -> Iterator[Window]:
        filesystem, _ = fsspec.url_to_fs(files.given, **files.storage_options)
        with filesystem.open(posixpath.join(files.root, piece.path), "rb", cache_type="none") as opened:
            file = _parquet().ParquetFile(opened, pre_buffer=True)
            rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            unknown = sorted(set(self._columns or ()) - set(file.schema_arrow.names))
            if unknown:
                raise ValueError(
                    f"{posixpath.join(files.root, piece.path)} has no column {unknown[0]!r}; it has"
                    f" {file.schema_arrow.names}. Correct `columns`."
                )
            for group in range(place.offset, len(rows), size):
                groups = list(range(group, min(group + size, len(rows))))
                contents = file.read_row_groups(groups, columns=self._columns, use_threads=False).to_pylist()
                first = sum(rows[:group])
                end = Place(0, group + size) if group + size < len(rows) else None
                yield Window(Place(0, group), range(first, first + len(contents)), contents, end)

    def decode(self, content: Any, url: str, key: int) -> Any:
        return content


def _parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingPackageError(
            "Parquet files need pyarrow: `pip install 'lightning-resume[data]'`, or `pip install pyarrow`."
        ) from error
    return parquet
