"""The commit: what is staged beside a path takes its place at once, so that the path always holds the old or the new.

Every function here acts on one process; across ranks, rank 0 calls them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lightning_resume.checkpoint.filesystem import (
    HashedFile,
    discard,
    exchange,
    local_path,
    make_folder,
    remove,
    sync_folder,
)
from lightning_resume.checkpoint.layout import leftovers
from lightning_resume.checkpoint.manifest import FileEntry, Manifest, to_json
from lightning_resume.checkpoint.names import MANIFEST_NAME, resolve, retired_path, staged_path


def stage(target: Path) -> Path:
    """Makes and returns an empty folder beside ``target``, to be filled and then published as ``target``."""
    make_folder(target.parent)
    staged = staged_path(target)
    staged.mkdir()
    return staged


def seal(staged: Path, manifest: Manifest) -> FileEntry:
    """Writes the manifest, the last file of a checkpoint, and makes the folder durable."""
    # every other name must be durable before the one that vouches for them
    sync_folder(staged)
    with HashedFile(staged / MANIFEST_NAME) as file:
        file.write(to_json(manifest).encode())
    sync_folder(staged)
    return file.entry()


def publish(staged: Path, target: Path) -> None:
    """Gives the folder or file ``staged`` the name ``target``, durably, in place of what is there.

    At every instant ``target``, or its retired name (:func:`~lightning_resume.checkpoint.layout.resolve` finds it),
    holds the old or the new one, whole. When this raises, the old one is in its place.
    """
    if os.path.lexists(target) and (_is_folder(staged) or _is_folder(target)):
        discard(_swap(staged, target))
    else:
        os.rename(staged, target)
        sync_folder(target.parent)


def commit_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Writes the single file ``path`` by ``write(file)``, durably and at once, in place of a file or folder there.

    Raises:
        OSError: It could not be written; what was at ``path`` is untouched.
    """
    target = local_path(path)
    make_folder(target.parent)
    staged = staged_path(target)
    try:
        with open(staged, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        publish(staged, target)
    except BaseException:
        discard(staged)
        raise


def delete_checkpoint(path: str | os.PathLike[str]) -> None:
    """Deletes the checkpoint ``path``, a folder or a file; at every instant the path loads it whole or is gone.

    A crash leaves at most a leftover, which the next save in the same run folder removes.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
    """
    target = local_path(path)
    found = resolve(target)
    doomed = staged_path(target)
    # under its own name, a folder that lost its manifest would pass for a stock checkpoint
    os.rename(found, doomed)
    sync_folder(target.parent)
    remove(doomed)


def clean_leftovers(root: str | os.PathLike[str], *, name: str | None = None) -> list[Path]:
    """Removes what unfinished saves left in ``root``, of ``step-*`` checkpoints and of ``name``; returns the paths.

    Call it only while no save into ``root`` is under way.
    """
    found = leftovers(root, name=name)
    for path in found:
        discard(path)
    return found


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _swap(staged: Path, target: Path) -> Path:
    """Puts ``staged`` in the place of ``target`` and returns where the old one is now."""
    if not exchange(staged, target):
        return _swap_in_two_steps(staged, target)
    try:
        sync_folder(target.parent)
    except OSError:
        exchange(staged, target)
        raise
    return staged


def _swap_in_two_steps(staged: Path, target: Path) -> Path:
    retired = retired_path(target)
    os.rename(target, retired)
    try:
        os.rename(staged, target)
    except OSError:
        os.rename(retired, target)
        raise
    sync_folder(target.parent)
    return retired
