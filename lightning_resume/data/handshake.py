"""What all ranks must do together, and with what: found out to be out of step before the first collective, not in it.

Ranks that enter different collectives hang, or take each other's bytes for something else. So each first says through
the process group's store, which needs no collective, what it calls. Rank 0 compares, and its verdict is what every rank
acts on; a rank that has waited too long gives a verdict itself. The first verdict stands, so none goes on alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils.data import get_worker_info

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
    _meet(Call(name=call), timeout)


def agreed(
    call: str, same: Mapping[str, Any], told: Any = None, *, timeout: float | datetime.timedelta | None = None
) -> list[Any]:
    """Compares what must be ``same`` on all ranks; returns what each of them tells.

    Args:
        call: What all ranks do: it stands in the errors.
        same: By name.
        told: What this rank tells the others: plain values, and few.
        timeout: As for :func:`in_step`, whose errors this raises, too.

    Raises:
        OutOfStepError: Ranks differ; names in what, and the values of each. Raised on all of them.
    """
    return _meet(Call(name=call, same={name: str(value) for name, value in same.items()}, told=told), timeout)


def disagreement(call: str, of_ranks: Sequence[Mapping[str, Any]]) -> str:
    """Says in what the ranks differ, and each one's value; empty where they do not. Pure."""
    fields = dict.fromkeys(field for one in of_ranks for field in one)
    values = {field: [str(one.get(field, "nothing")) for one in of_ranks] for field in fields}
    differ = [f"not the same {field}:\n{_by_rank(each)}" for field, each in values.items() if len(set(each)) > 1]
    return f"The ranks do not agree on {call}: {''.join(differ)}{_ADVICE}" if differ else ""


_ADVICE = (
    "Each rank reads its part of one order, so samples would repeat or be lost. Give all ranks the same data and"
    " arguments; to a loader that one rank has for itself, `rank=0, world_size=1`."
)


def is_of_group(rank: int, world_size: int) -> bool:
    """Whether a loader that is ``rank`` of ``world_size`` is one of the process group's, with one on every other rank.

    In a worker process there is no talking to other ranks, though torch may say that there is a group.
    """
    alone = _alone or get_worker_info() is not None or _distributed.world_size() == 1
    return not alone and (rank, world_size) == (_distributed.rank(), _distributed.world_size())


_alone = 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Around what this rank does without the others: nothing is asked of them."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def _meet(call: Call, timeout: float | datetime.timedelta | None) -> list[Any]:
    if _distributed.world_size() == 1:
        return [call.told]
    meetings = _meetings()
    limit = meetings.patience if timeout is None else timeout
    limit = limit if isinstance(limit, datetime.timedelta) else datetime.timedelta(seconds=limit)
    with _distributed.together():
        verdict = meetings.meet(call, limit)
    kind, _, text = verdict.partition(":")
    if kind != _GO:
        raise _ERRORS[kind](text)
    return json.loads(text)  # type: ignore[no-any-return]


_ERRORS: dict[str, type[OutOfStepError | RankLostError]] = {"different": OutOfStepError, "lost": RankLostError}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a rank says of itself: what it calls, what it calls it with, and what it tells the others."""

    name: str
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    told: Any = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Call:
        return cls(**json.loads(text))


@final
class _Meetings:
    """The calls of one process group, counted: the n-th of each rank belong together."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        # a connection of its own: waiting on the group's would hold up its other users
        self._store = dist.PrefixStore(_PREFIX, store.clone())
        self.patience = _distributed.timeout()
        self._rank, self._world_size, self._number = rank, world_size, 0

    def meet(self, call: Call, limit: datetime.timedelta) -> str:
        """Says what this rank calls, and returns the verdict on what all do."""
        number, self._number = self._number, self._number + 1
        self._store.set(f"{number}/{self._rank}", call.to_json())
        verdict = self._lead(number, limit) if self._rank == 0 else self._follow(number, limit)
        self._forget(number)
        return verdict

    def _lead(self, number: int, limit: datetime.timedelta) -> str:
        keys = [f"{number}/{rank}" for rank in range(self._world_size)]
        if not self._wait(keys, limit):
            return self._decide(number, self._lost(number, limit))
        return self._decide(number, _verdict([Call.from_json(self._store.get(key)) for key in keys]))

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
        call = Call.from_json(self._store.get(f"{number}/{self._rank}")).name
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


def _verdict(calls: Sequence[Call]) -> str:
    names = [call.name for call in calls]
    if len(set(names)) > 1:
        listed = _by_rank(names)
        return (
            f"different:The ranks are out of step: they called different things.\n{listed}Call the same on all ranks."
        )
    differ = disagreement(names[0], [call.same for call in calls])
    return f"different:{differ}" if differ else f"{_GO}:{json.dumps([call.told for call in calls])}"


def _by_rank(values: Sequence[str]) -> str:
    """A line for each value, with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return "".join(f"  {_named(of_value)}: {value}\n" for value, of_value in ranks.items())


def _named(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:_MOST_NAMED]))
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed}{more}"
