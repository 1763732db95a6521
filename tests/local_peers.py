"""Ranks of one process that agree as those of a process group do: while one waits for the others, these run.

Each rank's step runs in a thread, one at a time: the one that holds the lock of the condition.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any


class LocalRanks:
    """Runs something on every rank; ``peers(rank)`` is what the loaders of the rank ask the others with."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._turn = threading.Condition()
        self._told: dict[tuple[int, int], Any] = {}
        self._calls = [0] * world_size
        self._failed = False

    def peers(self, rank: int) -> LocalPeers:
        return LocalPeers(self, rank)

    def run(self, work: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each rank's ``work`` returns; raises what the first one raised."""
        results: list[Any] = [None] * len(work)
        errors: list[BaseException] = []

        def of_rank(rank: int) -> None:
            with self._turn:
                try:
                    results[rank] = work[rank]()
                except BaseException as error:
                    errors.append(error)
                    self._failed = True
                    self._turn.notify_all()

        threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._failed = False
        if errors:
            raise errors[0]
        return results

    def exchange(self, rank: int, value: Any) -> list[Any]:
        call = self._calls[rank]
        self._calls[rank] += 1
        self._told[call, rank] = value
        self._turn.notify_all()
        everyone = [(call, other) for other in range(self.world_size)]
        self._turn.wait_for(lambda: self._failed or all(key in self._told for key in everyone), timeout=60)
        assert all(key in self._told for key in everyone), f"rank {rank} waits for others, which do not call"
        return [self._told[key] for key in everyone]


class LocalPeers:
    """One rank's view of the others."""

    def __init__(self, ranks: LocalRanks, rank: int) -> None:
        self._ranks, self._rank = ranks, rank

    def smallest(self, value: int) -> int:
        return int(min(self._ranks.exchange(self._rank, value)))

    def gather(self, value: Any) -> list[Any]:
        return self._ranks.exchange(self._rank, value)
