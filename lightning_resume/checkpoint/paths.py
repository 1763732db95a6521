"""One way to look at files on local disk and on remote stores; a local path is a plain :class:`pathlib.Path`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import available_protocols
from fsspec.utils import get_protocol

from lightning_resume.checkpoint.remote import RemotePath

AnyPath: TypeAlias = Path | RemotePath
PathLike: TypeAlias = str | os.PathLike[str] | RemotePath

_LOCAL_PROTOCOLS = ("file", "local")
_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(?=[^/])")


def as_path(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> AnyPath:
    """Returns an absolute local path (a trailing slash and ``file://`` are taken off), or the remote path of a URL.

    Raises:
        ValueError: The URL's protocol is not one that fsspec knows.
        MissingPackageError: The package for it is not installed.
    """
    if isinstance(path, RemotePath):
        return path
    text = _as_url(os.fspath(path))
    protocol = get_protocol(text)
    if protocol in _LOCAL_PROTOCOLS:
        return Path(os.path.abspath(LocalFileSystem._strip_protocol(text)))
    remote = RemotePath(text if text.endswith("://") else text.rstrip("/"), dict(storage_options or {}))
    _ = remote.fs  # what is wrong with it is best said now
    return remote


def list_names(folder: AnyPath) -> list[str]:
    """The names in ``folder``, sorted; none where there is no folder."""
    if isinstance(folder, RemotePath):
        return folder.names()
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def size_of(file: AnyPath) -> int | None:
    """Bytes of the file, None where there is none."""
    if isinstance(file, RemotePath):
        return file.size()
    return file.stat().st_size if file.is_file() else None


def read_bytes(file: AnyPath) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: There is none.
    """
    return file.read() if isinstance(file, RemotePath) else file.read_bytes()


def read_range(file: AnyPath, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset``, or fewer where the file ends."""
    if isinstance(file, RemotePath):
        return file.read(offset, length)
    with open(file, "rb", buffering=0) as opened:
        opened.seek(offset)
        return _read_fully(opened.fileno(), length)


def exists(path: AnyPath) -> bool:
    """Whether anything lies there, be it a link that leads nowhere."""
    return path.exists() if isinstance(path, RemotePath) else os.path.lexists(path)


def _as_url(text: str) -> str:
    # pathlib makes "s3:/bucket" of "s3://bucket", which would name a local folder "s3:"
    match = _COLLAPSED.match(text)
    return f"{match[1]}://{text[match.end() :]}" if match and match[1] in available_protocols() else text


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
