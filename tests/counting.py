"""A filesystem for fsspec that tells what was asked of it: ``counting:///tmp/x`` is the local ``/tmp/x``, watched.

Every open, every range of bytes read and every question about a path becomes one line of a log file, also from worker
processes that were forked: import this module, and pass ``storage_options=counted.options``, with

    counted = Counted(tmp_path / "log")
    loader, dataset = ShardedDataset.create_dataloader(counted.url(folder), storage_options=counted.options, ...)
    counted.clear()
    ...
    assert counted.opens() == {"shard-3.jsonl": 1}
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem


class CountingFileSystem(AbstractFileSystem):
    """Local files; ``log`` is the file that every call is written to."""

    protocol = "counting"
    root_marker = "/"
    cachable = False

    def __init__(self, log: str = os.devnull, **options: Any) -> None:
        super().__init__(log=log, **options)
        self.log, self._local = log, LocalFileSystem()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return "/" + str(path).removeprefix("counting://").strip("/")

    def note(self, call: str, path: str, *range: int) -> None:
        line = json.dumps([call, path, *range]) + "\n"
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(handle, line.encode())  # one write of one line: processes do not mix theirs
        finally:
            os.close(handle)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        path = self._strip_protocol(path)
        self.note("list", path)
        return self._local.ls(path, detail=detail)

    def info(self, path: str, **options: Any) -> Any:
        path = self._strip_protocol(path)
        self.note("info", path)
        return self._local.info(path)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self.note("open", path)
        return CountedFile(self, path, Path(path).open("rb"))


class CountedFile(io.RawIOBase):
    """One open file."""

    def __init__(self, filesystem: CountingFileSystem, path: str, file: Any) -> None:
        self._filesystem, self._path, self._file = filesystem, path, file

    def readinto(self, buffer: Any) -> int:
        start = self._file.tell()
        count: int = self._file.readinto(buffer)
        self._filesystem.note("read", self._path, start, start + count)
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)  # type: ignore[no-any-return]

    def tell(self) -> int:
        return self._file.tell()  # type: ignore[no-any-return]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


fsspec.register_implementation("counting", CountingFileSystem, clobber=True)


class Counted:
    """What was asked of the files since the last :meth:`clear`. Files are named by the last part of their path."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.options = {"log": str(log)}

    def url(self, path: Path) -> str:
        return f"counting://{path}"

    def clear(self) -> None:
        self.log.write_text("")

    def calls(self) -> list[list[Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [[call, Path(path).name, *range] for call, path, *range in map(json.loads, lines)]

    def opens(self) -> dict[str, int]:
        """How often each file was opened."""
        return dict(Counter(name for call, name, *_ in self.calls() if call == "open"))

    def ranges(self) -> dict[str, list[tuple[int, int]]]:
        """Which bytes of each file were read, in the order of reading."""
        found: dict[str, list[tuple[int, int]]] = {}
        for call, name, *range in self.calls():
            if call == "read":
                found.setdefault(name, []).append((range[0], range[1]))
        return found

    def bytes_read(self) -> dict[str, int]:
        """How many bytes of each file were read; those read twice count twice."""
        return {name: sum(end - start for start, end in ranges) for name, ranges in self.ranges().items()}

    def asked(self) -> set[str]:
        """The files about which anything was asked but listing folders."""
        return {name for call, name, *_ in self.calls() if call != "list"}
