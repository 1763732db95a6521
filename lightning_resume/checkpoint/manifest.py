"""The manifest: a checkpoint's table of contents, and the proof that it is whole."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import xxhash

from lightning_resume.checkpoint.names import MANIFEST_NAME, is_replacing_name, resolve
from lightning_resume.checkpoint.paths import PathLike, as_path, read_bytes, size_of
from lightning_resume.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    CheckpointVersionError,
)

T = TypeVar("T")

FORMAT_VERSION = 1
Item: TypeAlias = tuple[int, int, str]
"""Offset in its file (bytes), length (bytes) and xxh3-128 (hex) of one stored item."""

_MAX_BYTES = 2**30
_MAX_INTEGER = 2**63 - 1
_MAX_REAL = 2**1023  # of whole numbers; float() of a larger one fails
_HASH = re.compile(r"[0-9a-f]{32}")
# what a manifest of version 1 may leave out
_LATER_FIELDS: Mapping[str, Any] = {"folder": None, "metrics": {}, "weights_hash": None, "nonfinite": []}


@dataclass(frozen=True, kw_only=True)
class ComponentEntry:
    """One component of the checkpoint: how it is shared, which ranks gave it, its size in bytes and its hash."""

    sharing: str
    ranks: tuple[int, ...]
    bytes: int
    hash: str | None
    required: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file: its size in bytes, the xxh3-128 (hex) of the whole of it, and of every item stored in it."""

    bytes: int
    hash: str
    items: tuple[Item, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint's table of contents; ``docs/format.md`` explains every field."""

    format_version: int = FORMAT_VERSION
    step: int | None
    epoch: int | None
    created: str
    sequence: int
    topology: Mapping[str, Any]
    versions: Mapping[str, str]
    components: Mapping[str, ComponentEntry]
    files: Mapping[str, FileEntry]
    save_seconds: float
    save_bytes_per_second: float
    metadata: Mapping[str, Any]
    folder: str | None = None
    """The folder within the checkpoint that holds its files, None where they lie beside the manifest."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    weights_hash: str | None = None
    """Of all trainable tensors, None where they are not known."""
    nonfinite: tuple[str, ...] = ()
    """The tensors that hold not-a-number or infinity, at most 20 of them by name."""


def read_manifest(path: PathLike) -> Manifest:
    """Reads and checks the manifest of the checkpoint folder ``path``.

    Raises:
        CheckpointNotFoundError: There is no such folder.
        CheckpointIncompleteError: The folder has no manifest.
        CheckpointVersionError: The manifest is of a newer format.
        CheckpointCorruptError: The manifest is not what was written; names the field.
        OSError: It could not be read.
    """
    folder = resolve(as_path(path))
    if isinstance(folder, Path) and not folder.is_dir():
        raise CheckpointNotFoundError(f"There is no checkpoint folder at {path}.")
    file = folder / MANIFEST_NAME
    size = size_of(file)
    if size is None:
        raise CheckpointIncompleteError(f"{folder} has no {MANIFEST_NAME}: the save that wrote it did not finish.")
    if size > _MAX_BYTES:
        raise _corrupt(str(file), "size", f"at most {_MAX_BYTES} bytes", f"{size} bytes")
    return from_json(read_bytes(file), source=str(file))


def to_json(manifest: Manifest) -> str:
    """Returns the text of ``manifest.json``, with a checksum over everything else in it.

    Raises:
        TypeError: The topology or the user's metadata holds something that JSON cannot.
    """
    body = {field.name: getattr(manifest, field.name) for field in fields(manifest)}
    body["components"] = {name: vars(entry) for name, entry in manifest.components.items()}
    body["files"] = {name: vars(entry) for name, entry in manifest.files.items()}
    body = json.loads(json.dumps(body))  # keys as they will be read: 9 and 10 sort otherwise than "9" and "10"
    return json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n"


def checked_json(manifest: Manifest) -> str:
    """Returns :func:`to_json` of ``manifest`` once it is found to be what a load accepts.

    Raises:
        CheckpointSaveError: A field is out of its bounds; names it.
        TypeError: The topology or the user's metadata holds something that JSON cannot.
    """
    text = to_json(manifest)
    try:
        from_json(text)
    except CheckpointCorruptError as error:
        raise CheckpointSaveError(f"What save was given is no valid manifest: {error}") from error
    return text


def from_json(text: str | bytes, *, source: str = MANIFEST_NAME) -> Manifest:
    """Returns the manifest in ``text``, every field checked; ``source`` names the file in errors.

    Raises:
        CheckpointVersionError: The manifest is of a newer format.
        CheckpointCorruptError: The manifest is not what was written; names the field.
    """
    body = _parse(text, source)
    version = body.integer("format_version")
    if version > FORMAT_VERSION:
        raise CheckpointVersionError(
            f"{source} is in format version {version}; this version of lightning-resume reads up to version "
            f"{FORMAT_VERSION}. Upgrade: pip install --upgrade lightning-resume."
        )
    _check_checksum(body)
    body = _Fields(source, "", {**_LATER_FIELDS, **body.body})
    return Manifest(
        format_version=version,
        step=body.optional("step", body.integer),
        epoch=body.optional("epoch", body.integer),
        created=body.time("created"),
        sequence=body.integer("sequence"),
        topology=body.mapping("topology"),
        versions={name: body.inner("versions").text(name) for name in body.mapping("versions")},
        components={name: _component(entry) for name, entry in body.entries("components")},
        files={_file_name(name, source): _file(entry) for name, entry in body.entries("files")},
        save_seconds=body.number("save_seconds"),
        save_bytes_per_second=body.number("save_bytes_per_second"),
        metadata=body.mapping("metadata"),
        folder=_folder(body),
        metrics={name: float(body.inner("metrics").real(name)) for name in body.mapping("metrics")},
        weights_hash=body.optional("weights_hash", body.hash),
        nonfinite=tuple(body.texts("nonfinite")),
    )


def is_plain_name(name: object) -> bool:
    """Says whether ``name`` names a file directly in a folder, on any system, and can not lead out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\:\0]", name)


