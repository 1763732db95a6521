"""Which checkpoints a path stands for, and going back from a damaged one to the one before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning_resume import _distributed
from lightning_resume.checkpoint.layout import Found, Kind, classify, newest_first, survey
from lightning_resume.checkpoint.paths import AnyPath, PathLike, as_path
from lightning_resume.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    FallBackWarning,
)

S = TypeVar("S")
T = TypeVar("T")

UNUSABLE = (CheckpointCorruptError, CheckpointIncompleteError, CheckpointNotFoundError)
"""The errors of a checkpoint that is damaged or gone, instead of which an older one may be loaded."""


def locate(path: PathLike) -> tuple[list[AnyPath], Kind]:
    """Rank 0's paths that ``path`` stands for, and what lies there. A collective.

    A run folder stands for its complete checkpoints, newest first.

    Raises:
        CheckpointNotFoundError: There is nothing that could be loaded.
    """

    def look() -> tuple[list[AnyPath], Kind]:
        kind = classify(path)
        if kind is Kind.RUN_FOLDER:
            found = usable(path, survey(path))
            if found:
                return [one.path for one in found], Kind.RESUMABLE
        if kind in (Kind.MISSING, Kind.NOT_A_CHECKPOINT):
            raise CheckpointNotFoundError(
                f"{str(path)!r} is no checkpoint: found {kind.value}. Pass the folder or file that was"
                " saved; where there may be none yet, catch CheckpointNotFoundError and begin a fresh run."
            )
        return [as_path(path)], kind

    return _distributed.on_rank_zero(f"looking at {str(path)!r}", look)


def usable(root: PathLike, found: Sequence[Found]) -> list[Found]:
    """Those of ``found`` that are complete, newest first; warns of those whose manifest is damaged.

    Raises:
        CheckpointCorruptError: All of them are damaged: to start afresh silently would be worse.
        CheckpointVersionError: One is of a newer format.
    """
    complete = newest_first(found)
    damaged = [one for one in found if one.error is not None]
    for one in damaged:
        warnings.warn(f"{one.path} is passed over: {one.error}", FallBackWarning, stacklevel=2)
    if damaged and not complete:
        raise CheckpointCorruptError(
            f"No checkpoint in {root} can be used: {len(damaged)} of them have a damaged manifest. Copy them again from"
            " their source, or delete them to start a fresh run."
        )
    return complete


def load_first(candidates: Sequence[S], load: Callable[[S], T], name: Callable[[S], str] = str) -> T:
    """Returns ``load`` of the first candidate that is whole, loudly where that is not the first. A collective.

    ``load`` must raise the same error on every rank.

    Raises:
        CheckpointCorruptError: None is. Of a single candidate, its own error.
    """
    failures: list[str] = []
    for index, candidate in enumerate(candidates):
        try:
            return load(candidate)
        except UNUSABLE as error:
            if len(candidates) == 1:
                raise
            failures.append(str(error))
            if index + 1 < len(candidates) and _distributed.rank() == 0:
                warnings.warn(
                    f"{name(candidate)} cannot be used: {error} Going back to {name(candidates[index + 1])}: the steps"
                    " between them are done again.",
                    FallBackWarning,
                    stacklevel=2,
                )
    told = "\n".join(f"  {failure}" for failure in failures)
    raise CheckpointCorruptError(f"None of {len(candidates)} checkpoints can be used:\n{told}")
