"""Where checkpoints lie, and what it is that lies at a path."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lightning_resume.checkpoint.manifest import Manifest, read_manifest
from lightning_resume.checkpoint.names import (
    ATTEMPTS_NAME,
    BESIDE_SHARDS,
    MANIFEST_NAME,
    META_NAME,
    METADATA_NAME,
    UNFINISHED_NAME,
    Leftover,
    as_leftover,
    find_leftovers,
    is_data_name,
    is_leftover_name,
    is_replacing_name,
    is_staged,
    is_step_name,
    resolve,
    step_name,
)
from lightning_resume.checkpoint.paths import AnyPath, PathLike, as_path, list_names
from lightning_resume.checkpoint.remote import REQUESTS, RemotePath
from lightning_resume.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointVersionError,
    ResumeError,
    StorageError,
)

__all__ = [
    "MANIFEST_NAME",
    "METADATA_NAME",
    "META_NAME",
    "Found",
    "Kind",
    "classify",
    "leftovers",
    "list_checkpoints",
    "newest",
    "resolve",
    "step_name",
    "survey",
]

P = TypeVar("P")
T = TypeVar("T")


class Kind(enum.Enum):
    """What lies at a path."""

    RESUMABLE = "a checkpoint of lightning-resume"
    INCOMPLETE = "what an unfinished save left"
    SHARDED = "a sharded checkpoint of stock Lightning or torch.distributed.checkpoint"
    SINGLE_FILE = "a file"
    RUN_FOLDER = "a run folder that holds checkpoints"
    NOT_A_CHECKPOINT = "a folder without a checkpoint"
    MISSING = "nothing"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A folder where a checkpoint should be: its manifest, or, where that cannot be used, why not."""

    path: AnyPath
    manifest: Manifest | None
    error: ResumeError | None = None

    @property
    def order(self) -> tuple[int, int, str]:
        """Sorts by time of saving."""
        assert self.manifest is not None
        return self.manifest.sequence, self.manifest.step or 0, self.path.name


def classify(path: PathLike) -> Kind:
    """Says what lies at ``path``.

    A folder is RESUMABLE when its manifest is there and valid; a manifest of a newer format counts, so that opening it
    says to upgrade. A folder whose manifest is damaged is INCOMPLETE.
    """
    found = resolve(as_path(path))
    if isinstance(found, Path) and not found.is_dir():
        return Kind.SINGLE_FILE if found.exists() else Kind.MISSING
    if is_staged(found):
        return Kind.INCOMPLETE
    names = set(list_names(found))
    if isinstance(found, RemotePath) and not names:
        return Kind.SINGLE_FILE if found.is_file() else Kind.MISSING
    return _classify_folder(found, names)


def survey(root: PathLike, *, tagged: bool = False) -> list[Found]:
    """Reads the manifest of every ``step-*`` folder in ``root``, in no order; ``tagged``: of every folder that has one.

    Where there is no manifest at all, nothing is found: such a folder is not ours, or was never finished. A ``step-*``
    that has shards, and no mark of a save that did not finish, has lost its manifest.
    """
    folder = as_path(root)
    names = {name for name in _names_in(folder) if tagged or is_step_name(name)}
    found = look_at([folder / name for name in names])
    found = [one for one in found if one.error is None or is_step_name(one.path.name) or _holds_shards(one.path)]
    rest = filter(is_step_name, names - {one.path.name for one in found})
    return found + [_lost(folder / name) for name in rest if _has_lost_manifest(folder / name)]


def look_at(paths: Sequence[AnyPath]) -> list[Found]:
    """Reads the manifests of the folders ``paths``; those without one are left out."""
    looked = _each(_look, paths, at_once=any(isinstance(path, RemotePath) for path in paths))
    return [found for found in looked if found is not None]


def list_checkpoints(root: PathLike) -> list[AnyPath]:
    """Returns the complete checkpoints ``step-*`` of the run folder ``root``, newest first.

    Newest is the highest ``sequence`` of the manifests, then the highest step. Folders without a valid manifest are
    not listed; :func:`classify` says what they are.

    Raises:
        CheckpointVersionError: A checkpoint is of a newer format; passing over it would resume an older one.
    """
    return [found.path for found in newest_first(survey(root))]


def newest_first(found: Iterable[Found]) -> list[Found]:
    """Returns those that are complete, newest first.

    Raises:
        CheckpointVersionError: One is of a newer format; passing over it would resume an older one.
    """
    found = list(found)
    for one in found:
        if isinstance(one.error, CheckpointVersionError):
            raise one.error
    return sorted((one for one in found if one.manifest is not None), key=lambda one: one.order, reverse=True)


def newest(root: PathLike) -> AnyPath | None:
    """Returns the newest complete checkpoint of the run folder ``root``, or None."""
    return next(iter(list_checkpoints(root)), None)


def leftovers(root: PathLike, *, name: str | None = None, tagged: bool = False) -> list[AnyPath]:
    """Returns what unfinished saves and deletes left in ``root``: of ``step-*`` checkpoints and of ``name``, or of all.

    An older checkpoint that waits under its retired name for lack of a newer one is not a leftover.
    """
    folder = as_path(root)
    if isinstance(folder, RemotePath):
        return _remote_leftovers(folder, name, tagged=tagged)
    found = [left for left in find_leftovers(folder) if tagged or _is_ours(left, name)]
    return [left.path for left in found if resolve(left.of) != left.path]