def _parse(text: str | bytes, source: str) -> _Fields:
    try:
        body = json.loads(text if isinstance(text, str) else str(text, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{source} is damaged: not JSON: {error}. Load another checkpoint.") from error
    if not isinstance(body, dict):
        raise _corrupt(source, "the whole", "a JSON object", type(body).__name__)
    return _Fields(source, "", body)


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def _check_checksum(body: _Fields) -> None:
    expected = body.hash("checksum")
    found = _checksum({name: value for name, value in body.body.items() if name != "checksum"})
    if found != expected:
        raise _corrupt(body.source, "checksum", expected, found)


def _component(entry: _Fields) -> ComponentEntry:
    return ComponentEntry(
        sharing=entry.text("sharing"),
        ranks=tuple(entry.whole(f"ranks[{i}]", rank) for i, rank in enumerate(entry.sequence("ranks"))),
        bytes=entry.integer("bytes"),
        hash=entry.optional("hash", entry.text),
        required=entry.boolean("required"),
    )


def _file(entry: _Fields) -> FileEntry:
    size = entry.integer("bytes")
    items = tuple(_item(entry, f"items[{i}]", item, size) for i, item in enumerate(entry.sequence("items")))
    ends = [offset + length for offset, length, _ in items]
    if items and [offset for offset, _, _ in items] + [size] != [0, *ends]:
        raise entry.wrong("items", f"items that fill the file's {size} bytes without gaps", "others")
    return FileEntry(bytes=size, hash=entry.hash("hash"), items=items)


def _item(entry: _Fields, where: str, item: object, size: int) -> Item:
    if not isinstance(item, list) or len(item) != 3:
        raise entry.wrong(where, "[offset, length, hash]", item)
    offset, length, digest = entry.whole(where, item[0]), entry.whole(where, item[1]), item[2]
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise entry.wrong(where, "32 hexadecimal digits", digest)
    if offset + length > size:
        raise entry.wrong(where, f"an item within the file's {size} bytes", item)
    return offset, length, digest


def _folder(body: _Fields) -> str | None:
    name = body.optional("folder", body.text)
    if name is not None and not is_replacing_name(name):
        raise body.wrong("folder", "'save-' and 16 hexadecimal digits", name)
    return name


def _file_name(name: str, source: str) -> str:
    if not is_plain_name(name):
        raise _corrupt(source, "files", "names of files in the checkpoint's own folder", repr(name))
    return name


def _corrupt(source: str, field: str, expected: object, found: object) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{source} is damaged: field {field}: expected {expected}, found {str(found)[:200]}. Load another checkpoint."
    )


@dataclass(frozen=True)
class _Fields:
    """One JSON object of the manifest, whose fields are read by type; a wrong one is named in the error."""

    source: str
    where: str
    body: dict[str, Any]

    def wrong(self, name: str, expected: str, found: object) -> CheckpointCorruptError:
        return _corrupt(self.source, self.where + name, expected, repr(found))

    def take(self, name: str) -> Any:
        if name not in self.body:
            raise self.wrong(name, "a value", "nothing")
        return self.body[name]

    def optional(self, name: str, read: Callable[[str], T]) -> T | None:
        return None if self.take(name) is None else read(name)

    def typed(self, name: str, kind: type[T], expected: str) -> T:
        value = self.take(name)
        if not isinstance(value, kind):
            raise self.wrong(name, expected, value)
        return value

    def whole(self, name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_INTEGER:
            raise self.wrong(name, "a whole number from 0", value)
        return value

    def integer(self, name: str) -> int:
        return self.whole(name, self.take(name))

    def number(self, name: str) -> float:
        value = self.real(name)
        if not 0 <= value < math.inf:
            raise self.wrong(name, "a finite number from 0", value)
        return value

    def real(self, name: str) -> float:
        value = self.take(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or (isinstance(value, int) and abs(value) > _MAX_REAL)
        ):
            raise self.wrong(name, "a number", value)
        return float(value)

    def texts(self, name: str) -> list[str]:
        values = self.sequence(name)
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(name, "a list of texts", values)
        return values

    def text(self, name: str) -> str:
        return self.typed(name, str, "a text")

    def time(self, name: str) -> str:
        value = self.text(name)
        try:
            aware = datetime.fromisoformat(value).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            raise self.wrong(name, "a time in ISO 8601 with its offset", value)
        return value

    def boolean(self, name: str) -> bool:
        return self.typed(name, bool, "true or false")

    def sequence(self, name: str) -> list[Any]:
        return self.typed(name, list, "a list")

    def mapping(self, name: str) -> dict[str, Any]:
        return self.typed(name, dict, "an object")

    def hash(self, name: str) -> str:
        value = self.text(name)
        if not _HASH.fullmatch(value):
            raise self.wrong(name, "32 hexadecimal digits", value)
        return value

    def inner(self, name: str) -> _Fields:
        return _Fields(self.source, f"{self.where}{name}.", self.mapping(name))

    def entries(self, name: str) -> list[tuple[str, _Fields]]:
        outer = self.inner(name)
        return [(key, outer.inner(key)) for key in outer.body]
