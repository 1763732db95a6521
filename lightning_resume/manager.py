"""One object for all checkpoints of a run, with Fabric or with plain PyTorch: save, load, list, keep, delete."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from torch.optim import Optimizer

from lightning_resume import _distributed, loading, saving
from lightning_resume.checkpoint.background import AsyncSave, Background
from lightning_resume.checkpoint.commit import clean_leftovers, delete_checkpoint
from lightning_resume.checkpoint.layout import Found, leftovers, look_at, newest_first, step_name, survey
from lightning_resume.checkpoint.manifest import Manifest
from lightning_resume.checkpoint.names import is_step_name
from lightning_resume.checkpoint.paths import AnyPath, PathLike, as_path
from lightning_resume.checkpoint.retention import KeepBest, Policy, as_policy, best_policy
from lightning_resume.checkpoint.validation import Validate
from lightning_resume.data.position import Resumable
from lightning_resume.errors import CheckpointNotFoundError
from lightning_resume.loading import Verify
from lightning_resume.run import describe, restore_rng, rng_component
from lightning_resume.run_folder import MAX_ATTEMPTS, RunFolder, is_no_crash, unwanted
from lightning_resume.saving import About, CheckpointOptions, OnSaveError
from lightning_resume.state import rng
from lightning_resume.state.objects import Objects
from lightning_resume.state.topology import Topology

_USER_CONTENT = "user_content"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a manifest says of a complete checkpoint.

    Args:
        path: Where it lies, a path or URL.
        tag: The user's own name of it, None where it is named by its step.
        step: Optimizer steps so far.
        epoch: Epochs so far.
        created: When it was saved, ISO 8601 in UTC.
        bytes: The size of its files.
        metrics: What it may be chosen by.
        finite: Whether all of its weights are.
        world_size: How many ranks saved it.
    """

    path: str
    tag: str | None
    step: int | None
    epoch: int | None
    created: str
    bytes: int
    metrics: Mapping[str, float]
    finite: bool
    world_size: int | None


def list_checkpoints(root: PathLike, *, storage_options: Mapping[str, Any] | None = None) -> list[CheckpointInfo]:
    """Returns the complete checkpoints in the run folder ``root``, newest first. Not a collective.

    Args:
        root: A path or any fsspec URL.
        storage_options: Arguments of the fsspec filesystem.

    Raises:
        CheckpointVersionError: One is of a newer format.
    """
    return [_info(found) for found in _complete(as_path(root, storage_options))]


