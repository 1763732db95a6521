"""The content of one file as a sequence of chunks, from any place that it can be entered at.

A place is a pair of integers: the byte of the file at which decompression can begin (0 where nothing is compressed; the
start of a gzip member or zstd frame), and the number of bytes of content after it.
"""

from __future__ import annotations

import dataclasses
import posixpath
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fsspec

from lightning_resume.data.sharded.files import Files
from lightning_resume.errors import MissingPackageError

FIRST_BLOCK, LARGEST_BLOCK = 1 << 17, 1 << 22
"""Sizes of the first read and of the largest: little is read in excess, and a store is not asked too often."""
_LARGEST_CHUNK = 1 << 22
_LINE_END_BLOCK = 1 << 13
_FED_AT_ONCE = 1 << 16


class Place(NamedTuple):
    """A point in the content of a file."""

    entry: int
    """Byte of the file at which decompression begins."""
    offset: int
    """Bytes of content after that."""

    @property
    def key(self) -> int:
        """One integer for the place: what a record that begins there is known by."""
        return (self.entry << 48) | self.offset


class Chunk(NamedTuple):
    """Content from a place on, all of it after the same entry."""

    entry: int
    offset: int
    data: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """One file to read ranges of. Use it in a ``with`` statement: it may hold a descriptor."""

    url: str
    read: Callable[[int, int], bytes]
    """Bytes ``[start, stop)``; fewer at the end of the file."""
    file: Any
    size: int

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def open_file(files: Files, path: str, size: int) -> Opened:
    """Opens a file by its path within ``files``. Of a store nothing is asked before the first read."""
    filesystem, _ = fsspec.url_to_fs(files.given, **files.storage_options)
    url = posixpath.join(files.root, path)
    if filesystem.async_impl:  # a range is one request, and an open would be another
        return Opened(
            url=url, read=lambda start, stop: filesystem.cat_file(url, start=start, end=stop), file=None, size=size
        )
    file = filesystem.open(url, "rb", cache_type="none")

    def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)  # type: ignore[no-any-return]

    return Opened(url=url, read=read, file=file, size=size)


def blocks(opened: Opened, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Bytes ``[start, stop)`` of the file as it is, in blocks of growing size, each with where it begins."""
    size = FIRST_BLOCK
    while start < stop:
        data = opened.read(start, min(stop, start + size))
        if not data:
            raise ValueError(f"{opened.url} ends at byte {start}, but was listed with {opened.size}: it was changed.")
        yield start, data
        start += len(data)
        size = min(2 * size, LARGEST_BLOCK)


def plain(opened: Opened, place: Place) -> Iterator[Chunk]:
    """The content of a file that is not compressed."""
    for offset, data in blocks(opened, place.offset, opened.size):
        yield Chunk(0, offset, data)


def lines_between(opened: Opened, start: int, stop: int, *, aligned: bool) -> Iterator[Chunk]:
    """The lines that begin in bytes ``[start, stop)``; ``aligned`` says that one begins at ``start``."""
    if not aligned:
        start = _next_line(opened, start)
    last = b"\n"
    for offset, data in blocks(opened, start, stop):
        yield Chunk(0, offset, data)
        last = data[-1:]
    while last != b"\n" and stop < opened.size:
        data = opened.read(stop, min(opened.size, stop + _LINE_END_BLOCK))
        end = data.find(b"\n") + 1 or len(data)
        if not data:
            return
        yield Chunk(0, stop, data[:end])
        last, stop = data[end - 1 : end], stop + end


def _next_line(opened: Opened, start: int) -> int:
    """Where the first line that begins at ``start`` or later begins."""
    at = start - 1  # the byte before tells whether one begins at `start` itself
    while at < opened.size:
        data = opened.read(at, min(opened.size, at + _LINE_END_BLOCK))
        found = data.find(b"\n")
        if found >= 0 or not data:
            return at + found + 1 if data else opened.size
        at += len(data)
    return opened.size


def decompressed(opened: Opened, place: Place, make: Callable[[], Any]) -> Iterator[Chunk]:
    """The content of a compressed file: what lies between the place's entry and the place is decompressed and left out.

    Args:
        opened: The file.
        place: Where the content is to begin.
        make: Makes what decompresses one member or frame, in the manner of ``zlib.decompressobj``.

    Raises:
        ValueError: The file is damaged or ends too early.
    """
    entry, offset, skip = place.entry, 0, place.offset
    machine = make()
    fed = False
    for start, block in blocks(opened, entry, opened.size):
        rest, at = block, start
        while rest:
            if machine is None:
                machine, entry, offset, fed = make(), at, 0, False
            if entry > place.entry and not fed and not rest.strip(b"\0"):
                break  # a gzip file may be padded with zeros
            piece, rest = rest[:_FED_AT_ONCE], rest[_FED_AT_ONCE:]
            fed = True
            try:
                content = machine.decompress(piece)
            except Exception as error:  # zlib.error, ZstdError
                raise ValueError(f"{opened.url} is damaged near byte {at}: {error}. Write it again.") from error
            if skip < len(content):
                yield Chunk(entry, offset + skip, content[skip:])
            offset += len(content)
            skip = max(0, skip - len(content))
            at += len(piece)
            if machine.eof:
                at -= len(machine.unused_data)
                rest = machine.unused_data + rest
                machine = None
    if machine is not None and fed:
        raise ValueError(f"{opened.url} ends in the middle of its content: it was not written to its end.")


def gzip_member() -> Any:
    """Decompresses one member of a ``.gz`` file."""
    return zlib.decompressobj(wbits=31)


def zstd_frame() -> Any:
    """Decompresses one frame of a ``.zst`` file."""
    try:
        import zstandard
    except ImportError as error:
        raise MissingPackageError(
            ".zst files need zstandard: `pip install 'lightning-resume[data]'`, or `pip install zstandard`."
        ) from error
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


COMPRESSED: dict[str, Callable[[], Any]] = {".gz": gzip_member, ".tgz": gzip_member, ".zst": zstd_frame}
"""By the end of the file's name."""


def decompressor_of(path: str) -> Callable[[], Any] | None:
    return next((make for suffix, make in COMPRESSED.items() if path.lower().endswith(suffix)), None)
