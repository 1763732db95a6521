"""Which checkpoints of a run are no longer wanted. Pure: deciding does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def superseded(newest_first: Sequence[T], keep_last: int | None) -> list[T]:
    """Returns what a run no longer wants, oldest first; all are wanted when ``keep_last`` is ``None``."""
    return [] if keep_last is None else list(reversed(newest_first[keep_last:]))
