"""One list of the files for all ranks: an object store may list a new file to one of them, and not yet to another."""

from __future__ import annotations

import base64
import dataclasses
import json
import posixpath
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import fsspec

from lightning_resume import _distributed
from lightning_resume.data.handshake import agreed
from lightning_resume.data.sharded.files import Files, Shard, difference
from lightning_resume.errors import OutOfStepError

T = TypeVar("T")

_PIECE = 2**22
"""Characters that are sent at a time: torch's store takes 8 MiB."""
_CALL = "the listing of a ShardedDataset's files"


def of_all_ranks(make: Callable[[], Files]) -> Files:
    """The files that rank 0 lists, on every rank. A collective, through the store of the process group.

    Raises:
        OutOfStepError: Some rank cannot find a file of rank 0's, or finds it to be of another size.
        RemoteError: Another rank could not list its files; the rank that could not raises its own error.
    """
    mine, error = _attempt(make)
    text = None if error is None else f"{type(error).__name__}: {error}"
    told = agreed(_CALL, {}, {"fingerprint": mine and mine.fingerprint, "error": text})
    failed = [f"rank {rank}: {one['error']}" for rank, one in enumerate(told) if one["error"]]
    if error is not None:
        raise error
    if failed:
        raise _distributed.RemoteError(f"{_CALL} failed on {'; '.join(failed)}")
    assert mine is not None
    if len({one["fingerprint"] for one in told}) == 1:
        return mine
    return _of_rank_0(mine)


def _attempt(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:  # any: the others wait for this rank
        return None, error


def _of_rank_0(mine: Files) -> Files:
    packed = _pack(mine.shards) if _distributed.rank() == 0 else ""
    pieces = range(0, agreed(_CALL, {}, len(packed))[0], _PIECE)
    text = "".join(agreed(_CALL, {}, packed[start : start + _PIECE])[0] for start in pieces)
    files = dataclasses.replace(mine, shards=_unpack(text))
    wrong, error = _attempt(lambda: _wrong(files, mine))
    told = agreed(_CALL, {}, wrong if error is None else f"{type(error).__name__}: {error}")
    found = [f"  rank {rank}: {one}\n" for rank, one in enumerate(told) if one]
    if found:
        raise OutOfStepError(
            f"The ranks see other files than rank 0, which lists {len(files.shards)} below {files.root}:\n"
            f"{''.join(found)}Give all ranks the same path, and write no files while the run starts."
        )
    return files


def _wrong(files: Files, mine: Files) -> str:
    """What keeps this rank from reading ``files``, of which it has listed some."""
    changed = difference(files.shards, mine.shards)
    sizes = {shard.path: shard.size for shard in files.shards}
    filesystem, _ = fsspec.url_to_fs(files.given, **files.storage_options)
    # asked for by name, an object store answers for files that it does not list yet
    bad = [*changed.resized, *(path for path in changed.removed if _size(filesystem, files, path) != sizes[path])]
    return (
        f"{len(bad)} missing or of another size ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''})" if bad else ""
    )


def _size(filesystem: Any, files: Files, path: str) -> int | None:
    try:
        return int(filesystem.info(posixpath.join(files.root, path))["size"])
    except FileNotFoundError:
        return None


def _pack(shards: Sequence[Shard]) -> str:
    content = json.dumps([[shard.path, shard.size] for shard in shards], separators=(",", ":"))
    return base64.b64encode(zlib.compress(content.encode())).decode()


def _unpack(text: str) -> tuple[Shard, ...]:
    content = json.loads(zlib.decompress(base64.b64decode(text)))
    return tuple(Shard(path=path, size=size) for path, size in content)
