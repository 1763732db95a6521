"""The rows that the benchmark of loaders reads, in the formats that it reads them from."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TEXT = 80
"""Characters of a row's text."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows: ``id``, counted from 0 over all files, and ``text``; as parquet, and as what others read."""

    folder: Path
    rows: int
    batch_size: int

    @property
    def parquet(self) -> Path:
        return self.folder / "parquet"

    @property
    def files(self) -> list[str]:
        return sorted(map(str, self.parquet.glob("*.parquet")))

    @property
    def arrow(self) -> Path:
        """One memory-mapped file, for map-style datasets."""
        return self.folder / "rows.arrow"


def write_data(data: Data, *, files: int, row_group: int) -> None:
    data.parquet.mkdir(parents=True)
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    table = pa.table([range(data.rows), [f"{row:0{TEXT}x}" for row in range(data.rows)]], schema=schema)
    with pa.OSFile(str(data.arrow), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)  # in one piece, which is the fastest to take single rows from
    edges = [data.rows * n // files for n in range(files + 1)]
    for number, (first, end) in enumerate(itertools.pairwise(edges)):
        part = table.slice(first, end - first)
        pq.write_table(part, data.parquet / f"part-{number:03d}.parquet", row_group_size=row_group)


def write_json_lines(folder: Path, data: Data) -> None:
    for file, rows in shards(folder, data, "jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_text(folder: Path, data: Data) -> None:
    for file, rows in shards(folder, data, "txt"):
        file.write_text("".join(row["text"] + "\n" for row in rows))


def write_tar(folder: Path, data: Data) -> None:
    for file, rows in shards(folder, data, "tar"):
        with tarfile.open(file, "w") as tar:
            for row in rows:
                member = tarfile.TarInfo(f"{row['id']:09d}.txt")
                member.size = len(row["text"])
                tar.addfile(member, io.BytesIO(row["text"].encode()))


def shards(folder: Path, data: Data, suffix: str) -> Iterator[tuple[Path, list[Any]]]:
    """A file to write for each parquet file, and its rows; none where they have been written."""
    if folder.exists():
        return
    folder.mkdir()
    for number, file in enumerate(data.files):
        yield folder / f"part-{number:03d}.{suffix}", pq.read_table(file).to_pylist()
