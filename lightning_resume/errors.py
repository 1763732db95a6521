"""Errors that lightning-resume raises for its users. Each says what was found, what was expected, and what to do."""

from __future__ import annotations

from functools import partial
from typing import Any


class ResumeError(Exception):
    """Base class of every error that lightning-resume raises for its users."""


class CheckpointNotFoundError(ResumeError, FileNotFoundError):
    """The path holds no checkpoint of any kind that can be read."""


class CheckpointIncompleteError(ResumeError, ValueError):
    """The folder was left by a save that did not finish: its manifest is missing."""


class CheckpointCorruptError(ResumeError, ValueError):
    """What is stored differs from what the manifest says was written."""


class CheckpointVersionError(ResumeError, ValueError):
    """The checkpoint was written in a newer format than this version of lightning-resume reads."""


class CheckpointSaveError(ResumeError, RuntimeError):
    """A save failed on at least one rank; raised on every rank, the older checkpoint is untouched."""


class CheckpointMismatchError(ResumeError, ValueError):
    """The checkpoint does not fit the objects it is loaded into.

    Raised before anything is changed.

    Args:
        component: Which part of the state differs, for example ``"model"`` or ``"loader"``.
        field: What differs within it, for example ``"seed"``.
        saved: The value in the checkpoint.
        current: The value of the object that the checkpoint was to be loaded into.
        advice: What the user can do about it.
    """

    def __init__(self, component: str, field: str, *, saved: object, current: object, advice: str) -> None:
        self.component, self.field, self.saved, self.current = component, field, saved, current
        self._advice = advice
        super().__init__(
            f"The checkpoint does not fit the current {component}: not the same {field}.\n"
            f"  saved:   {saved}\n"
            f"  current: {current}\n"
            f"{advice}"
        )

    def __reduce__(self) -> Any:
        # sent between ranks, so that all of them raise it
        values = {"saved": str(self.saved), "current": str(self.current), "advice": self._advice}
        return partial(type(self), self.component, self.field, **values), ()


class UnsafeCheckpointError(ResumeError, ValueError):
    """The checkpoint holds objects outside the allow-list; loading them would need the caller's explicit trust."""


class StorageError(ResumeError, OSError):
    """A store (S3, SFTP, ...) refused, did not answer, or did not keep what it was given; its client has retried."""


class MissingPackageError(ResumeError, ImportError):
    """The URL's protocol needs a package that is not installed; names the extra to install."""


class RankLostError(ResumeError, RuntimeError):
    """Another rank ended, or did not answer within the process group's time limit, while all were needed."""


class OutOfStepError(ResumeError, RuntimeError):
    """Ranks that must do the same did not: made other calls, or loaders of another order. Names ranks and what differs.

    Raised on every rank.
    """


class ReplicaMismatchError(CheckpointSaveError):
    """A tensor that ranks should hold alike differs between them; names it, the ranks and their hashes."""


class ResumeWarning(UserWarning):
    """Base class of the warnings about checkpoints that a user should look into."""


class FallBackWarning(ResumeWarning):
    """The newest checkpoint was passed over, and an older one is used."""


class StaleCheckpointWarning(ResumeWarning):
    """Steps were counted since the last save, but no trainable tensor has changed."""


class NonFiniteWarning(ResumeWarning):
    """A checkpoint was saved whose weights hold not-a-number or infinity."""


class UnsafeResumeWarning(ResumeWarning):
    """A loader goes on although samples may repeat or be lost, because the user said ``strict=False``."""
