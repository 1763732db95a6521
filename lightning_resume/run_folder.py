"""The checkpoints of one run: which one to go on from, and which ones to keep."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from lightning_resume import _distributed
from lightning_resume.candidates import load_first, usable
from lightning_resume.checkpoint import attempts
from lightning_resume.checkpoint.commit import delete_checkpoint
from lightning_resume.checkpoint.layout import Found, newest_first, survey
from lightning_resume.checkpoint.names import ATTEMPTS_NAME
from lightning_resume.checkpoint.paths import AnyPath, PathLike, as_path
from lightning_resume.checkpoint.remote import RemotePath
from lightning_resume.checkpoint.retention import KeepAll, KeepBest, Policy, Saved, as_policy, best_of, superseded
from lightning_resume.errors import (
    FallBackWarning,
    RankLostError,
    ResumeError,
    ResumeWarning,
)

T = TypeVar("T")

GOOD_STEPS = 10
MAX_ATTEMPTS = 2


class RunFolder:
    """The run folder ``root``. Methods that look at it or change it are collectives.

    Args:
        root: The folder, a path or any fsspec URL.
        keep: What to keep, as :func:`~lightning_resume.checkpoint.retention.as_policy` takes it.
        good_steps: After so many optimizer steps, a run that was resumed is taken to go well.
        max_attempts: A checkpoint from which the run was begun so many times in vain is set aside; None: never.
        storage_options: Arguments of the fsspec filesystem.
    """

    def __init__(
        self,
        root: PathLike,
        *,
        keep: Policy | int | Iterable[Policy] | None = None,
        good_steps: int = GOOD_STEPS,
        max_attempts: int | None = MAX_ATTEMPTS,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.root: AnyPath = as_path(root, storage_options)
        self._storage_options = storage_options
        self.keep = as_policy(keep)
        if max_attempts is not None and max_attempts < 1:
            raise ValueError(f"max_attempts is {max_attempts}; pass at least 1, or None to set no checkpoint aside.")
        self._good_steps, self._max_attempts = good_steps, max_attempts
        self._begun: Found | None = None
        self._steps = 0
        self._remover: threading.Thread | None = None
        self._doomed: list[AnyPath] = []

    def path_of(self, path: PathLike) -> AnyPath:
        """``path``, reached with the run folder's ``storage_options`` where it lies on the same kind of store."""
        alike = isinstance(self.root, RemotePath) and str(path).startswith(f"{self.root.protocol}:/")
        return as_path(path, self._storage_options if alike else None)

    def candidates(self, *, tagged: bool = False) -> list[Found]:
        """The complete checkpoints in the order in which to try them: newest first, those set aside last.

        Args:
            tagged: Also those with names of the user's own.

        Raises:
            CheckpointCorruptError: There are checkpoints, but no manifest of theirs is readable.
            CheckpointVersionError: One is of a newer format.
        """
        self.withdraw()  # this process has come so far
        return _distributed.on_rank_zero(f"looking for checkpoints in {self.root}", lambda: self._candidates(tagged))

    def load_newest(self, load: Callable[[AnyPath], T], candidates: Sequence[Found], *, counts: bool = True) -> T:
        """Returns ``load(path)`` of the first of ``candidates`` that verifies. A collective.

        Args:
            load: Loads a checkpoint; raises the same error on every rank.
            candidates: In the order in which to try them.
            counts: Whether the run goes on from it, so that the attempt is counted.

        Raises:
            CheckpointCorruptError: None of them does.
        """

        def attempt(found: Found) -> T:
            if counts:
                self._begin(found)
            try:
                return load(found.path)
            except (ResumeError, OSError) as error:
                if not isinstance(error, RankLostError):  # refused, not crashed
                    self.withdraw()
                raise

        return load_first(candidates, attempt, lambda found: str(found.path))

    def best(self, policy: KeepBest | None, *, tagged: bool = False) -> Found | None:
        """The best complete checkpoint by ``policy``, else the newest with finite weights. Not a collective."""
        complete = newest_first(survey(self.root, tagged=tagged))
        best = best_of([as_saved(found) for found in complete], policy)
        return None if best is None else next(found for found in complete if found.path.name == best.name)

    def stepped(self) -> None:
        """Counts an optimizer step of a run that was resumed. Not a collective."""
        if self._begun is not None:
            self._steps += 1
            if self._steps >= self._good_steps:
                self.withdraw()

    def withdraw(self) -> None:
        """Takes the last attempt back: it went well, or what ended it was not the checkpoint. Not a collective."""
        found, self._begun = self._begun, None
        if found is not None and _distributed.rank() == 0:
            attempts.change_attempts(self.root, lambda counted: attempts.without(counted, found))

    def make_way(self, path: AnyPath) -> None:
        """Waits for the deletion of ``path``, to which something is about to be saved. Not a collective."""
        if path in self._doomed:
            self.close()

    def tidy(self) -> None:
        """Deletes, in the background, what is no longer wanted. Call it once a newer checkpoint is durable.

        What could not be deleted is tried again the next time.
        """
        _distributed.on_rank_zero(f"tidying {self.root}", self._tidy)

    def close(self) -> None:
        """Waits for what is being deleted. Not a collective."""
        if self._remover is not None:
            self._remover.join()
            self._remover, self._doomed = None, []

    def _candidates(self, tagged: bool) -> list[Found]:
        return self._without_crashing(usable(self.root, survey(self.root, tagged=tagged)))

    def _without_crashing(self, complete: list[Found]) -> list[Found]:
        if self._max_attempts is None or not complete:
            return complete
        counted = attempts.read_attempts(self.root)
        aside = attempts.set_aside(counted, complete, self._max_attempts)
        for found in aside:
            _warn(
                FallBackWarning,
                f"{found.path} is set aside: the run was begun from it {attempts.count(counted, found)} times and ended"
                f" each time within {self._good_steps} steps. An older checkpoint is used. To try this one again,"
                f" name it explicitly or delete {self.root / ATTEMPTS_NAME}.",
            )
        if not aside and attempts.count(counted, complete[0]) >= self._max_attempts:
            _warn(
                ResumeWarning,
                f"The run was begun {attempts.count(counted, complete[0])} times from {complete[0].path} and ended each"
                f" time within {self._good_steps} steps, and so from every other checkpoint in {self.root}: it may not"
                " be the checkpoints. The newest is tried again.",
            )
        return [found for found in complete if found not in aside] + aside

    def _begin(self, found: Found) -> None:
        if self._max_attempts is None:
            return
        self._begun, self._steps = found, 0

        count = lambda: attempts.change_attempts(self.root, lambda counted: attempts.begun(counted, found))  # noqa: E731
        _distributed.on_rank_zero(f"counting the attempt to load {found.path}", count)

    def _tidy(self) -> None:
        self.close()
        try:
            self._start_deleting()
        except (OSError, ResumeError) as error:  # the save itself went well
            _warn(ResumeWarning, f"Older checkpoints in {self.root} could not be looked through yet: {error}")

    def _start_deleting(self) -> None:
        self._doomed = [] if isinstance(self.keep, KeepAll) else unwanted(self.root, self.keep)
        if self._doomed:
            self._remover = threading.Thread(target=_delete, args=(self._doomed,), name="lightning-resume-delete")
            self._remover.start()


