"""How many rows each part of each file holds: what a position in the data is counted in."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

from lightning_resume.data.sharded.files import Shard

Rows = npt.NDArray[np.int64]

_VERSION = 1
_LARGEST = 2**30
"""Bytes that a saved table may unpack to: some hundred million units."""


@final
class Table:
    """The shards of a dataset and the rows of their units (row groups), in order.

    Args:
        shards: Path and size of each file.
        rows: For each file, the number of rows of each of its units.
        schema: The columns of all, as Arrow writes it; None where it is not known.
    """

    def __init__(self, shards: Sequence[Shard], rows: Iterable[Sequence[int]], *, schema: bytes | None = None) -> None:
        self.shards, self.schema = tuple(shards), schema
        self.rows = tuple(tuple(of_shard) for of_shard in rows)
        if len(self.shards) != len(self.rows):
            raise ValueError(f"{len(self.shards)} shards, but the rows of {len(self.rows)}")

    @functools.cached_property
    def unit_rows(self) -> Rows:
        """Rows of every unit, shard after shard."""
        return np.fromiter(itertools.chain.from_iterable(self.rows), dtype=np.int64)

    @functools.cached_property
    def first_row(self) -> Rows:
        """The row at which every unit begins, and at the end the number of all rows."""
        return _starts(self.unit_rows)

    @functools.cached_property
    def first_unit(self) -> Rows:
        """The unit at which every shard begins, and at the end the number of all units."""
        return _starts(np.array([len(of_shard) for of_shard in self.rows], dtype=np.int64))

    @functools.cached_property
    def shard_rows(self) -> Rows:
        """Rows of every shard."""
        edges = self.first_row[self.first_unit]
        return np.diff(edges)

    def __len__(self) -> int:
        """Rows of all shards."""
        return int(self.first_row[-1])

    def extended(self, other: Table) -> Table:
        """These shards, then those of ``other``, whose schema is that of all: rows keep their numbers."""
        schema = None if self.schema is None else other.schema
        return Table(self.shards + other.shards, self.rows + other.rows, schema=schema)

    def to_bytes(self) -> bytes:
        """A compact form: what is alike in many files, as paths and row counts are, takes little room."""
        runs = [[[n, len(list(same))] for n, same in itertools.groupby(of_shard)] for of_shard in self.rows]
        content: dict[str, Any] = {"version": _VERSION, "files": [[s.path, s.size] for s in self.shards], "rows": runs}
        if self.schema is not None:
            content["schema"] = base64.b64encode(self.schema).decode()
        return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 6)

    @classmethod
    def from_bytes(cls, data: bytes) -> Table:
        """Restores what :meth:`to_bytes` returned.

        Raises:
            ValueError: It is damaged, or of a newer version.
        """
        try:
            content = json.loads(_unpacked(data))
            version = content["version"]
            if version == _VERSION:
                return cls._from_content(content)
        except (zlib.error, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The saved table of files is damaged ({error}): load another checkpoint.") from error
        raise ValueError(f"The table of files has version {version}, newer than {_VERSION}: upgrade lightning-resume.")

    @classmethod
    def _from_content(cls, content: Any) -> Table:
        shards = [Shard(path=str(path), size=int(size)) for path, size in content["files"]]
        rows = [[int(n) for n, times in runs for _ in range(int(times))] for runs in content["rows"]]
        if any(n < 0 for of_shard in rows for n in of_shard):
            raise ValueError("a number of rows is negative")
        schema = content.get("schema")
        return cls(shards, rows, schema=None if schema is None else base64.b64decode(schema, validate=True))


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(data, _LARGEST)
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise ValueError("it does not end where it should")
    return content


def _starts(counts: Rows) -> Rows:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