def prune(
    root: PathLike,
    *,
    keep: Policy | int | Iterable[Policy] | None = None,
    dry_run: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Deletes what unfinished saves left in the run folder ``root``, and checkpoints that are not to be kept.

    Not a collective. Call it only while nothing is saved into ``root``.

    Args:
        root: A path or any fsspec URL.
        keep: Which of the ``step-*`` checkpoints to keep, all by default. The newest is never deleted.
        dry_run: Only say what would be deleted.
        storage_options: Arguments of the fsspec filesystem.

    Returns:
        What was deleted, leftovers first.
    """
    folder = as_path(root, storage_options)
    doomed = unwanted(folder, as_policy(keep))
    if dry_run:
        return list(map(str, [*leftovers(folder, tagged=True), *doomed]))
    cleaned = clean_leftovers(folder, tagged=True)
    for path in doomed:
        delete_checkpoint(path)
    return list(map(str, [*cleaned, *doomed]))


class CheckpointManager:
    """Saves and loads the checkpoints of one run; all methods but those that say otherwise are called on all ranks.

    ``state`` is a dict of modules, optimizers, schedulers, loaders and plain values, as for ``fabric.save``. With
    ``fabric``, whose strategy must be one of lightning-resume's, the position of every loader it set up and the random
    number generators are saved and restored too. Without it, those of the loaders in ``state`` (such as
    :class:`~lightning_resume.ResumableDataLoader`), and the generators.

    Example::

        manager = CheckpointManager("s3://bucket/runs/gpt", fabric=fabric, keep=KeepLast(3) | KeepBest(1, "val_loss"))
        content = manager.load(state)  # the newest that is whole; None on the first start
        for batch in loader:
            ...
            if step % 500 == 0:
                manager.save(state, step=step, metrics={"val_loss": loss})

    Args:
        root: The run folder: a path, or any fsspec URL.
        fabric: The Fabric of the run, or None.
        keep: Which checkpoints to keep: the number of the newest, None for all, or policies such as
            ``KeepLast(3) | KeepBest(1, "val_loss") | KeepEvery(hours=6)``. Others are deleted in the background after
            a newer one is durable. The newest, and those with a tag, are never deleted.
        max_attempts: A checkpoint is set aside when ``load`` has begun from it so many times and the run ended each
            time within 10 optimizer steps. None never sets one aside.
        verify: ``"read"`` compares a checkpoint with its hashes as it is read, ``"first"`` all of it before anything
            is changed.
        validate: Whether tensors that ranks hold alike are compared before a save: ``"quick"`` by one hash of all,
            ``"full"`` tensor by tensor, None not at all.
        on_save_error: ``"raise"``, or ``"warn"`` to go on without that checkpoint; older ones are untouched.
        async_save: ``"thread"`` (or True) or ``"process"``: :meth:`save` returns once the state is copied, and a
            thread, or a process for each rank, writes while training goes on. What failed is raised at the next step
            of an optimizer in ``state``, the next :meth:`save`, :meth:`load`, :meth:`wait` or :meth:`close`.
        when_busy: ``"wait"``, or ``"skip"`` with a warning, a save that is asked for while one is being written.
        staging: ``"now"``: all is copied before :meth:`save` returns. ``"deferred"``: what only optimizers change is
            copied beside the forward and backward that follow, and the optimizer's step waits for it; for runs that
            change parameters in no other way, which else fails the save.
        storage_options: Arguments of the fsspec filesystem, beyond fsspec's own configuration.

    Raises:
        TypeError: The strategy of ``fabric`` is not one of lightning-resume's.
        ValueError: An argument is out of its bounds.
        MissingPackageError: The URL's protocol needs a package that is not installed.
    """

    def __init__(
        self,
        root: PathLike,
        *,
        fabric: Any = None,
        keep: Policy | int | Iterable[Policy] | None = 3,
        max_attempts: int | None = MAX_ATTEMPTS,
        verify: str = "read",
        validate: str | None = None,
        on_save_error: str = "raise",
        async_save: Literal["thread", "process"] | bool = False,
        when_busy: Literal["wait", "skip"] = "wait",
        staging: Literal["now", "deferred"] = "now",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if fabric is not None and not hasattr(fabric.strategy, "using"):
            raise TypeError(
                f"The strategy of this Fabric is {type(fabric.strategy).__name__}, which cannot bring a run back. Use"
                " one of lightning_resume's, such as Fabric(strategy=ResumableDDPStrategy())."
            )
        self._fabric = fabric
        self._folder = RunFolder(root, keep=keep, max_attempts=max_attempts, storage_options=storage_options)
        self._on_save_error = OnSaveError(on_save_error)
        how = AsyncSave.of(async_save, when_busy, staging)
        self._background = None if how is None else Background(how, on_error=self._on_save_error.applied)
        self._options = CheckpointOptions(
            verify=Verify(verify),
            validate=None if validate is None else Validate(validate),
            as_folder=True,
            background=self._background,
        )
        self._saved: CheckpointInfo | None = None
        self._forget_hook: Callable[[], None] = lambda: None
        self.loaded: CheckpointInfo | None = None
        """What the last :meth:`load` loaded; None where there was nothing."""

    @property
    def root(self) -> str:
        return str(self._folder.root)

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        epoch: int | None = None,
        tag: str | None = None,
        metrics: Mapping[str, float] | None = None,
        user_content: Any = None,
        metadata: Mapping[str, Any] | None = None,
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,
    ) -> CheckpointInfo | None:
        """Saves one checkpoint, ``step-<8 digits>`` or the folder ``tag``; then deletes what is not to be kept.

        Args:
            state: All of the run's objects, or those to save.
            step: Optimizer steps so far.
            epoch: Epochs so far.
            tag: A name of your own, a plain folder name. A checkpoint of that name is replaced.
            metrics: What :class:`~lightning_resume.KeepBest` may choose by.
            user_content: Anything of yours, which :meth:`load` returns.
            metadata: For the manifest, as JSON can hold it.
            filter: By key of ``state``, which entries to save, as in ``fabric.save``.

        Returns:
            What was saved, or None where it failed and ``on_save_error`` is ``"warn"``, where it was skipped, and where
            it is being saved in the background: :meth:`wait` returns it then.

        Raises:
            CheckpointSaveError: It failed, on every rank; older checkpoints are untouched.
            ValueError: ``tag`` is no plain name, or ``state`` uses a reserved key.
        """
        path = self._folder.root / (step_name(step) if tag is None else _checked_tag(tag))
        if _USER_CONTENT in state:
            raise ValueError(f"The key {_USER_CONTENT!r} is reserved. Pass that value as save(user_content=...).")
        about = About(step=step, epoch=epoch, metrics=_numbers(metrics), metadata=dict(metadata or {}))
        whole = dict(state) if user_content is None else {**state, _USER_CONTENT: user_content}
        with self._on_save_error.applied():
            if self._background is not None and not self._background.is_free(str(path)):
                return None
        self._saved = None
        self._folder.make_way(path)

        def done(manifest: Manifest) -> None:
            self._saved = _info(Found(path=path, manifest=manifest))
            self._folder.tidy()

        with self._on_save_error.applied():
            self._save(path, whole, dataclasses.replace(self._options, about=about, done=done), filter)
        return self._saved if self._background is None else None

    def wait(self) -> CheckpointInfo | None:
        """Waits until what is being saved in the background is durable.

        Returns:
            What was saved last; None where that failed and ``on_save_error`` is ``"warn"``, or nothing was saved.

        Raises:
            CheckpointSaveError: It failed, on every rank; older checkpoints are untouched.
        """
        if self._background is not None:
            with self._on_save_error.applied():
                self._background.wait()
        return self._saved

    def load(
        self,
        state: dict[str, Any],
        *,
        path: PathLike | None = None,
        tag: str | None = None,
        strict: bool = True,
        trust: bool = False,
    ) -> Any:
        """Loads the newest checkpoint that is whole into ``state``, or the one named; returns its user content.

        Where the newest is damaged, or was set aside, all ranks go back to the one before, with a warning. One that is
        named by ``path`` or ``tag`` never gives way to another.

        Args:
            state: The objects to load into: all, or a part of what was saved. Plain values are replaced.
            path: A certain checkpoint.
            tag: A certain checkpoint, by the name it was saved with.
            strict: Whether every key of ``state``, and every parameter, must have been saved.
            trust: Let it hold objects of any class, which can run code that its writer chose.

        Returns:
            What was given to ``save(user_content=...)``; None where there was none, or where there is no checkpoint
            yet. :attr:`loaded` tells which.

        Raises:
            CheckpointCorruptError: The checkpoint named, or all there are, are damaged.
            CheckpointNotFoundError: There is nothing of that ``path`` or ``tag``.
            CheckpointMismatchError: It does not fit ``state``.
        """
        if path is not None and tag is not None:
            raise ValueError("Pass either path or tag.")
        self.wait()
        if self._background is not None:
            self._background.prepare()
        named = path if tag is None else self._folder.root / _checked_tag(tag)
        self.loaded = None
        if named is not None:
            return self._load(self._folder.path_of(named), state, strict=strict, trust=trust)
        candidates = self._folder.candidates(tagged=True)
        if not candidates:
            return None
        load = lambda found: self._load(found, state, strict=strict, trust=trust)  # noqa: E731
        return self._folder.load_newest(load, candidates, counts=self._watch(state))

    def list(self) -> list[CheckpointInfo]:
        """The complete checkpoints, newest first."""
        root = self._folder.root
        return _distributed.on_rank_zero(f"listing {root}", lambda: list_checkpoints(root))

    def latest(self) -> CheckpointInfo | None:
        """The newest complete checkpoint."""
        return next(iter(self.list()), None)

    def best(self, monitor: str | None = None, mode: str = "min") -> CheckpointInfo | None:
        """The best checkpoint by the metric ``monitor``, by default that of the first ``KeepBest`` in ``keep``.

        Raises:
            ValueError: ``monitor`` is not given and ``keep`` holds no ``KeepBest``.
        """
        policy = KeepBest(1, monitor, mode) if monitor is not None else best_policy(self._folder.keep)
        if policy is None:
            raise ValueError("Pass best(monitor=...), or a KeepBest in keep: nothing says what is best.")
        look = lambda: self._folder.best(policy, tagged=True)  # noqa: E731
        best = _distributed.on_rank_zero(f"looking for the best in {self.root}", look)
        return None if best is None else _info(best)

    def prune(self) -> Sequence[str]:
        """Deletes now what unfinished saves left and what is not to be kept; returns what was deleted."""
        self.wait()
        self._folder.close()
        root, keep = self._folder.root, self._folder.keep
        return _distributed.on_rank_zero(f"pruning {root}", lambda: prune(root, keep=keep))

    def close(self) -> None:
        """Waits for what is being saved and deleted in the background, at the end of the run. Not a collective.

        Called while no exception is on its way, it also says that the run went well, however few its steps were.

        Raises:
            CheckpointSaveError: What was being saved failed.
        """
        self._close(went_well=sys.exc_info()[0] is None)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close(went_well=error is None or is_no_crash(error))

    def _close(self, *, went_well: bool) -> None:
        try:
            if self._background is not None:
                with self._on_save_error.applied():
                    self._background.close()
        finally:
            if went_well:
                self._folder.withdraw()
            self._folder.close()

    def _save(
        self,
        path: AnyPath,
        state: dict[str, Any],
        options: CheckpointOptions,
        filter: Mapping[str, Callable[[str, Any], bool]] | None,
    ) -> None:
        if self._fabric is not None:
            with self._fabric.strategy.using(options):
                self._fabric.save(path, state, filter=filter)
            return
        loaders = [value for value in state.values() if isinstance(value, Resumable)]
        about = dataclasses.replace(options.about, topology=Topology.of().to_manifest(loaders=describe(loaders)))
        with rng.preserved():
            components = [rng_component(rng.capture())]
            how: dict[str, Any] = {"about": about, "validate": options.validate, "filter": filter}
            how |= {"background": options.background, "done": options.done}
            saving.save_folder(path, Objects.of(state), components, **how)

    def _load(self, path: AnyPath, state: dict[str, Any], *, strict: bool, trust: bool) -> Any:
        found = _distributed.on_rank_zero(f"looking at {path}", lambda: _found(path))
        if self._fabric is not None:
            with self._fabric.strategy.using(self._options):
                remainder = self._fabric.load(path, state, strict=strict, **({"weights_only": False} if trust else {}))
        else:
            remainder = self._load_plain(path, state, strict=strict, trust=trust)
        self.loaded = _info(found)
        return remainder.get(_USER_CONTENT)

    def _load_plain(self, path: AnyPath, state: dict[str, Any], *, strict: bool, trust: bool) -> dict[str, Any]:
        how: dict[str, Any] = {"strict": strict, "trust": trust, "verify": self._options.verify}
        loaded = loading.load_folder(path, state, Objects.of(state), content_if_empty=False, **how)
        resumes = any(isinstance(value, (Optimizer, Resumable)) for value in state.values())
        if resumes and loaded.components is not None:
            restore_rng(loaded.components)
        return loaded.remainder

    def _watch(self, state: Mapping[str, Any]) -> bool:
        """Counts the steps of the first optimizer in ``state``, if any: a run that goes on for some goes well."""
        optimizers = [value for value in state.values() if isinstance(getattr(value, "optimizer", value), Optimizer)]
        if optimizers:
            optimizer = getattr(optimizers[0], "optimizer", optimizers[0])
            self._forget_hook()
            self._forget_hook = optimizer.register_step_post_hook(lambda *_: self._folder.stepped()).remove
        return bool(optimizers)


def _found(path: AnyPath) -> Found:
    found = next(iter(look_at([path])), None)
    if found is None:
        raise CheckpointNotFoundError(f"There is no complete checkpoint at {path}. CheckpointManager.list() tells all.")
    if found.error is not None:
        raise found.error
    return found


def _complete(root: AnyPath) -> list[Found]:
    return newest_first(survey(root, tagged=True))


def _info(found: Found) -> CheckpointInfo:
    manifest = found.manifest
    assert manifest is not None
    world_size = manifest.topology.get("world_size")
    return CheckpointInfo(
        path=str(found.path),
        tag=None if is_step_name(found.path.name) else found.path.name,
        step=manifest.step,
        epoch=manifest.epoch,
        created=manifest.created,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        metrics=dict(manifest.metrics),
        finite=not manifest.nonfinite,
        world_size=world_size if isinstance(world_size, int) else None,
    )


def _numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    return {name: float(value) for name, value in (metrics or {}).items()}


def _checked_tag(tag: str) -> str:
    plain = tag == os.path.basename(tag) and tag not in ("", ".", "..") and not tag.startswith(".")
    if not plain or is_step_name(tag) or "\\" in tag or ":" in tag:
        raise ValueError(f"tag is {tag!r}; pass a plain folder name that does not begin with a dot and is no step-*.")
    return tag