def is_no_crash(error: BaseException) -> bool:
    """Whether ``error`` says nothing against the checkpoint that the run was begun from.

    So it is when somebody ended the run, and when a checkpoint was refused or could not be saved or loaded.
    """
    ended = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and not error.code)
    # of Lightning, under either of its package names
    by_signal = type(error).__name__ == "SIGTERMException"
    return ended or by_signal or (isinstance(error, ResumeError) and not isinstance(error, RankLostError))


def unwanted(root: AnyPath, keep: Policy) -> list[AnyPath]:
    """The ``step-*`` checkpoints in ``root`` that ``keep`` does not want, oldest first."""
    complete = newest_first(survey(root))
    paths = {found.path.name: found.path for found in complete}
    return [paths[saved.name] for saved in superseded([as_saved(found) for found in complete], keep)]


def as_saved(found: Found) -> Saved:
    """What a retention policy may know of a complete checkpoint."""
    manifest = found.manifest
    assert manifest is not None
    return Saved(
        name=found.path.name,
        step=manifest.step or 0,
        created=datetime.fromisoformat(manifest.created),
        metrics=manifest.metrics,
        finite=not manifest.nonfinite,
    )


def _delete(paths: Sequence[AnyPath]) -> None:
    for path in paths:
        try:
            delete_checkpoint(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            _warn(ResumeWarning, f"{path} is no longer wanted but could not be deleted yet: {error}")


def _warn(category: type[Warning], text: str) -> None:
    warnings.warn(text, category, stacklevel=2)
