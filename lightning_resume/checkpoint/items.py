"""Reads the stored bytes of a checkpoint folder and checks them against the manifest before anyone sees them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from lightning_resume.checkpoint.manifest import FileEntry, Manifest
from lightning_resume.checkpoint.paths import AnyPath, read_range, size_of
from lightning_resume.checkpoint.remote import RemotePath
from lightning_resume.checkpoint.stored import DIGEST_BYTES, StoredItem, blocks_of, hash_of_items
from lightning_resume.errors import CheckpointCorruptError

_HASH_BYTES = 2**24  # at a time
_ADVICE = "The file changed after it was saved. Load another checkpoint, or copy this one again from its source."


class ItemSource:
    """The files of one checkpoint folder; without a manifest (a stock checkpoint) there is nothing to verify with."""

    def __init__(self, folder: AnyPath, manifest: Manifest | None) -> None:
        self.folder = folder if manifest is None or manifest.folder is None else folder / manifest.folder
        self._files: Mapping[str, FileEntry] | None = None if manifest is None else manifest.files
        self._sizes: dict[str, int | None] = {}
        self._paths: dict[str, AnyPath] = {}
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
        data = self.part(name, 0, self.checked_size(name))
        if self._files is not None:
            self.compare(f"file {name}", self._files[name].hash, data)
        return data

    def part(self, name: str, offset: int, length: int) -> bytes:
        """Returns ``length`` bytes of the file ``name`` from ``offset``, not verified.

        Raises:
            CheckpointCorruptError: There are not so many.
        """
        with self._reading(name, offset, length):
            data = read_range(self._path(name), offset, length)
        if len(data) != length:
            self.reject(f"file {name}", f"{length} bytes from byte {offset}", f"{len(data)} bytes")
        return data

    def data(self, name: str, item: StoredItem, what: str) -> bytearray:
        """Returns all of the verified data of ``item`` in the file ``name``; ``what`` names it in errors.

        Raises:
            CheckpointCorruptError: It differs from what was saved, or is not there.
        """
        into = bytearray(item.data)
        self.read_into(name, item, 0, item.data, memoryview(into), what)
        return into

    def read_into(self, name: str, item: StoredItem, start: int, stop: int, into: memoryview, what: str) -> None:
        """Reads the data of ``item`` from byte ``start`` to ``stop`` into ``into``.

        What is read is verified: each block that ``start`` to ``stop`` reaches into. Blocks that lie within go straight
        to where they are wanted.

        Raises:
            CheckpointCorruptError: It differs from what was saved, or is not there.
        """
        self.checked_size(name)
        if self.is_remote:
            self._read_remote(name, item, start, stop, into, what)
        else:
            self._read_local(name, item, start, stop, into, what)

    def check(self, name: str, item: StoredItem, start: int, stop: int, data: memoryview, what: str) -> None:
        """Compares the data of ``item`` from byte ``start`` to ``stop``, read by another rank; blocks that lie within.

        Raises:
            CheckpointCorruptError: It differs from what was saved.
        """
        for number, first, end in blocks_of(item.data, start, stop):
            if start <= first and end <= stop:
                self._check(f"file {name}, {what}", item, number + 1, data[first - start : end - start])

    def verify_pages(self, name: str, read: Callable[[int], None]) -> None:
        """Reads the file ``name`` of the manifest and checks it; ``read`` is told of every so many bytes.

        Raises:
            CheckpointCorruptError: It is missing or differs.
        """
        size, entry = self.checked_size(name), self.entry(name)
        whole = xxhash.xxh3_128()
        for offset in range(0, size, _HASH_BYTES):
            part = self.part(name, offset, min(_HASH_BYTES, size - offset))
            whole.update(part)
            read(len(part))
        if whole.hexdigest() != entry.hash:
            self.reject(f"file {name}", f"xxh3-128 {entry.hash}", whole.hexdigest())

    def verify_items(self, name: str, items: Sequence[tuple[str, StoredItem]], read: Callable[[int], None]) -> None:
        """Reads all ``items`` of the file ``name``, each with its key, and checks them.

        Raises:
            CheckpointCorruptError: One is missing or differs; names the first that does.
        """
        size, position = self.checked_size(name), 0
        for key, item in items:
            if item.offset != position:
                self.reject(f"file {name}", f"an item at byte {position}", f"one at byte {item.offset}")
            self._verify_item(name, item, f"item {key!r}", read)
            position += item.length
        if position != size:
            self.reject(f"file {name}", f"{position} bytes", f"{size} bytes")
        found = hash_of_items(item.digests for _, item in items)
        if found != self.entry(name).hash:
            self.reject(f"file {name}", f"xxh3-128 {self.entry(name).hash} of its items' hashes", found)

    def _verify_item(self, name: str, item: StoredItem, what: str, read: Callable[[int], None]) -> None:
        blocks = [(item.head + start, item.head + end) for _, start, end in blocks_of(item.data)]
        parts = [(0, item.head), *blocks, (item.head + item.data, item.length)]
        for number, (start, stop) in enumerate(parts):
            data = self.part(name, item.offset + start, stop - start)
            self._check(f"file {name}, {what}", item, number, data)
            read(len(data))

    def _read_local(self, name: str, item: StoredItem, start: int, stop: int, into: memoryview, what: str) -> None:
        base = item.offset + item.head
        with self._reading(name, base + start, stop - start), _opened(self._path(name)) as file:
            for number, first, end in blocks_of(item.data, start, stop):
                whole = start <= first and end <= stop
                block = into[first - start : end - start] if whole else memoryview(bytearray(end - first))
                _read_fully(file, block, base + first)
                self._check(f"file {name}, {what}", item, number + 1, block)
                if not whole:
                    _copy_overlap(block, first, into, start, stop)

    def _read_remote(self, name: str, item: StoredItem, start: int, stop: int, into: memoryview, what: str) -> None:
        blocks = list(blocks_of(item.data, start, stop))
        if not blocks:
            return
        begin, finish = blocks[0][1], blocks[-1][2]
        data = memoryview(self.part(name, item.offset + item.head + begin, finish - begin))
        for number, first, end in blocks:
            block = data[first - begin : end - begin]
            self._check(f"file {name}, {what}", item, number + 1, block)
            _copy_overlap(block, first, into, start, stop)

    def _check(self, what: str, item: StoredItem, number: int, data: Any) -> None:
        """Compares one part of ``item``: its head, a block of its data, its tail, counted in this order."""
        expected = item.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        found = xxhash.xxh3_128_digest(data)
        if found != expected:
            self.reject(what, f"xxh3-128 {expected.hex()}", found.hex())

    def checked_size(self, name: str) -> int:
        """Bytes of the file ``name``, which are as many as the manifest says.

        Raises:
            CheckpointCorruptError: They are not, or there is no such file.
        """
        size = self._size(name)
        if size is None:
            self.reject(f"file {name}", "the file", "nothing")
        if self._files is not None and size != self.entry(name).bytes:
            self.reject(f"file {name}", f"{self.entry(name).bytes} bytes", f"{size} bytes")
        return size

    def _path(self, name: str) -> AnyPath:
        """Made once: an index is read by thousands of pages."""
        if name not in self._paths:
            self._paths[name] = self.folder / name
        return self._paths[name]

    def _size(self, name: str) -> int | None:
        """Asked for once: on a remote store it is a request."""
        with self._lock:
            if name not in self._sizes:
                self._sizes[name] = size_of(self._path(name))
            return self._sizes[name]

    def file_sizes(self) -> dict[str, int]:
        """Bytes of every file that the manifest names."""
        return {name: entry.bytes for name, entry in (self._files or {}).items()}

    def entry(self, name: str) -> FileEntry:
        """What the manifest says of the file ``name``."""
        assert self._files is not None
        if name not in self._files:
            self.reject(f"file {name}", "an entry in the manifest", "none")
        return self._files[name]

    @contextmanager
    def _reading(self, name: str, offset: int, length: int) -> Iterator[None]:
        wanted = f"{length} bytes from byte {offset}"
        try:
            yield
        except EOFError as error:
            self.reject(f"file {name}", wanted, str(error), error)
        except FileNotFoundError as error:
            self.reject(f"file {name}", wanted, "0 bytes", error)
        except OSError as error:
            # of a store, EIO is any answer that its client does not know, and says nothing about the file
            if self.is_remote or error.errno != errno.EIO:
                raise
            self.reject(f"file {name}", wanted, str(error), error)

    def compare(self, what: str, expected: str, data: bytes) -> None:
        """Raises the :class:`CheckpointCorruptError` that names ``what`` where ``data`` hashes to something else."""
        found = xxhash.xxh3_128_hexdigest(data)
        if found != expected:
            self.reject(what, f"xxh3-128 {expected}", found)

    def reject(self, what: str, expected: Any, found: Any, cause: BaseException | None = None) -> NoReturn:
        """Raises the :class:`CheckpointCorruptError` that says so."""
        raise CheckpointCorruptError(
            f"The checkpoint {self.folder} is damaged: {what}: expected {expected}, found {found}. {_ADVICE}"
        ) from cause


def _copy_overlap(block: memoryview, first: int, into: memoryview, start: int, stop: int) -> None:
    """Copies that part of ``block``, which begins at byte ``first``, that is among ``start`` to ``stop``."""
    begin, end = max(first, start), min(first + len(block), stop)
    into[begin - start : end - start] = block[begin - first : end - first]


@contextmanager
def _opened(path: AnyPath) -> Iterator[int]:
    assert isinstance(path, Path)
    file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        yield file
    finally:
        os.close(file)


def _read_fully(file: int, into: memoryview, offset: int) -> None:
    # one read may return less than asked for
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], offset + done)
        if count == 0:
            raise EOFError(f"{done} bytes")
        done += count
