"""Opens parquet files, by position and as streams; errors name the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_resume.errors import MissingPackageError

SUFFIXES = (".parquet", ".pq")


def pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingPackageError(
            "Parquet files need pyarrow: `pip install 'lightning-resume[data]'`, or `pip install pyarrow`."
        ) from error
    return parquet


def open_parquet(opened: Any, url: str, columns: Sequence[str] | None) -> Any:
    """The parquet file that is open as ``opened``.

    Raises:
        ValueError: It is none, or has not the ``columns``.
    """
    with naming(url):
        file = pyarrow_parquet().ParquetFile(opened, pre_buffer=True)
    check_columns(file.metadata, url, columns)
    return file


@contextlib.contextmanager
def naming(url: str) -> Iterator[None]:
    """Has errors of Arrow name the file that was read."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # of errors that the system raises, and the network, the class is for callers to see
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        advice = "Write it again, or take it away."
        if not url.lower().endswith(SUFFIXES):
            advice = 'Pass `format=` for files that are not parquet: "jsonl", "text" or "tar".'
        raise ValueError(f"{url} cannot be read as parquet: {str(error).rstrip('.')}. {advice}") from error


def check_columns(metadata: Any, url: str, columns: Sequence[str] | None) -> None:
    """Raises ValueError when one of ``columns`` is not in the file, or in it twice."""
    names = metadata.schema.to_arrow_schema().names
    wanted = names if columns is None else [name.split(".")[0] for name in columns]
    twice = sorted({name for name in wanted if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"{url} has {names.count(twice[0])} columns named {twice[0]!r}. Rename one of them.")
    if set(columns or ()) <= set(names):
        return
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    for name in columns or ():
        if not any(path == name or path.startswith(f"{name}.") for path in paths):
            raise ValueError(f"{url} has no column {name!r}; it has {names}. Correct `columns`.")


def group_rows(metadata: Any) -> list[int]:
    """The rows of each row group."""
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def row_numbers(rows: Sequence[int] | npt.NDArray[np.int64]) -> Any:
    """The rows as Arrow takes them; given as NumPy's, they make it import pandas, in every worker process."""
    import pyarrow as pa

    numbers = np.ascontiguousarray(rows, dtype=np.int64)
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])
