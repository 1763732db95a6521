"""Reads the stored bytes of a checkpoint folder and checks them against the manifest before anyone sees them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from lightning_resume.checkpoint._dcp import StorageInfo
from lightning_resume.checkpoint.manifest import FileEntry, Manifest
from lightning_resume.errors import CheckpointCorruptError

_HASH_BYTES = 2**24  # at a time
_ADVICE = "The file changed after it was saved. Load another checkpoint, or copy this one again from its source."


class ItemSource:
    """The files of one checkpoint folder; without a manifest (a stock checkpoint) there is nothing to verify with."""

    def __init__(self, folder: Path, manifest: Manifest | None) -> None:
        self._folder = folder
        self._files: Mapping[str, FileEntry] | None = None if manifest is None else manifest.files

    def has(self, name: str) -> bool:
        return (self._folder / name).is_file() if self._files is None else name in self._files

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

    def verify(self) -> None:
        """Reads every file of the manifest and checks it.

        Raises:
            CheckpointCorruptError: A file is missing or differs from what the manifest says.
        """
        for name, entry in (self._files or {}).items():
            self._check_size(name)
            self._compare(f"file {name}", entry.hash, _hash_file(self._folder / name))

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
        file = self._folder / name
        if not file.is_file():
            raise self._corrupt(f"file {name}", "the file", "nothing")
        size = file.stat().st_size
        if self._files is not None and size != self._entry(name).bytes:
            raise self._corrupt(f"file {name}", f"{self._entry(name).bytes} bytes", f"{size} bytes")
        return size

    def _entry(self, name: str) -> FileEntry:
        assert self._files is not None
        if name not in self._files:
            raise self._corrupt(f"file {name}", "an entry in the manifest", "none")
        return self._files[name]

    def _read(self, name: str, offset: int, length: int) -> bytes:
        with open(self._folder / name, "rb", buffering=0) as file:
            file.seek(offset)
            data = _read_fully(file.fileno(), length)
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
            f"The checkpoint {self._folder} is damaged: {what}: expected {expected}, found {found}. {_ADVICE}"
        )


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while part := file.read(_HASH_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _read_fully(descriptor: int, length: int) -> bytes:
    # one read may return less than asked for (at most 2 GiB on Linux)
    parts = []
    while length > 0:
        part = os.read(descriptor, min(length, 2**30))
        if not part:
            break
        parts.append(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
