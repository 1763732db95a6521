"""Storage that fails on purpose: an object store on disk, a file server on disk, and the local disk itself.

Both stores keep objects as files below the path in their URL (``objstore:///tmp/x``), so that they outlive a killed
process. A :class:`Plan` says which call fails, and how; it holds for this process only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import fsspec
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from lightning_resume.checkpoint import commit, filesystem

HIDDEN = ".part~"  # begins the name of what is being sent; no listing shows it
CLIENT_TRIES = 3  # of a store's client, of each request that is throttled


class ServerError(Exception):
    """Stands for an error of a client library that is no ``OSError``, such as botocore's ``ClientError``."""


class Throttled(Exception):
    """Stands for ``SlowDown``: the client tries again by itself."""


class Fault(enum.Enum):
    """What becomes of a call."""

    REFUSED = "503"
    TIMEOUT = "no answer"
    FULL = "ENOSPC"
    BROKEN = "EIO"
    DENIED = "EACCES"
    REPLY_LOST = "done, but reported as failed"
    LOST = "reported as done, but not done"
    CUT = "done in part, but reported as done"
    THROTTLED = "429"


ERRORS: dict[Fault, Callable[[], Exception]] = {
    Fault.REFUSED: lambda: ServerError("An error occurred (503): Service Unavailable"),
    Fault.REPLY_LOST: lambda: ServerError("Connection was closed before we received a valid response"),
    Fault.TIMEOUT: lambda: TimeoutError("Read timeout"),
    Fault.FULL: lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    Fault.BROKEN: lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    Fault.DENIED: lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    Fault.THROTTLED: lambda: Throttled("SlowDown"),
}


@dataclasses.dataclass(kw_only=True)
class Plan:
    """Lets the calls ``kind`` number ``first`` to ``first + times - 1`` (from 0) have a fault; counts all calls."""

    kind: str = ""
    fault: Fault = Fault.REFUSED
    first: int = 0
    times: int = 1
    wanted: Callable[[str], bool] = lambda _path: True
    """Of which paths calls are counted."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def next(self, kind: str, path: str) -> Fault | None:
        if not self.wanted(path):
            return None
        with self.lock:
            number = self.counts[kind] = self.counts.get(kind, -1) + 1
        return self.fault if kind == self.kind and self.first <= number < self.first + self.times else None

    @property
    def was_reached(self) -> bool:
        return self.counts.get(self.kind, -1) >= self.first


class ObjectStore(AbstractFileSystem):
    """Objects that appear whole when their upload is complete; there are no folders and no renames.

    Calls: ``part`` and ``complete`` of an upload, ``put``, ``read``, ``info``, ``list``, ``delete``.
    """

    protocol: ClassVar[Any] = ("objstore", "oss")  # the second says that a put is atomic
    root_marker = "/"
    cachable = True
    plan: ClassVar[Plan | None] = None
    lag: ClassVar[int] = 0
    """Listings, and what is told of an object, are as they were before so many changes."""
    past: ClassVar[deque[tuple[str, bool, int]]] = deque(maxlen=64)  # path, whether it was there, its bytes

    def call(self, kind: str, path: str, act: Callable[[], Any], cut: Callable[[], Any] | None = None) -> Any:
        """Does a request as its client would: again where it is throttled."""
        for tries in range(1, CLIENT_TRIES + 1):
            try:
                return self._request(kind, path, act, cut)
            except Throttled:
                if tries == CLIENT_TRIES:
                    raise
        return None

    def _request(self, kind: str, path: str, act: Callable[[], Any], cut: Callable[[], Any] | None) -> Any:
        fault = None if self.plan is None else self.plan.next(kind, path)
        if fault is Fault.LOST:
            return None
        if fault is Fault.CUT:
            return (cut or act)()
        if fault is Fault.REPLY_LOST:
            act()
        if fault is not None:
            raise ERRORS[fault]()
        return act()

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return "/" + str(path).partition("://")[2].strip("/") if "://" in str(path) else "/" + str(path).strip("/")

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found = self.call("list", path, lambda: self._entries(path))
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        found = self.call("info", path, lambda: self._entry(path))
        if found is None:
            raise FileNotFoundError(path)
        return dict(found)

    def _entries(self, path: str) -> list[dict[str, Any]]:
        own = self._entry(path)
        if own is not None and own["type"] == "file":
            return [own]
        objects = self._objects(path)
        names = sorted({key[len(path) :].lstrip("/").split("/")[0] for key in objects})
        return [entry for name in names if (entry := self._entry(f"{path}/{name}")) is not None]

    def _entry(self, path: str) -> dict[str, Any] | None:
        objects = self._objects(path)
        if path in objects:
            return {"name": path, "size": objects[path], "type": "file"}
        return {"name": path, "size": 0, "type": "directory"} if objects else None

    def _objects(self, path: str) -> dict[str, int]:
        """The bytes of each object at or below ``path``, as listings tell it."""
        files = [Path(path)] if os.path.isfile(path) else Path(path).rglob("*")
        found = {str(file): _size(file) for file in files if not file.name.startswith(HIDDEN) and file.is_file()}
        for key, existed, size in list(self.past)[::-1][: self.lag]:
            if key == path or key.startswith(f"{path}/"):
                found.pop(key, None)
                found |= {key: size} if existed else {}
        return found

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._strip_protocol(path)

        def read() -> bytes:
            try:
                return Path(path).read_bytes()[start:end]
            except (IsADirectoryError, NotADirectoryError):
                raise FileNotFoundError(path) from None

        return self.call("read", path, read, lambda: read()[: len(read()) // 2]) or b""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        path = self._strip_protocol(path)
        self.call("put", path, lambda: self.store(path, value), lambda: self.store(path, value[: len(value) // 2]))

    def store(self, path: str, data: bytes) -> None:
        """Makes ``data`` the object at ``path``, at once even where the process is killed."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        beside = Path(path).with_name(f"{HIDDEN}{uuid4().hex}")
        beside.write_bytes(data)
        self.remember(path)
        os.rename(beside, path)

    def remember(self, path: str) -> None:
        self.past.append((path, os.path.isfile(path), _size(Path(path))))

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **kwargs: Any) -> AbstractBufferedFile:
        assert mode == "wb", "only writing opens files"
        return _Upload(self, path, mode, block_size)

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)

        def remove() -> None:
            if os.path.isfile(path):
                self.remember(path)
                os.unlink(path)

        self.call("delete", path, remove)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        for key in self.call("list", self._strip_protocol(path), lambda: sorted(self._objects(path))) or ():
            self.rm_file(key)


