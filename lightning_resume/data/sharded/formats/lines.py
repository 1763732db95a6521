"""Text files by line: JSON lines and plain text, also compressed."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any, final

from lightning_resume.data.sharded.blocks import (
    Chunk,
    Opened,
    Place,
    decompressed,
    decompressor_of,
    lines_between,
    open_file,
)
from lightning_resume.data.sharded.files import Files
from lightning_resume.data.sharded.formats.format import Format, Piece, Record, Window, cut

_SHOWN = 80


class Lines(Format):
    """Files of which every line is a record. Lines end with ``\\n`` or ``\\r\\n``; the last need not."""

    skips_blank = False

    def can_split(self, path: str) -> bool:
        return decompressor_of(path) is None

    def windows(self, files: Files, piece: Piece, place: Place, size: int) -> Iterator[Window]:
        if piece.start >= piece.stop:
            return
        with open_file(files, piece.path, piece.size) as opened:
            lines = _lines(_chunks(opened, piece, place))
            if self.skips_blank:
                lines = (line for line in lines if line.content and not line.content.isspace())
            yield from cut(lines, place, size)

    def _text(self, content: bytes, url: str, key: int) -> str:
        if key == 0:
            content = content.removeprefix(codecs.BOM_UTF8)
        try:
            return content.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise _unreadable(url, key, content, f"not UTF-8 ({error.reason})", "Convert the file.") from error


@final
class JsonLines(Lines):
    """A JSON value per line. Empty lines are passed over."""

    name = "jsonl"
    suffixes = tuple(f".{kind}{end}" for kind in ("jsonl", "json", "ndjson") for end in ("", ".gz", ".zst"))
    skips_blank = True

    def decode(self, content: bytes, url: str, key: int) -> Any:
        text = self._text(content, url, key)
        try:
            return json.loads(text)
        except ValueError as error:
            advice = "Correct the line; a file that is one JSON document has to be written as one value per line."
            raise _unreadable(url, key, content, f"not JSON ({error})", advice) from error


@final
class TextLines(Lines):
    """A string per line, without its end; empty lines are empty strings."""

    name = "text"
    suffixes = (".txt", ".text", ".txt.gz", ".txt.zst", ".text.gz", ".text.zst")

    def decode(self, content: bytes, url: str, key: int) -> str:
        return self._text(content, url, key)


def _chunks(opened: Opened, piece: Piece, place: Place) -> Iterator[Chunk]:
    make = decompressor_of(piece.path)
    if make is not None:
        return decompressed(opened, place, make)
    aligned = place != piece.begin or piece.start == 0
    return lines_between(opened, place.offset, piece.stop, aligned=aligned)


def _lines(chunks: Iterable[Chunk]) -> Iterator[Record]:
    """Splits chunks into lines; one that a chunk leaves open goes on in the next."""
    open_parts: list[bytes] = []
    open_key = end = None
    for entry, offset, data in chunks:
        *lines, rest = data.split(b"\n")
        base = entry << 48
        for line in lines:
            key, content = base | offset, line
            offset += len(line) + 1
            if open_key is not None:
                content, key = b"".join([*open_parts, line]), open_key
                open_parts, open_key = [], None
            yield Record(key, content, len(content), Place(entry, offset))
        if rest:
            open_key = base | offset if open_key is None else open_key
            open_parts.append(rest)
        end = Place(entry, offset + len(rest))
    if open_key is not None:
        assert end is not None
        content = b"".join(open_parts)
        yield Record(open_key, content, len(content), end)


def _unreadable(url: str, key: int, content: bytes, what: str, advice: str) -> ValueError:
    entry, offset = key >> 48, key & ((1 << 48) - 1)
    where = f"byte {offset}" + (f" of what is compressed from byte {entry} on" if entry else "")
    shown = content[:_SHOWN] + (b"..." if len(content) > _SHOWN else b"")
    return ValueError(f"{url}: the line that begins at {where} is {what}: {shown!r}. {advice}")
