"""What the format needs of a local filesystem: durable files, durable folders, and one atomic change of names."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import torch
import xxhash

from lightning_resume.checkpoint.manifest import FileEntry, Item
from lightning_resume.checkpoint.names import MANIFEST_NAME
from lightning_resume.checkpoint.paths import AnyPath
from lightning_resume.checkpoint.remote import RemotePath, Upload

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_WRITEBACK_BYTES = 2**25
_SYNC_FILE_RANGE_WRITE = 2
# what the kernel or the filesystem answers when it cannot exchange two names
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV)


def make_folder(folder: Path) -> None:
    """Makes ``folder`` and what is missing above it, durably."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one atomic step; returns False where the system or filesystem cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def remove(path: Path) -> None:
    """Removes a checkpoint of any kind, of a folder its manifest first, so that no part of it passes for the whole.

    What another thread has removed meanwhile is no error.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    if sys.version_info >= (3, 12):
        shutil.rmtree(path, onexc=_unless_missing)
    else:
        shutil.rmtree(path, onerror=lambda function, at, caught: _unless_missing(function, at, caught[1]))


def _unless_missing(_function: object, _path: object, error: BaseException) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextlib.contextmanager
def or_warn(path: AnyPath) -> Iterator[None]:
    """Around the removal of what is no longer needed: warns where it fails, since the checkpoint itself is safe."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{path} is no longer needed but could not be removed: {error}", stacklevel=3)


def discard(path: Path) -> None:
    """Removes what is no longer needed, or warns."""
    with or_warn(path):
        remove(path)


def torch_save(obj: object, file: _Writable) -> None:
    """Is ``torch.save``, except that a failed write raises its own ``OSError``."""
    try:
        torch.save(obj, file)  # type: ignore[arg-type]
    except RuntimeError as error:
        # torch closes its archive after the failed write and raises that second failure over the first
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class _Writable(Protocol):
    def write(self, data: Any, /) -> int: ...

    def flush(self) -> None: ...


class LocalFile:
    """A new local file, durable once it is closed.

    Raises:
        FileExistsError: There is a file of that name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by close or discard
        self._bytes = self._on_its_way = 0

    def write(self, data: Any, /) -> int:
        self._file.write(data)
        size = memoryview(data).nbytes
        self._bytes += size
        if self._bytes - self._on_its_way >= _WRITEBACK_BYTES:
            _begin_writeback(self._file.fileno(), self._on_its_way, self._bytes - self._on_its_way)
            self._on_its_way = self._bytes
        return size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            found = os.fstat(self._file.fileno()).st_size
        if found != self._bytes:
            raise OSError(errno.EIO, f"{found} of {self._bytes} bytes were stored", str(self._path))

    def discard(self) -> None:
        self._file.close()


def new_file(path: AnyPath) -> LocalFile | Upload:
    """Opens a new file to be written once, from its start to its end."""
    return Upload(path) if isinstance(path, RemotePath) else LocalFile(path)


class HashedFile:
    """A new file that is hashed while it is written, as a whole and item by item, and is durable once closed.

    Raises:
        FileExistsError: There is a local file of that name.
    """

    def __init__(self, path: AnyPath) -> None:
        self._file = new_file(path)
        self._whole, self._item = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._items: list[Item] = []
        self._start = self._position = 0

    def write(self, data: Any, /) -> int:
        size = self._file.write(data)
        self._whole.update(data)
        self._item.update(data)
        self._position += size
        return size

    def flush(self) -> None:
        self._file.flush()

    def end_item(self) -> Item:
        """Returns what was written since the last call, as offset (bytes), length (bytes) and hash."""
        item = (self._start, self._position - self._start, self._item.hexdigest())
        self._items.append(item)
        self._start = self._position
        self._item.reset()
        return item

    def entry(self) -> FileEntry:
        return FileEntry(bytes=self._position, hash=self._whole.hexdigest(), items=tuple(self._items))

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._file.close()
        else:
            self._file.discard()


def _begin_writeback(descriptor: int, offset: int, length: int) -> None:
    """Lets the disk begin, so that it is at work while more is written, and the fsync at the end finds little to do."""
    begin = _sync_file_range()
    if begin is not None:  # whatever it answers: the fsync will tell what failed
        begin(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[..., int] | None:
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        begin.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return begin


@cache
def _renameat2() -> Callable[..., int] | None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        rename.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return rename
