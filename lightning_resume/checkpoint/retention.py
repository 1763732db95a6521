"""Which checkpoints of a run are wanted. Pure: deciding does no I/O.

Policies are values. ``KeepLast(3) | KeepBest(2, "val_loss") | KeepEvery(steps=10_000)`` keeps what any of them wants.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import final


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """What a policy may know of a checkpoint.

    Args:
        name: Names it, uniquely.
        step: Optimizer steps so far.
        created: When it was saved.
        metrics: What it may be chosen by.
        finite: Whether all of its weights are.
    """

    name: str
    step: int
    created: datetime
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    finite: bool = True


class Policy(abc.ABC):
    """Says which checkpoints to keep; ``one | other`` keeps what either does."""

    @abc.abstractmethod
    def wanted(self, newest_first: Sequence[Saved]) -> set[str]:
        """The names of those to keep."""

    def __or__(self, other: Policy) -> AnyOf:
        if not isinstance(other, Policy):
            return NotImplemented
        return AnyOf((*_parts(self), *_parts(other)))


@final
@dataclasses.dataclass(frozen=True)
class AnyOf(Policy):
    """Keeps what any of its ``policies`` does; ``one | other`` makes it."""

    policies: tuple[Policy, ...]

    def wanted(self, newest_first: Sequence[Saved]) -> set[str]:
        return set().union(*(policy.wanted(newest_first) for policy in self.policies))


@final
@dataclasses.dataclass(frozen=True)
class KeepAll(Policy):
    """Keeps every checkpoint."""

    def wanted(self, newest_first: Sequence[Saved]) -> set[str]:
        return {saved.name for saved in newest_first}


@final
@dataclasses.dataclass(frozen=True)
class KeepLast(Policy):
    """Keeps the newest ``n``.

    Raises:
        ValueError: ``n`` is less than 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check_count("KeepLast", "n", self.n)

    def wanted(self, newest_first: Sequence[Saved]) -> set[str]:
        return {saved.name for saved in newest_first[: self.n]}


@final
@dataclasses.dataclass(frozen=True)
class KeepBest(Policy):
    """Keeps the ``k`` best by the metric ``monitor``.

    A checkpoint without that metric, with one that is not a number, or with weights that are not finite is never best.
    Of equals the older one is better, so that a plateau deletes nothing. While none has it, the newest are kept.

    Args:
        k: How many.
        monitor: The metric's name, as it was logged or given to ``save(metrics=...)``.
        mode: ``"min"`` where less is better, or ``"max"``.

    Raises:
        ValueError: ``k`` is less than 1, or ``mode`` is another word.
    """

    k: int
    monitor: str
    mode: str = "min"

    def __post_init__(self) -> None:
        _check_count("KeepBest", "k", self.k)
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode is {self.mode!r}; pass 'min' where less of {self.monitor!r} is better, or 'max'.")

    def wanted(self, newest_first: Sequence[Saved]) -> set[str]:
        ranked = self.ranked(newest_first) or [saved for saved in newest_first if saved.finite]
        return {saved.name for saved in ranked[: self.k]}

    def ranked(self, newest_first: Sequence[Saved]) -> list[Saved]:
        """Those that can be best, best first."""
        sign = 1 if self.mode == "min" else -1
        able = [saved for saved in reversed(newest_first) if saved.finite and self.monitor in saved.metrics]
        able = [saved for saved in able if not math.isnan(saved.metrics[self.monitor])]
        return sorted(able, key=lambda saved: sign * saved.metrics[self.monitor])


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepEvery(Policy):
    """Keeps one in every so many steps, or one in every so many hours, for good.

    Args:
        steps: Keeps the first checkpoint at or after each multiple of so many optimizer steps, from the first multiple.
        hours: The interval in hours, counted from the oldest checkpoint.

    Raises:
        ValueError: Neither or both are given, or one is not above 0.
    """

    steps: int | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.hours is None):
            raise ValueError(
                "Pass either steps or hours to KeepEvery; `KeepEvery(steps=n) | KeepEvery(hours=t)` is both."
            )
        interval = self.steps if self.hours is None else self.hours
        if not interval > 0:  # type: ignore[operator]  # one of them is given
            raise ValueError(f"The interval of KeepEvery is {interval}; pass more than 0.")

    def wanted(self, newest_first: Sequence[Saved]) -> set[str]:
        oldest_first = list(reversed(newest_first))
        return self._by_steps(oldest_first) if self.steps is not None else self._by_hours(oldest_first)

    def _by_steps(self, oldest_first: Sequence[Saved]) -> set[str]:
        assert self.steps is not None
        first: dict[int, str] = {}
        # by step, not by age: after a run went back, an interval may be walked through twice
        for saved in sorted(oldest_first, key=lambda saved: saved.step):
            first.setdefault(saved.step // self.steps, saved.name)
        first.pop(0, None)
        return set(first.values())

    def _by_hours(self, oldest_first: Sequence[Saved]) -> set[str]:
        assert self.hours is not None
        kept: list[Saved] = []
        for saved in oldest_first:
            if not kept or (saved.created - kept[-1].created).total_seconds() >= self.hours * 3600:
                kept.append(saved)
        return {saved.name for saved in kept}


def as_policy(keep: Policy | int | Iterable[Policy] | None) -> Policy:
    """Returns ``keep`` as one policy: a number keeps that many newest, None all, several what any of them keeps.

    Raises:
        TypeError: It is nothing of these.
        ValueError: It is less than 1, or there are none.
    """
    if keep is None:
        return KeepAll()
    if isinstance(keep, Policy):
        return keep
    if isinstance(keep, int) and not isinstance(keep, bool):
        if keep < 1:
            raise ValueError(f"keep is {keep}; pass at least 1, or None to keep all checkpoints.")
        return KeepLast(keep)
    policies: tuple[object, ...] | None = tuple(keep) if isinstance(keep, Iterable) else None
    if policies is None or not all(isinstance(policy, Policy) for policy in policies):
        raise TypeError(
            f"keep is {keep!r}; pass a number, None for all, or policies such as KeepLast(3) | KeepBest(1, 'loss')."
        )
    if not policies:
        raise ValueError("keep holds no policy; pass None to keep all checkpoints.")
    return AnyOf(policies)  # type: ignore[arg-type]  # checked above


def superseded(newest_first: Sequence[Saved], keep: Policy) -> list[Saved]:
    """Returns what a run no longer wants, oldest first; never the newest, from which it would resume."""
    wanted = keep.wanted(newest_first)
    return [saved for saved in reversed(newest_first[1:]) if saved.name not in wanted]


def best_policy(keep: Policy) -> KeepBest | None:
    """The first ``KeepBest`` in ``keep``, which says what is best."""
    return next((policy for policy in _parts(keep) if isinstance(policy, KeepBest)), None)


def best_of(newest_first: Sequence[Saved], policy: KeepBest | None) -> Saved | None:
    """The best by ``policy``; without one, the newest whose weights are finite."""
    ranked = [saved for saved in newest_first if saved.finite] if policy is None else policy.ranked(newest_first)
    return ranked[0] if ranked else None


def _parts(policy: Policy) -> tuple[Policy, ...]:
    return policy.policies if isinstance(policy, AnyOf) else (policy,)


def _check_count(policy: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} of {policy} is {value}; pass at least 1. To keep all checkpoints, pass keep=None.")
