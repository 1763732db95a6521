"""What the format needs of a filesystem: durable files, durable folders, and one atomic change of names.

Local and mounted filesystems only, for now; object stores are to come behind the same functions.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import torch
import xxhash
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from lightning_resume.checkpoint.manifest import FileEntry, Item
from lightning_resume.checkpoint.names import MANIFEST_NAME
from lightning_resume.errors import RemoteStorageError

_LOCAL_PROTOCOLS = ("file", "local")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# what the kernel or the filesystem answers when it cannot exchange two names
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns ``path`` as an absolute local path; a trailing slash and ``file://`` are taken off.

    Raises:
        RemoteStorageError: ``path`` is a URL of another protocol.
    """
    text = os.fspath(path)
    # pathlib makes "s3:/bucket" of "s3://bucket", and with it a local folder named "s3:"
    protocol = text.split(":/")[0] if isinstance(path, Path) and ":/" in text else get_protocol(text)
    if "/" in protocol or protocol in _LOCAL_PROTOCOLS:
        return Path(os.path.abspath(LocalFileSystem._strip_protocol(text)))
    raise RemoteStorageError(
        f"{text} is on remote storage ({protocol}), which comes in a later version of lightning-resume. "
        "Save to a local or mounted path and copy the whole folder."
    )


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
    """Removes a checkpoint of any kind, of a folder its manifest first, so that no part of it passes for the whole."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(path)


def discard(path: Path) -> None:
    """Removes what is no longer needed; warns where that fails, because the checkpoint itself is safe by then."""
    try:
        remove(path)
    except OSError as error:
        warnings.warn(f"{path} is no longer needed but could not be removed: {error}", stacklevel=2)


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


class HashedFile:
    """A new file that is hashed while it is written, as a whole and item by item, and is durable once closed.

    Raises:
        FileExistsError: There is a file of that name.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by __exit__
        self._whole, self._item = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._items: list[Item] = []
        self._start = self._position = 0

    def write(self, data: Any, /) -> int:
        self._file.write(data)
        self._whole.update(data)
        self._item.update(data)
        size = memoryview(data).nbytes
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
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


@cache
def _renameat2() -> Callable[..., int] | None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        rename.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return rename
