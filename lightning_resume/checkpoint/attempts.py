"""Counts how often a run was begun from a checkpoint without going well, so that one that crashes the run is set aside.

The count lies in the run folder, in ``attempts.json``. It is written before a checkpoint is restored, so that a crash
while restoring counts too, and taken back once the run has gone on for a number of steps.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_resume.checkpoint.commit import put_file
from lightning_resume.checkpoint.layout import Found
from lightning_resume.checkpoint.names import ATTEMPTS_NAME
from lightning_resume.checkpoint.paths import AnyPath, read_bytes
from lightning_resume.errors import ResumeWarning


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Begun ``count`` times from the checkpoint of this name; ``sequence`` tells it from one that replaced it."""

    sequence: int
    count: int


def read_attempts(root: AnyPath) -> dict[str, Attempt]:
    """What is counted in the run folder ``root``; nothing, with a warning, where the file cannot be understood."""
    try:
        content = json.loads(str(read_bytes(root / ATTEMPTS_NAME), "utf-8"))
        return {name: Attempt(sequence=int(a["sequence"]), count=int(a["count"])) for name, a in content.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{root / ATTEMPTS_NAME} is not understood and ignored: {error}", ResumeWarning, stacklevel=2)
        return {}


def change_attempts(root: AnyPath, change: Callable[[dict[str, Attempt]], Mapping[str, Attempt]]) -> None:
    """Stores ``change`` of the counts; a warning where that fails, since the run itself can go on."""
    try:
        content = {name: vars(attempt) for name, attempt in change(read_attempts(root)).items()}
        put_file(root / ATTEMPTS_NAME, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        warnings.warn(f"{root / ATTEMPTS_NAME} could not be written: {error}", ResumeWarning, stacklevel=2)


def begun(attempts: Mapping[str, Attempt], found: Found) -> dict[str, Attempt]:
    """``attempts`` with one more of ``found``."""
    return {**attempts, found.path.name: Attempt(sequence=_sequence(found), count=count(attempts, found) + 1)}


def without(attempts: Mapping[str, Attempt], found: Found) -> dict[str, Attempt]:
    return {name: attempt for name, attempt in attempts.items() if name != found.path.name}


def count(attempts: Mapping[str, Attempt], found: Found) -> int:
    attempt = attempts.get(found.path.name)
    return attempt.count if attempt is not None and attempt.sequence == _sequence(found) else 0


def set_aside(attempts: Mapping[str, Attempt], newest_first: Sequence[Found], most: int) -> list[Found]:
    """Those that were begun ``most`` times in vain; none where that is all of them: then it is not the checkpoints."""
    aside = [found for found in newest_first if count(attempts, found) >= most]
    return [] if len(aside) == len(newest_first) else aside


def _sequence(found: Found) -> int:
    assert found.manifest is not None
    return found.manifest.sequence
