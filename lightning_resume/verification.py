"""Checks a whole checkpoint against its hashes."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from lightning_resume.checkpoint.names import BESIDE_SHARDS, is_data_name
from lightning_resume.checkpoint.paths import PathLike, as_path, list_names
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.errors import CheckpointCorruptError, CheckpointIncompleteError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What was verified: how many files, their bytes, and how long it took (seconds)."""

    files: int
    bytes: int
    seconds: float


def verify(
    checkpoint: PathLike, *, progress: bool | None = None, storage_options: Mapping[str, Any] | None = None
) -> Verification:
    """Reads all of a checkpoint folder of ours, several files at once, and compares it with its hashes.

    Needs no process group and calls no collective. Nothing of it is unpickled.

    Args:
        checkpoint: The checkpoint folder, a path or any fsspec URL.
        progress: Whether to show a progress bar on stderr; by default where that is a terminal.
        storage_options: Arguments of the fsspec filesystem.

    Raises:
        CheckpointCorruptError: A file is damaged, truncated, missing, swapped, or foreign; names it, the item in it,
            what was expected and what was found.
        CheckpointIncompleteError: It has no manifest: the save did not finish, or stock PyTorch wrote it, without
            hashes.
        CheckpointNotFoundError: There is no checkpoint folder.
    """
    started = time.perf_counter()
    reader = CheckpointReader(as_path(checkpoint, storage_options))
    if reader.manifest is None:
        raise CheckpointIncompleteError(
            f"{reader.path} was not saved by lightning-resume, so there are no hashes to verify it with."
        )
    _check_no_foreign(reader)
    total = sum(reader.file_bytes.values())
    hidden = not sys.stderr.isatty() if progress is None else not progress
    one_at_a_time = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, desc=reader.path.name, disable=hidden) as bar:

        def read(count: int) -> None:
            with one_at_a_time:
                bar.update(count)

        reader.verify(read=read)
    return Verification(files=len(reader.file_bytes) + 1, bytes=total, seconds=time.perf_counter() - started)


def _check_no_foreign(reader: CheckpointReader) -> None:
    """A shard that the manifest does not know is another save's, and stock readers do not ask whose."""
    assert reader.manifest is not None
    names = list_names(reader.folder)
    ours = {name for name in names if is_data_name(name) or name in BESIDE_SHARDS}
    foreign = sorted(ours - reader.manifest.files.keys())
    if foreign:
        raise CheckpointCorruptError(
            f"The checkpoint {reader.path} is damaged: file {foreign[0]}: expected no file of this name, found"
            " one. Remove it, or copy the checkpoint again from its source."
        )
