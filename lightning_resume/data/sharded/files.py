"""The files of a sharded dataset: which there are, on any filesystem that fsspec knows, and what changed among them."""

from __future__ import annotations

import collections
import dataclasses
import glob
import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import fsspec
import xxhash
from fsspec.core import has_magic

from lightning_resume import _fork
from lightning_resume.errors import MissingPackageError

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_fork.keep_filesystems()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file: its path, relative to the folder that all files lie in, and its size in bytes."""

    path: str
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """The files of one dataset, in order.

    Opened through a filesystem that each process makes for itself: connections do not survive a fork.
    """

    given: str
    """One of the paths as they were given: it names the filesystem, and its host."""
    root: str
    """The folder that all lie in, as the filesystem calls it."""
    shards: tuple[Shard, ...]
    storage_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def open(self, index: int, **options: Any) -> Any:
        """The file, open for reading bytes; ``options`` go to the filesystem's ``open``."""
        filesystem, _ = fsspec.url_to_fs(self.given, **self.storage_options)
        return filesystem.open(posixpath.join(self.root, self.shards[index].path), "rb", **options)

    def url(self, index: int) -> str:
        """What to call the file in a message."""
        return posixpath.join(self.root, self.shards[index].path)

    @property
    def fingerprint(self) -> str:
        """Changes with any path or size, and with the order of the files."""
        return fingerprint(self.shards)


def fingerprint(shards: Iterable[Shard]) -> str:
    text = "\n".join(f"{shard.path}\t{shard.size}" for shard in shards)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _none_at(path: Any, suffixes: Sequence[str]) -> FileNotFoundError:
    return FileNotFoundError(f"There are no files{_ending(suffixes)} at {path!r}. Pass a folder, a glob, or a list.")


def list_files(path: Paths, *, suffixes: Sequence[str] = (), storage_options: Mapping[str, Any] | None = None) -> Files:
    """The files at ``path``: a folder (all below that end in one of ``suffixes``), a glob, a file, or a list of these.

    Those of a folder or glob come sorted by path, those of a list in its order. Names that begin with ``_`` or ``.``
    below a folder are left out, as ``_SUCCESS`` and ``.crc`` files are not data.

    Raises:
        FileNotFoundError: There are none.
        ValueError: They lie on different filesystems, or one is named twice.
        MissingPackageError: The package for the URL's protocol is not installed.
    """
    options = dict(storage_options or {})
    given = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    filesystems: dict[str, Any] = {}
    found: list[tuple[str, int]] = []
    bases: list[str] = []
    for one in given:
        filesystem, text = _filesystem(os.fspath(one), options)
        filesystems[filesystem.unstrip_protocol("")] = filesystem
        try:
            base, here = _found(filesystem, text, suffixes)
        except FileNotFoundError as error:
            raise _none_at(one, suffixes) from error
        bases, found = [*bases, base], found + here
    if not found:
        raise _none_at(path, suffixes)
    if len(filesystems) > 1:
        raise ValueError(f"{path!r} lies on several filesystems: {sorted(filesystems)}. Use one for a dataset.")
    [(most_common, times)] = collections.Counter(name for name, _ in found).most_common(1)
    if times > 1:
        raise ValueError(f"{most_common} is named {times} times in {path!r}: its samples would come more than once.")
    filesystem = next(iter(filesystems.values()))
    # not what the files have in common: that would change with a file that comes later
    root = posixpath.commonpath(bases)
    shards = tuple(Shard(path=posixpath.relpath(name, root or "."), size=size) for name, size in found)
    return Files(given=os.fspath(given[0]), root=root, shards=shards, storage_options=options)


def _filesystem(path: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    try:
        filesystem, text = fsspec.url_to_fs(path, **options)
    except ImportError as error:
        raise MissingPackageError(f"{path}: {error}. Install the package that it names.") from error
    filesystem.invalidate_cache()  # files may have come since it was last looked at
    return filesystem, text


def _found(filesystem: Any, path: str, suffixes: Sequence[str]) -> tuple[str, list[tuple[str, int]]]:
    """The folder that all files at ``path`` will always lie in, and these files."""
    base = posixpath.dirname(path)
    if has_magic(path) and not filesystem.exists(path):  # a name may hold brackets
        while has_magic(base) and not filesystem.exists(base):
            base = posixpath.dirname(base)
        entries = filesystem.glob(glob.escape(base) + path[len(base) :], detail=True)
    elif filesystem.isdir(path):
        base = path
        entries = filesystem.find(path, detail=True)
        entries = {name: info for name, info in entries.items() if _is_data(posixpath.relpath(name, path), suffixes)}
    else:
        entries = {path: filesystem.info(path)}
    return base, sorted((name, int(info["size"])) for name, info in entries.items() if info["type"] == "file")


def _is_data(name: str, suffixes: Sequence[str]) -> bool:
    hidden = any(part.startswith(("_", ".")) for part in name.split("/"))
    return not hidden and (not suffixes or name.lower().endswith(tuple(suffixes)))


def _ending(suffixes: Sequence[str]) -> str:
    return f" that end in {' or '.join(suffixes)}" if suffixes else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """What differs between the files that were saved and those that are there."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    resized: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.resized)

    @property
    def only_added(self) -> bool:
        return bool(self.added) and not (self.removed or self.resized)

    def __str__(self) -> str:
        return "; ".join(
            f"{len(paths)} {what} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
            for what, paths in (("added", self.added), ("removed", self.removed), ("resized", self.resized))
            if paths
        )


def difference(saved: Sequence[Shard], current: Sequence[Shard]) -> Difference:
    """What became of the files since ``saved``; their order does not matter. Pure."""
    before, now = {s.path: s.size for s in saved}, {s.path: s.size for s in current}
    return Difference(
        added=tuple(path for path in now if path not in before),
        removed=tuple(path for path in before if path not in now),
        resized=tuple(path for path, size in before.items() if now.get(path, size) != size),
    )
