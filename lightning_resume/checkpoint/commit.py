"""The commit: whatever happens while a checkpoint is saved or deleted, its path holds the old or the new one, whole.

Every function here acts on one process; across ranks, rank 0 calls them.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, final

from lightning_resume.checkpoint.filesystem import (
    HashedFile,
    discard,
    exchange,
    make_folder,
    new_file,
    or_warn,
    remove,
    sync_folder,
)
from lightning_resume.checkpoint.layout import holds_checkpoint, leftovers
from lightning_resume.checkpoint.manifest import FileEntry, Manifest, read_manifest, to_json
from lightning_resume.checkpoint.names import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    find_leftovers,
    replacing_name,
    resolve,
    retired_path,
    staged_path,
)
from lightning_resume.checkpoint.paths import AnyPath, PathLike, as_path, list_names
from lightning_resume.checkpoint.remote import REQUESTS, RemotePath
from lightning_resume.errors import ResumeError, StorageError


def begin(target: AnyPath) -> Commit:
    """Starts a save to ``target``: makes a place to write its files to.

    Raises:
        OSError: It cannot be written there.
    """
    return RemoteCommit.begin(target) if isinstance(target, RemotePath) else LocalCommit.begin(target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit(abc.ABC):
    """One save on its way to its checkpoint's path."""

    @property
    @abc.abstractmethod
    def folder(self) -> AnyPath:
        """Where its files are written."""

    @abc.abstractmethod
    def publish(self, manifest: Manifest) -> None:
        """Makes the files in ``folder``, which ``manifest`` names, the checkpoint; when it raises, the old one is."""

    @abc.abstractmethod
    def abandon(self) -> None:
        """Removes what was written."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalCommit(Commit):
    """Writes into a folder beside the target, which then takes its name."""

    target: Path
    staged: Path

    @classmethod
    def begin(cls, target: Path) -> LocalCommit:
        _refuse_other_content(target)
        make_folder(target.parent)
        staged = staged_path(target)
        staged.mkdir()
        return cls(target=target, staged=staged)

    @property
    def folder(self) -> Path:
        return self.staged

    def publish(self, manifest: Manifest) -> None:
        seal(self.staged, manifest)
        put_in_place(self.staged, self.target)

    def abandon(self) -> None:
        if self.staged.exists():
            discard(self.staged)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteCommit(Commit):
    """Writes under a prefix that nothing uses; putting the manifest, one small object, makes it the checkpoint.

    The prefix is the target itself where nothing lies there, so that stock readers find the files, else a fresh folder
    within it that the manifest then names.
    """

    target: RemotePath
    prefix: str | None

    @classmethod
    def begin(cls, target: RemotePath) -> RemoteCommit:
        names = target.names()
        if not names and target.is_file():
            raise FileExistsError(f"{target} is a file, and stores cannot replace it by a folder at once. Delete it.")
        _refuse_other_content(target, names)
        # asked for by its content: listings and sizes may be stale
        is_new = not names and not _has_content(target / MANIFEST_NAME)
        if is_new:
            (target / UNFINISHED_NAME).touch()
        commit = cls(target=target, prefix=None if is_new else replacing_name())
        (commit.folder / MANIFEST_NAME).make_parent()
        return commit

    @property
    def folder(self) -> RemotePath:
        return self.target if self.prefix is None else self.target / self.prefix

    def publish(self, manifest: Manifest) -> None:
        self._check_stored(manifest)
        manifest = dataclasses.replace(manifest, folder=self.prefix)
        self._put_manifest(to_json(manifest).encode())
        with or_warn(self.target):
            self._remove_all_but(manifest)

    def abandon(self) -> None:
        with or_warn(self.folder):
            if self._is_published():
                return
            if self.prefix is not None:
                self.folder.remove_folder()
            else:
                _empty(self.target, but={UNFINISHED_NAME})
                (self.target / UNFINISHED_NAME).remove_file()

    def _is_published(self) -> bool:
        # another rank may have failed after the manifest was put
        try:
            return read_manifest(self.target).folder == self.prefix
        except ResumeError as error:
            if isinstance(error, StorageError):
                raise
            return False

    def _check_stored(self, manifest: Manifest) -> None:
        """Asks for every file by name: what a store has accepted it may still not have."""
        with ThreadPoolExecutor(REQUESTS) as requests:
            sizes = requests.map(lambda name: (self.folder / name).size(), manifest.files)
            for (name, entry), found in zip(manifest.files.items(), sizes, strict=True):
                if found != entry.bytes:
                    raise StorageError(f"{self.folder / name} holds {found} bytes after {entry.bytes} were written.")

    def _put_manifest(self, new: bytes) -> None:
        """Puts the manifest; where it was stored in part and yet reported as done, puts the old one back."""
        file = self.target / MANIFEST_NAME
        old = file.read() if self.prefix is not None and _has_content(file) else None
        try:
            _put_surely(file, new)
        except OSError:
            with or_warn(file):
                if old is not None and file.read() not in (old, new):
                    file.put(old)
            raise

    def _remove_all_but(self, manifest: Manifest) -> None:
        _empty(self.target, but={MANIFEST_NAME} | _own_names(manifest))


def seal(staged: Path, manifest: Manifest) -> FileEntry:
    """Writes the manifest, the last file of a checkpoint, and makes the folder durable."""
    # every other name must be durable before the one that vouches for them
    sync_folder(staged)
    with HashedFile(staged / MANIFEST_NAME) as file:
        file.write(to_json(manifest).encode())
    sync_folder(staged)
    return file.entry()


def put_in_place(staged: Path, target: Path) -> None:
    """Gives the folder or file ``staged`` the name ``target``, durably, in place of what is there.

    At every instant ``target``, or its retired name (:func:`~lightning_resume.checkpoint.layout.resolve` finds it),
    holds the old or the new one, whole. When this raises, the old one is in its place; a file that a file replaced
    cannot be brought back, when the last fsync fails.
    """
    if os.path.lexists(target) and (_is_folder(staged) or _is_folder(target)):
        discard(_swap(staged, target))
    else:
        _rename(staged, target, may_return=not os.path.lexists(target))


def commit_file(path: PathLike, write: Callable[[Any], None]) -> None:
    """Writes the single file ``path`` by ``write(file)``, durably and at once, in place of what is there.

    Raises:
        OSError: It could not be written; what was at ``path`` is untouched, or, where only the last step of making it
            durable failed, replaced.
        FileExistsError: ``path`` is a folder on a remote store.
    """
    target = as_path(path)
    if isinstance(target, RemotePath):
        _commit_remote_file(target, write)
        return
    _refuse_other_content(target)
    make_folder(target.parent)
    staged = staged_path(target)
    try:
        _write_file(staged, write)
        put_in_place(staged, target)
    except BaseException:
        discard(staged)
        raise


def delete_checkpoint(path: PathLike) -> None:
    """Deletes the checkpoint ``path``, a folder or a file; at every instant the path loads it whole or is gone.

    A crash leaves at most a leftover, which the next save in the same run folder removes.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
    """
    target = as_path(path)
    if isinstance(target, RemotePath):
        _delete_remote(target)
        return
    found = resolve(target)
    assert isinstance(found, Path)
    older = _forget_retired(target, but=found)
    doomed = staged_path(target)
    # under its own name, a folder that lost its manifest would pass for a stock checkpoint
    os.rename(found, doomed)
    sync_folder(target.parent)
    for path in (doomed, *older):
        remove(path)


def clean_leftovers(root: PathLike, *, name: str | None = None, tagged: bool = False) -> list[AnyPath]:
    """Removes what unfinished saves left in ``root``, as :func:`leftovers` finds it; returns the paths.

    Call it only while no save into ``root`` is under way.
    """
    found = leftovers(root, name=name, tagged=tagged)
    for path in found:
        if isinstance(path, Path):
            discard(path)
        else:
            with or_warn(path):
                _remove_remote(path)
    return found


def put_file(path: AnyPath, data: bytes) -> None:
    """Makes ``data`` the content of the small file ``path``, durably and at once."""
    if isinstance(path, RemotePath):
        _put_surely(path, data)
    else:
        commit_file(path, lambda file: file.write(data))


def _refuse_other_content(target: AnyPath, names: Sequence[str] | None = None) -> None:
    """Refuses a folder that is no checkpoint: a save takes the place of all that is there.

    Raises:
        FileExistsError: It holds something else, for example the checkpoints of a run.
    """
    names = list_names(target) if names is None else names
    if names and not holds_checkpoint(names):
        raise FileExistsError(
            f"{target} is a folder that holds other things ({', '.join(names[:3])}, ...), all of which this save would"
            f" replace. Save to a name within it, such as {target / 'step-00000001'}, or delete it first."
        )


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
    for older in _forget_retired(target, but=target):
        discard(older)
    retired = retired_path(target)
    os.rename(target, retired)
    try:
        _rename(staged, target, may_return=True)
    except OSError:
        os.rename(retired, target)
        raise
    return retired


def _rename(staged: Path, target: Path, *, may_return: bool) -> None:
    """Renames durably; where that cannot be made durable and nothing was replaced, takes it back."""
    os.rename(staged, target)
    try:
        sync_folder(target.parent)
    except OSError:
        if may_return:
            os.rename(target, staged)
        raise


def _forget_retired(target: Path, *, but: Path) -> list[Path]:
    """Takes from what earlier saves retired the name under which it would be found once ``target`` has none.

    Returns where it is now. When this returns, no crash brings such a name back, nor one that was removed before.
    """
    older = [left.path for left in find_leftovers(target.parent) if left.retired and left.of == target]
    doomed = {path: staged_path(target) for path in older if path != but}
    for path, staged in doomed.items():
        os.rename(path, staged)
    sync_folder(target.parent)
    return list(doomed.values())


def _write_file(path: AnyPath, write: Callable[[Any], None]) -> None:
    file = new_file(path)
    try:
        write(file)
    except BaseException:
        file.discard()
        raise
    file.close()


def _commit_remote_file(target: RemotePath, write: Callable[[Any], None]) -> None:
    if target.names():
        raise FileExistsError(f"{target} is a folder, and stores cannot replace it by a file at once. Delete it.")
    if target.appears_at_close:
        _write_file(target, write)
        return
    staged = target.with_name(staged_path(Path(target.name)).name)
    try:
        _write_file(staged, write)
        staged.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.remove_file()
        raise


def _has_content(file: RemotePath) -> bool:
    try:
        file.read(0, 1)
    except FileNotFoundError:
        return False
    return True


def _put_surely(path: RemotePath, data: bytes) -> None:
    """Puts a small file and reads it back; a put that reported failure may still have happened."""
    failure: OSError | None = None
    try:
        path.put(data)
    except OSError as error:
        failure = error
    try:
        found = path.read()
    except OSError as error:
        raise failure or error from error
    if found != data:
        raise failure or StorageError(f"{path} is not what was put there: {len(found)} bytes, not {len(data)}.")


def _delete_remote(target: RemotePath) -> None:
    if target.names():
        _remove_remote(target)
    elif target.is_file():
        target.remove_file()
    else:
        raise FileNotFoundError(f"There is no checkpoint at {target}.")


def _remove_remote(folder: RemotePath) -> None:
    """Removes a remote folder, or file, in an order in which no part of it ever passes for the whole."""
    if not folder.names():
        folder.remove_file()
        return
    (folder / UNFINISHED_NAME).touch()
    (folder / MANIFEST_NAME).remove_file()
    _empty(folder, but={UNFINISHED_NAME})
    folder.remove_folder()


def _empty(folder: RemotePath, *, but: set[str]) -> None:
    for name, is_folder in folder.entries().items():
        if name not in but:
            (folder / name).remove_folder() if is_folder else (folder / name).remove_file()


def _own_names(manifest: Manifest) -> set[str]:
    return set(manifest.files) if manifest.folder is None else {manifest.folder}