class _Upload(AbstractBufferedFile):
    """Sends every full block as a part, and makes the object of all parts."""

    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        part = self.buffer.getvalue()
        add = self.parts.append
        self.fs.call("part", self.path, lambda: add(part), lambda: add(part[:-1]))
        if final:
            whole = b"".join(self.parts)
            store = self.fs.store
            self.fs.call("complete", self.path, lambda: store(self.path, whole), lambda: store(self.path, whole[:-1]))
        return True

    def discard(self) -> None:
        self.parts = []


class FileServer(ObjectStore):
    """Files that can be seen while they are written, and renamed over others, as SFTP does."""

    protocol: ClassVar[Any] = "fileserver"

    def store(self, path: str, data: bytes) -> None:
        self.remember(path)
        Path(path).write_bytes(data)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.call("makedirs", path, lambda: os.makedirs(path, exist_ok=exist_ok))

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        def rename() -> None:
            self.remember(path1)
            self.remember(path2)
            os.rename(path1, path2)

        self.call("rename", path2, rename)

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **kwargs: Any) -> AbstractBufferedFile:
        Path(path).touch()
        return _WriteThrough(self, path, mode, block_size)


class _WriteThrough(_Upload):
    def _upload_chunk(self, final: bool = False) -> bool:
        data = self.buffer.getvalue()
        self.fs.call("part", self.path, lambda: self._append(data), lambda: self._append(data[:-1]))
        return True

    def _append(self, data: bytes) -> None:
        with open(self.path, "ab") as file:
            file.write(data)


def register() -> None:
    """Lets fsspec, in this process and those that it forks, know the two stores by their URLs."""
    fsspec.register_implementation("objstore", ObjectStore, clobber=True)
    fsspec.register_implementation("fileserver", FileServer, clobber=True)


@contextlib.contextmanager
def failing(plan: Plan | None = None, *, lag: int = 0) -> Iterator[Plan]:
    """The stores fail as planned inside."""
    ObjectStore.plan, ObjectStore.lag = plan or Plan(), lag
    try:
        yield ObjectStore.plan
    finally:
        ObjectStore.plan, ObjectStore.lag = None, 0


# --- the local disk ---


@contextlib.contextmanager
def failing_disk(plan: Plan, *, can_exchange: bool = True) -> Iterator[Plan]:
    """The disk fails as planned inside: for what is written by us, and for every change of a name.

    Calls: ``open``, ``write``, ``fsync``, ``mkdir``, ``rename``, ``exchange``, ``unlink``, ``rmdir``, ``listdir``.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "mkdir", "rename", "unlink", "rmdir", "listdir"):
            patch.setattr(os, name, _faulty(plan, name, getattr(os, name)))
        exchange = filesystem.exchange if can_exchange else lambda *_: False
        patch.setattr(commit, "exchange", _faulty(plan, "exchange", exchange) if can_exchange else exchange)

        def open_file(path: Any, mode: str) -> io.BufferedWriter:
            assert mode == "xb"
            return io.BufferedWriter(_faulty(plan, "open", lambda p: _FaultyFile(p, plan))(path))

        patch.setattr(filesystem, "open", open_file, raising=False)
        yield plan


def _faulty(plan: Plan, kind: str, act: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        fault = plan.next(kind, str(args[0]) if args else "")
        if fault is Fault.LOST and kind == "fsync":
            return None  # the one call whose loss cannot be seen before the power fails
        if fault is not None:
            raise ERRORS[fault]()
        return act(*args, **kwargs)

    return call


class _FaultyFile(io.FileIO):
    """A new file whose writes may fail, be short (LOST: half of it, as told) or lose a byte (CUT, told as whole)."""

    def __init__(self, path: Any, plan: Plan) -> None:
        super().__init__(path, "xb")
        self._plan = plan

    def write(self, data: Any) -> int:
        fault = self._plan.next("write", str(self.name))
        view = memoryview(data).cast("B")
        if fault is Fault.LOST:
            return int(super().write(view[: len(view) // 2 + 1]))
        if fault is Fault.CUT:
            super().write(view[:-1])
            return len(view)
        if fault is not None:
            raise ERRORS[fault]()
        return int(super().write(view))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0
