"""Reads the stored bytes of a checkpoint folder and checks them against the manifest before anyone sees them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import xxhash

from lightning_resume.checkpoint._dcp import StorageInfo
from lightning_resume.checkpoint.manifest import FileEntry, Manifest
from lightning_resume.checkpoint.paths import AnyPath, read_range, size_of
from lightning_resume.checkpoint.remote import RemotePath
from lightning_resume.errors import CheckpointCorruptError

_HASH_BYTES = 2**24  # at a time
_ADVICE = "The file changed after it was saved. Load another checkpoint, or copy this one again from its source."


class ItemSource:
    """The files of one checkpoint folder; without a manifest (a stock checkpoint) there is nothing to verify with."""

    def __init__(self, folder: AnyPath, manifest: Manifest | None) -> None:
        self.folder = folder if manifest is None or manifest.folder is None else folder / manifest.folder
        self._files: Mapping[str, FileEntry] | None = None if manifest is None else manifest.files
        self._sizes: dict[str, int | None] = {}
        self._lock = threading.Lock()

    @property
    def is_remote(self) -> bool:
        return isinstance(self.folder, RemotePath)

    def has(self, name: str) -> bool:
        return self._size(name) is not None if self._files is None else name in self._files

    def whole(self, name: str) -> bytes:
        """Returns the verified bytes of the whole file ``name``.

        Raises:
            CheckpointCorruptError: The file is missing or differs from what the manifest says.
        """
        size = self._check_size(name)
        data = self._read(name, 0, size)
        if self._files is not None:
            self._check_hash(f"file {name}", self._files[name].hash, data)
        return data

    def verify_file(self, name: str, keys: Mapping[int, str], read: Callable[[int], None]) -> None:
        """Reads the file ``name`` of the manifest and checks it; ``read`` is told of every so many bytes.

        ``keys`` says which item begins at which byte.

        Raises:
            CheckpointCorruptError: It is missing or differs; names the first item that does.
        """
        size, entry = self._check_size(name), self._entry(name)
        whole = xxhash.xxh3_128()
        for offset in range(0, size, _HASH_BYTES):
            part = self._read(name, offset, min(_HASH_BYTES, size - offset))
            whole.update(part)
            read(len(part))
        if whole.hexdigest() != entry.hash:
            self._verify_items(name, entry, keys)
            raise self._corrupt(f"file {name}", f"xxh3-128 {entry.hash}", whole.hexdigest())

    def _verify_items(self, name: str, entry: FileEntry, keys: Mapping[int, str]) -> None:
        for offset, length, expected in entry.items:
            found = xxhash.xxh3_128_hexdigest(self._read(name, offset, length))
            self._compare(f"file {name}, item {keys.get(offset, 'unknown')!r}", expected, found)

    def item(self, key: str, info: StorageInfo) -> bytes:
        """Returns the verified bytes of the item ``key``, which lies at ``info`` (file, offset and length in bytes).

        Raises:
            CheckpointCorruptError: The item or its file is missing or differs from what the manifest says.
        """
        name = info.relative_path
        size = self._check_size(name)
        if info.offset + info.length > size:
            raise self._corrupt(f"file {name}", f"item {key!r} up to byte {info.offset + info.length}", f"{size} bytes")
        data = self._read(name, info.offset, info.length)
        if self._files is not None:
            self._check_hash(f"file {name}, item {key!r}", self._item_hash(key, info), data)
        return data

    def _check_size(self, name: str) -> int:
        size = self._size(name)
        if size is None:
            raise self._corrupt(f"file {name}", "the file", "nothing")
        if self._files is not None and size != self._entry(name).bytes:
            raise self._corrupt(f"file {name}", f"{self._entry(name).bytes} bytes", f"{size} bytes")
        return size

    def _size(self, name: str) -> int | None:
        """Asked for once: on a remote store it is a request."""
        with self._lock:
            if name not in self._sizes:
                self._sizes[name] = size_of(self.folder / name)
            return self._sizes[name]

    def _entry(self, name: str) -> FileEntry:
        assert self._files is not None
        if name not in self._files:
            raise self._corrupt(f"file {name}", "an entry in the manifest", "none")
        return self._files[name]

    def _read(self, name: str, offset: int, length: int) -> bytes:
        try:
            data = read_range(self.folder / name, offset, length)
        except FileNotFoundError:
            data = b""
        except OSError as error:
            # of a store, EIO is any answer that its client does not know, and says nothing about the file
            if self.is_remote or error.errno != errno.EIO:
                raise
            raise self._corrupt(f"file {name}", f"{length} bytes from byte {offset}", str(error)) from error
        if len(data) != length:
            raise self._corrupt(f"file {name}", f"{length} bytes from byte {offset}", f"{len(data)} bytes")
        return data

    def _item_hash(self, key: str, info: StorageInfo) -> str:
        found = self._item_hashes.get((info.relative_path, info.offset, info.length))
        if found is None:
            raise self._corrupt(f"file {info.relative_path}, item {key!r}", "an entry in the manifest", "none")
        return found

    @cached_property
    def _item_hashes(self) -> dict[tuple[str, int, int], str]:
        files = self._files or {}
        return {(name, item[0], item[1]): item[2] for name, entry in files.items() for item in entry.items}

    def _check_hash(self, what: str, expected: str, data: bytes) -> None:
        self._compare(what, expected, xxhash.xxh3_128_hexdigest(data))

    def _compare(self, what: str, expected: str, found: str) -> None:
        if found != expected:
            raise self._corrupt(what, f"xxh3-128 {expected}", found)

    def _corrupt(self, what: str, expected: Any, found: Any) -> CheckpointCorruptError:
        return CheckpointCorruptError(
            f"The checkpoint {self.folder} is damaged: {what}: expected {expected}, found {found}. {_ADVICE}"
        )
