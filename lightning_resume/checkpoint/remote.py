"""Files on any filesystem that fsspec knows: object stores, SFTP, memory. Nothing here is cached or copied to disk.

The client libraries (s3fs, gcsfs, adlfs, paramiko) do the transport and its retries. What they raise beyond ``OSError``
becomes a :class:`~lightning_resume.errors.StorageError`. Those that are not asynchronous inside are used by one thread
at a time: paramiko hangs when two do.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from uuid import uuid4

import fsspec
from fsspec.spec import AbstractBufferedFile

from lightning_resume import _fork
from lightning_resume.errors import MissingPackageError, StorageError

_fork.keep_filesystems()

PART_BYTES = 2**25
"""What is sent or asked for at once; S3 takes at most 10,000 parts, so files of up to 312 GiB."""

REQUESTS = 16
"""At once, of small ones."""

# an object appears whole when it is put; on all else (sftp, ftp, smb, ...) it must be written beside and renamed
_ATOMIC_PUT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"} | {
    "sftp": "sftp",
    "ssh": "sftp",
}


@dataclass(frozen=True)
class RemotePath:
    """A file or folder by URL, with the part of ``pathlib``'s interface that checkpoints need.

    Args:
        url: With its protocol and without a slash at the end, for example ``s3://bucket/runs/gpt``.
        storage_options: Arguments of the fsspec filesystem, beyond fsspec's own configuration.
    """

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def fs(self) -> Any:
        """The fsspec filesystem.

        Raises:
            MissingPackageError: The package for this protocol is not installed.
            StorageError: It could not be set up.
            ValueError: fsspec does not know the protocol.
        """
        try:
            fsspec.get_filesystem_class(self.protocol)
            with _named("connecting to", self.url):
                return _quick(fsspec.url_to_fs(self.url, **self.storage_options)[0])
        except ImportError as error:
            extra = _EXTRAS.get(self.protocol)
            install = f'pip install "lightning-resume[{extra}]"' if extra else "install the package named above"
            raise MissingPackageError(
                f"{self.url} needs a package that is not installed: {error}. {install}."
            ) from error

    @cached_property
    def path(self) -> str:
        """What the filesystem itself calls it."""
        return str(self.fs._strip_protocol(self.url))

    @property
    def protocol(self) -> str:
        return self.url.split("://")[0].split("::")[-1]

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        above = self.url.rpartition("/")[0]
        return RemotePath(f"{above}/" if above.endswith(":/") else above, self.storage_options)

    @property
    def is_root(self) -> bool:
        """Whether it is above all buckets, hosts and folders: nothing of ours lies there."""
        return self.url.endswith("://")

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}{name}" if self.is_root else f"{self.url}/{name}", self.storage_options)

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> Any:
        # without the filesystem, whose connections are this process's own
        return RemotePath, (self.url, dict(self.storage_options))

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return bool(self._info_of_folder())

    def exists(self) -> bool:
        return self.is_dir() or self._info() is not None

    def size(self) -> int | None:
        """Bytes of the file, None where there is none."""
        info = self._info()
        return int(info["size"]) if info is not None and info["type"] == "file" else None

    def names(self) -> list[str]:
        """The names in the folder; none where there is no folder."""
        return sorted(self.entries())

    def entries(self) -> dict[str, bool]:
        """What is in the folder, by name: whether it is a folder too."""
        found = {e["name"].rstrip("/").rpartition("/")[2]: e["type"] == "directory" for e in self._info_of_folder()}
        found.pop("", None)
        return found

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of the file, or as many from ``offset`` (bytes) as there are; large ranges in parallel.

        Raises:
            FileNotFoundError: There is no such file.
        """
        with self._doing("reading"):
            if length is None:
                return bytes(self.fs.cat_file(self.path))
            if length == 0:
                return b""
            starts = range(offset, offset + length, PART_BYTES)
            ends = [min(start + PART_BYTES, offset + length) for start in starts]
            if len(ends) == 1:
                return bytes(self.fs.cat_file(self.path, start=offset, end=ends[0]))
            return b"".join(self.fs.cat_ranges([self.path] * len(ends), list(starts), ends, on_error="raise"))

    def put(self, data: bytes) -> None:
        """Makes ``data`` the content of the file, at once: a reader sees the old content, or all of the new."""
        with self._doing("writing"):
            if self.puts_at_once:
                self.fs.pipe_file(self.path, data)
                return
            beside = self.with_name(f".{self.name}.tmp-{uuid4().hex[:16]}")
            beside.make_parent()
            try:
                self.fs.pipe_file(beside.path, data)
                if beside.size() != len(data):
                    raise StorageError(f"{beside} holds {beside.size()} of {len(data)} bytes after it was written.")
                beside.rename(self)
            except BaseException:
                with contextlib.suppress(Exception):
                    self.fs.rm_file(beside.path)
                raise

    def touch(self) -> None:
        """Makes the file, empty: in a step of its own, for nothing can be half of it."""
        with self._doing("writing"):
            self.make_parent()
            self.fs.pipe_file(self.path, b"")

    def rename(self, target: RemotePath) -> None:
        """Gives the file the name ``target``, in place of a file there."""
        with self._doing("renaming"):
            self.fs.mv(self.path, target.path)

    def remove_file(self) -> None:
        """Removes the file; no error where there is none."""
        with self._doing("removing"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path)

    def remove_folder(self) -> None:
        """Removes all that lies in the folder; no error where there is nothing."""
        with self._doing("removing"):
            self.fs.invalidate_cache()
            # `fs.rm` would take a "[" or "*" in the path for a pattern
            found = self.fs.find(self.path, withdirs=True, detail=True)
            for path, entry in found.items():
                if entry["type"] == "file":
                    with contextlib.suppress(FileNotFoundError):
                        self.fs.rm_file(path)
            if not self.appears_at_close:  # elsewhere there are no folders, only names with a slash
                folders = {path for path, entry in found.items() if entry["type"] == "directory"} | {self.path}
                for path in sorted(folders, key=len, reverse=True):
                    with contextlib.suppress(FileNotFoundError):
                        self.fs.rmdir(path)

    @property
    def puts_at_once(self) -> bool:
        """Whether :meth:`put` is one request, and not a rename."""
        protocols = self.fs.protocol if isinstance(self.fs.protocol, tuple | list) else (self.fs.protocol,)
        return bool(_ATOMIC_PUT & set(protocols))

    @property
    def appears_at_close(self) -> bool:
        """Whether a file that is being written is not to be seen before it is closed."""
        return self.puts_at_once and self.protocol != "memory"

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Around every use of the filesystem."""
        turn: Any = contextlib.nullcontext() if self.fs.async_impl else _turns.setdefault(self.fs, threading.RLock())
        with _named(what, self.url), turn:
            yield

    def make_parent(self) -> None:
        if self.puts_at_once:
            return
        try:
            self.fs.makedirs(self.parent.path, exist_ok=True)
        except OSError:
            self.fs.invalidate_cache()
            if not self.fs.isdir(self.parent.path):  # another rank may have made it at the same time
                raise

    def _info(self) -> dict[str, Any] | None:
        with self._doing("looking at"):
            self.fs.invalidate_cache()
            try:
                return dict(self.fs.info(self.path))
            except FileNotFoundError:
                return None

    def _info_of_folder(self) -> list[dict[str, Any]]:
        with self._doing("listing"):
            self.fs.invalidate_cache()
            try:
                entries = self.fs.ls(self.path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        # of a file, `ls` gives the file itself
        own = self.path.rstrip("/")
        return [entry for entry in entries if entry["name"].rstrip("/") != own]


# paramiko's connection hangs when two threads use it at once
_turns: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Upload:
    """A new remote file, which appears when it is closed: one part is sent while the next one is filled."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        with path._doing("writing"):
            path.make_parent()
            self._file = path.fs.open(path.path, "wb", block_size=PART_BYTES)
            if hasattr(self._file, "set_pipelined"):  # paramiko's would wait for an answer every 32 KiB
                self._file.set_pipelined(True)
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="lightning-resume-upload")
        self._sending: Future[None] | None = None
        self._part = bytearray()
        self._bytes = 0

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PART_BYTES):
            self._part += view[start : start + PART_BYTES]
            if len(self._part) >= PART_BYTES:
                self._send()
        self._bytes += len(view)
        return len(view)

    def flush(self) -> None:
        pass  # what is short of a part is sent with the next one

    def close(self) -> None:
        """Sends the rest and makes the file appear.

        Raises:
            OSError: It was not stored as it was written.
        """
        try:
            self._send()
            self._wait()
            with self._path._doing("writing"):
                self._file.close()
        except BaseException:
            self.discard()
            raise
        self._sender.shutdown()
        stored = self._path.size()
        if stored != self._bytes:
            raise StorageError(f"{self._path} holds {stored} bytes after {self._bytes} were written to it.")

    def discard(self) -> None:
        """Gives the upload up: the file does not appear, or is removed."""
        self._sender.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(Exception), self._path._doing("giving up"):
            if isinstance(self._file, AbstractBufferedFile):
                self._file.closed = True  # else it would send what it holds when it is collected
                self._file.discard()
            else:
                self._file.close()
        with contextlib.suppress(Exception):
            if not self._path.appears_at_close:
                self._path.remove_file()

    def _send(self) -> None:
        self._wait()
        part, self._part = self._part, bytearray()
        self._sending = self._sender.submit(self._write, part)

    def _write(self, part: bytearray) -> None:
        with self._path._doing("writing"):
            written = self._file.write(bytes(part))
        if written is not None and written != len(part):
            raise StorageError(f"{self._path}: {written} of {len(part)} bytes were taken.")

    def _wait(self) -> None:
        if self._sending is not None:
            self._sending.result()
            self._sending = None


def _quick(fs: Any) -> Any:
    """Lets paramiko send at once what it is given; waiting for more costs a second for every megabyte."""
    if "sftp" in fs.protocol:
        fs.client.get_transport().sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return fs


@contextlib.contextmanager
def _named(doing: str, url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        # every client library has errors of its own for a store that does not answer or refuses
        raise StorageError(
            f"{doing} {url} failed ({type(error).__module__}.{type(error).__name__}: {error})."
        ) from error
