"""Tar files as WebDataset has them: consecutive files that share a name up to its first dot are one sample."""

from __future__ import annotations

import bisect
import re
import tarfile
from collections.abc import Iterator
from typing import Any, final

from lightning_resume.data.sharded.blocks import Chunk, Opened, Place, decompressed, decompressor_of, open_file, plain
from lightning_resume.data.sharded.files import Files
from lightning_resume.data.sharded.formats.format import Format, Piece, Record, Window, cut

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


@final
class Tar(Format):
    """Samples are dicts: the name's first part under ``"__key__"``, and for each file its content under what follows.

    ``0001.jpg`` and ``0001.cls`` become ``{"__key__": "0001", "jpg": b"...", "cls": b"..."}``. Folders, links and names
    without a dot are passed over.
    """

    name = "tar"
    suffixes = (".tar", ".tar.gz", ".tgz", ".tar.zst")

    def windows(self, files: Files, piece: Piece, place: Place, size: int) -> Iterator[Window]:
        if not piece.size:
            return
        with open_file(files, piece.path, piece.size) as opened:
            yield from cut(_samples(opened, piece, place), place, size)

    def decode(self, content: Any, url: str, key: int) -> dict[str, Any]:
        return dict(content)


def _samples(opened: Opened, piece: Piece, place: Place) -> Iterator[Record]:
    make = decompressor_of(piece.path)
    content = _Content(plain(opened, place) if make is None else decompressed(opened, place, make))
    sample: dict[str, Any] = {}
    begin, weight = place, 0
    for at, name, data in _files(content, opened.url, place):
        matched = _NAME.fullmatch(name)
        if matched is None:
            continue
        key, kind = matched[1], matched[2].lower()
        if sample and sample["__key__"] != key:
            here = content.place_of(at)
            yield Record(begin.key, sample, weight, here)
            sample, begin, weight = {}, here, 0
        if not sample:
            sample, begin = {"__key__": key}, content.place_of(at)
        if kind in sample:
            raise ValueError(
                f"{opened.url} holds {name!r} twice, one after the other: a sample has one file of a kind. Rename one."
            )
        sample[kind] = data
        weight += len(data)
    if sample:
        yield Record(begin.key, sample, weight, content.place_of(content.position))


def _files(content: _Content, url: str, place: Place) -> Iterator[tuple[int, str, bytes]]:
    """The regular files from here on: where each begins, with the headers that belong to it, its name and content."""
    try:
        with tarfile.open(fileobj=content, mode="r|", tarinfo=_Member, errorlevel=2) as archive:  # type: ignore[call-overload]
            for member in archive:
                archive.members = []  # it would keep all it has seen
                if member.isreg():
                    file = archive.extractfile(member)
                    assert file is not None
                    yield member.offset, member.name, file.read()
    except tarfile.TarError as error:
        near = f"{content.position} bytes after byte {place.offset} of its content"
        raise ValueError(f"{url} is damaged, or ends too early, before {near}: {error}. Write it again.") from error


class _Member(tarfile.TarInfo):
    """Raises where tarfile would take a damaged header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


class _Content:
    """Chunks as a file that is read from its start to its end; remembers which place each byte had."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")
        self._received = self.position = 0
        self._entries: list[tuple[int, int, int]] = []
        """Position at which content of an entry begins, the entry, and the offset within it."""

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0 and self._fill():
            part, self._rest = self._rest[:size], self._rest[size:]
            parts.append(part)
            size -= len(part)
            self.position += len(part)
        return b"".join(parts)

    def _fill(self) -> bool:
        if len(self._rest):
            return True
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        if not self._entries or self._entries[-1][1] != chunk.entry:
            self._entries.append((self._received, chunk.entry, chunk.offset))
        self._received += len(chunk.data)
        self._rest = memoryview(chunk.data)
        return True

    def place_of(self, position: int) -> Place:
        """The place of the byte at ``position`` after where reading began."""
        first, entry, offset = self._entries[bisect.bisect(self._entries, position, key=lambda known: known[0]) - 1]
        return Place(entry, offset + position - first)