def beside(target: AnyPath) -> list[Found]:
    """The complete checkpoints among which a save to ``target`` finds its place: all siblings, and what it replaces."""
    names = {target.name} if _is_root(target.parent) else _names_in(target.parent) | {target.name}
    found = look_at([target.with_name(name) for name in sorted(names)])
    return [one for one in found if one.manifest is not None]


def _is_ours(left: Leftover, name: str | None) -> bool:
    """Whether it is of a run's own: its steps, its attempts, and what is called ``name``."""
    return left.of.name in (name, ATTEMPTS_NAME) or is_step_name(left.of.name)


def _remote_leftovers(folder: RemotePath, name: str | None, *, tagged: bool) -> list[AnyPath]:
    names = ({name} if name else set()) if folder.is_root else _names_in(folder)
    paths = [folder / child for child in sorted(names) if tagged or is_step_name(child) or child == name]
    staged = filter(None, map(as_leftover, map(Path, [] if folder.is_root else folder.names())))
    files = [folder / left.path.name for left in staged if tagged or _is_ours(left, name)]
    return files + list(itertools.chain.from_iterable(_each(_left_in, paths, at_once=True)))


def _left_in(folder: RemotePath) -> list[AnyPath]:
    """What is left in one remote folder: all of it, or what its manifest does not name."""
    names = set(folder.names())
    ours = {name for name in names if is_replacing_name(name)}
    try:
        manifest = read_manifest(folder) if MANIFEST_NAME in names else None
    except (CheckpointCorruptError, CheckpointVersionError, CheckpointIncompleteError):
        return []
    if manifest is None:
        ours |= {name for name in names if is_leftover_name(name)}
        return [folder] if UNFINISHED_NAME in names else [folder / name for name in sorted(ours)]
    if manifest.folder is None:
        surplus = ours
    else:
        surplus = {n for n in names if is_data_name(n) or n in BESIDE_SHARDS} | ours - {manifest.folder}
    surplus |= {name for name in names if is_leftover_name(name)}
    return [folder / name for name in sorted(surplus | names & {UNFINISHED_NAME})]


def _look(path: AnyPath) -> Found | None:
    try:
        return Found(path=path, manifest=read_manifest(path))
    except (CheckpointIncompleteError, FileNotFoundError):
        return None
    except StorageError:
        raise  # a store that does not answer says nothing about the checkpoint
    except ResumeError as error:
        return Found(path=path, manifest=None, error=error)


def _is_root(folder: AnyPath) -> bool:
    return isinstance(folder, RemotePath) and folder.is_root


def holds_checkpoint(names: Iterable[str]) -> bool:
    """Whether a folder with these ``names`` in it is, or was to be, a checkpoint."""
    ours = {MANIFEST_NAME, UNFINISHED_NAME} | BESIDE_SHARDS
    return any(name in ours or is_data_name(name) or is_replacing_name(name) for name in names)


def _has_lost_manifest(folder: AnyPath) -> bool:
    names = list_names(folder)
    return METADATA_NAME in names and not {UNFINISHED_NAME, MANIFEST_NAME} & set(names)


def _lost(folder: AnyPath) -> Found:
    error = CheckpointIncompleteError(f"{folder} has lost its {MANIFEST_NAME}: it was copied or deleted in part.")
    return Found(path=folder, manifest=None, error=error)


def _holds_shards(folder: AnyPath) -> bool:
    """Whether an unreadable ``manifest.json`` there is ours: other tools have files of that name, too."""
    return any(name == METADATA_NAME or is_replacing_name(name) for name in list_names(folder))


def _each(look: Callable[[P], T], paths: Sequence[P], *, at_once: bool) -> list[T]:
    if not at_once or len(paths) < 2:
        return [look(path) for path in paths]
    with ThreadPoolExecutor(REQUESTS) as requests:
        return list(requests.map(look, paths))


def _classify_folder(folder: AnyPath, names: set[str]) -> Kind:
    if MANIFEST_NAME in names:
        found = _look(folder)
        usable = found is not None and (found.manifest is not None or isinstance(found.error, CheckpointVersionError))
        return Kind.RESUMABLE if usable else Kind.INCOMPLETE
    if UNFINISHED_NAME in names and isinstance(folder, RemotePath):
        return Kind.INCOMPLETE
    if METADATA_NAME in names:
        return Kind.SHARDED
    if holds_checkpoint(names):
        return Kind.INCOMPLETE
    return Kind.RUN_FOLDER if any(map(is_step_name, _names_in(folder))) else Kind.NOT_A_CHECKPOINT


def _names_in(root: AnyPath) -> set[str]:
    """The names that checkpoints in ``root`` may have, and those of which only the retired one is there."""
    if isinstance(root, RemotePath):
        return {name for name, is_folder in root.entries().items() if is_folder and not name.startswith(".")}
    names = {name for name in list_names(root) if not name.startswith(".")}
    if isinstance(root, Path):
        # a checkpoint may for a moment have its retired name only
        names |= {left.of.name for left in find_leftovers(root) if left.retired}
    return names
