"""Where checkpoints lie, and what it is that lies at a path."""

from __future__ import annotations

import enum
import os
from pathlib import Path

from lightning_resume.checkpoint.filesystem import local_path
from lightning_resume.checkpoint.manifest import Manifest, read_manifest
from lightning_resume.checkpoint.names import (
    MANIFEST_NAME,
    META_NAME,
    METADATA_NAME,
    find_leftovers,
    is_staged,
    is_step_name,
    resolve,
    step_name,
)
from lightning_resume.errors import CheckpointVersionError, ResumeError

__all__ = [
    "MANIFEST_NAME",
    "METADATA_NAME",
    "META_NAME",
    "Kind",
    "classify",
    "leftovers",
    "list_checkpoints",
    "newest",
    "next_sequence",
    "resolve",
    "step_name",
]


class Kind(enum.Enum):
    """What lies at a path."""

    RESUMABLE = "a checkpoint of lightning-resume"
    INCOMPLETE = "what an unfinished save left"
    SHARDED = "a sharded checkpoint of stock Lightning or torch.distributed.checkpoint"
    SINGLE_FILE = "a file"
    RUN_FOLDER = "a run folder that holds checkpoints"
    NOT_A_CHECKPOINT = "a folder without a checkpoint"
    MISSING = "nothing"


def classify(path: str | os.PathLike[str]) -> Kind:
    """Says what lies at ``path``.

    A folder is RESUMABLE when its manifest is there and valid; a manifest of a newer format counts, so that opening it
    says to upgrade. A folder whose manifest is damaged is INCOMPLETE.
    """
    found = resolve(local_path(path))
    if not found.exists():
        return Kind.MISSING
    if not found.is_dir():
        return Kind.SINGLE_FILE
    return Kind.INCOMPLETE if is_staged(found) else _classify_folder(found)


def list_checkpoints(root: str | os.PathLike[str]) -> list[Path]:
    """Returns the complete checkpoints ``step-*`` of the run folder ``root``, newest first.

    Newest is the highest ``sequence`` of the manifests, then the highest step. Folders without a valid manifest are
    not listed; :func:`classify` says what they are.

    Raises:
        CheckpointVersionError: A checkpoint is of a newer format; passing over it would resume an older one.
    """
    found = [(path, _manifest_of(path)) for path in _step_paths(local_path(root))]
    complete = [(path, manifest) for path, manifest in found if manifest is not None]
    complete.sort(key=lambda pair: (pair[1].sequence, pair[1].step or 0, pair[0].name), reverse=True)
    return [path for path, _ in complete]


def newest(root: str | os.PathLike[str]) -> Path | None:
    """Returns the newest complete checkpoint of the run folder ``root``, or None."""
    return next(iter(list_checkpoints(root)), None)


def leftovers(root: str | os.PathLike[str], *, name: str | None = None) -> list[Path]:
    """Returns what unfinished saves and deletes left in ``root``: of ``step-*`` checkpoints, and of ``name``.

    An older checkpoint that waits under its retired name for lack of a newer one is not a leftover.
    """
    found = [left for left in find_leftovers(local_path(root)) if left.of.name == name or is_step_name(left.of.name)]
    return [left.path for left in found if resolve(left.of) != left.path]


def next_sequence(root: str | os.PathLike[str]) -> int:
    """Returns one more than the highest sequence of the complete checkpoints in ``root``, 0 where there are none."""
    folder = local_path(root)
    paths = [folder / name for name in os.listdir(folder)] if folder.is_dir() else []
    found = [_sequence_of(path) for path in paths if (path / MANIFEST_NAME).is_file() and not is_staged(path)]
    return max(found, default=-1) + 1


def _classify_folder(folder: Path) -> Kind:
    if (folder / MANIFEST_NAME).is_file():
        return Kind.RESUMABLE if _is_ours(folder) else Kind.INCOMPLETE
    if (folder / METADATA_NAME).is_file():
        return Kind.SHARDED
    if (folder / META_NAME).is_file() or any(folder.glob("__*.distcp")):
        return Kind.INCOMPLETE
    return Kind.RUN_FOLDER if _step_paths(folder) else Kind.NOT_A_CHECKPOINT


def _is_ours(folder: Path) -> bool:
    try:
        return _manifest_of(folder) is not None
    except CheckpointVersionError:
        return True


def _manifest_of(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except CheckpointVersionError:
        raise
    except ResumeError:
        return None


def _sequence_of(path: Path) -> int:
    try:
        return read_manifest(path).sequence
    except ResumeError:
        # a sequence only orders what can be loaded, so what cannot be read does not count
        return -1


def _step_paths(root: Path) -> list[Path]:
    names = set(os.listdir(root)) if root.is_dir() else set()
    # a checkpoint may for a moment have its retired name only
    names |= {left.of.name for left in find_leftovers(root) if left.retired}
    return [root / name for name in sorted(names) if is_step_name(name)]
