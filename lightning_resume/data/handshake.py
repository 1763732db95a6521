"""Calls that all ranks must make together: found out to be out of step before the first collective, not in it.

Ranks that enter different collectives hang, or take each other's bytes for something else. So each first says through
the process group's store, which needs no collective, what it calls. Rank 0 compares, and its verdict is what every rank
acts on; a rank that has waited too long gives a verdict itself. The first verdict stands, so none goes on alone.
"""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Sequence
from typing import Any, final

import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_resume import _distributed
from lightning_resume.errors import OutOfStepError, RankLostError

_PREFIX = "lightning_resume/calls"
_GO = "go"
_MOST_NAMED = 8


def in_step(call: str, *, timeout: float | datetime.timedelta | None = None) -> None:
    """Returns when every rank has made this ``call``; without other ranks, at once.

    Args:
        call: What is called, with what must be the same on every rank.
        timeout: Seconds to wait for the others; by default as long as the process group does.

    Raises:
        OutOfStepError: Ranks call different things; raised on all of them.
        RankLostError: A rank has not called anything in time; raised on all that have, and on that one when it comes.
    """
    if _distributed.world_size() == 1:
        return
    meetings = _meetings()
    limit = meetings.patience if timeout is None else timeout
    limit = limit if isinstance(limit, datetime.timedelta) else datetime.timedelta(seconds=limit)
    with _distributed.together():
        verdict = meetings.meet(call, limit)
    if verdict != _GO:
        kind, _, text = verdict.partition(":")
        raise _ERRORS[kind](text)


_ERRORS: dict[str, type[OutOfStepError | RankLostError]] = {"different": OutOfStepError, "lost": RankLostError}


@final
class _Meetings:
    """The calls of one process group, counted: the n-th of each rank belong together."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        # a connection of its own: waiting on the group's would hold up its other users
        self._store = dist.PrefixStore(_PREFIX, store.clone())
        self.patience: datetime.timedelta = store.timeout
        self._rank, self._world_size, self._number = rank, world_size, 0

    def meet(self, call: str, limit: datetime.timedelta) -> str:
        """Says what this rank calls, and returns the verdict on what all do."""
        number, self._number = self._number, self._number + 1
        self._store.set(f"{number}/{self._rank}", call)
        verdict = self._lead(number, limit) if self._rank == 0 else self._follow(number, limit)
        self._forget(number)
        return verdict

    def _lead(self, number: int, limit: datetime.timedelta) -> str:
        keys = [f"{number}/{rank}" for rank in range(self._world_size)]
        if not self._wait(keys, limit):
            return self._decide(number, self._lost(number, limit))
        calls = [self._store.get(key).decode() for key in keys]
        return self._decide(number, _GO if len(set(calls)) == 1 else f"different:{_different(calls)}")

    def _follow(self, number: int, limit: datetime.timedelta) -> str:
        if self._wait([f"{number}/verdict"], limit):
            return str(self._store.get(f"{number}/verdict").decode())
        return self._decide(number, self._lost(number, limit))

    def _decide(self, number: int, verdict: str) -> str:
        return str(self._store.compare_set(f"{number}/verdict", "", verdict).decode())

    def _wait(self, keys: list[str], limit: datetime.timedelta) -> bool:
        try:
            self._store.wait(keys, limit)
        except dist.DistStoreError:
            return False
        return True

    def _lost(self, number: int, limit: datetime.timedelta) -> str:
        called = {rank for rank in range(self._world_size) if self._store.check([f"{number}/{rank}"])}
        missing = sorted(set(range(self._world_size)) - called) or [0]  # rank 0 called, but gave no verdict
        call = self._store.get(f"{number}/{self._rank}").decode()
        return (
            f"lost:{_named(sorted(called))} called {call} and waited {limit.total_seconds():g} s for"
            f" {_named(missing)}, which did not call it. Either it has ended (look for the first error in its log), or"
            " it is doing something else: all ranks must call this at the same point of the program."
        )

    def _forget(self, number: int) -> None:
        """Takes back what this rank has said, and the verdict when all have read it."""
        self._store.delete_key(f"{number}/{self._rank}")
        if self._store.add(f"{number}/read", 1) == self._world_size:
            self._store.delete_key(f"{number}/verdict")
            self._store.delete_key(f"{number}/read")


# weak: a process group that was destroyed must not live on here
_of_group: weakref.WeakKeyDictionary[Any, _Meetings] = weakref.WeakKeyDictionary()


def _meetings() -> _Meetings:
    group = distributed_c10d._get_default_group()
    if group not in _of_group:
        store = distributed_c10d._get_default_store()
        _of_group[group] = _Meetings(store, _distributed.rank(), _distributed.world_size())
    return _of_group[group]


def _different(calls: Sequence[str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, call in enumerate(calls):
        ranks.setdefault(call, []).append(rank)
    listed = "\n".join(f"  {_named(of_call)}: {call}" for call, of_call in ranks.items())
    return f"The ranks are out of step: they called different things.\n{listed}\nCall the same on all ranks."


def _named(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:_MOST_NAMED]))
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed}{more}"
