"""What rank 0 dispatches: the batches of all ranks, step by step, and the position that goes with them."""

from __future__ import annotations

import abc
import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from lightning_resume.data import order
from lightning_resume.data.loader import ElasticLoader
from lightning_resume.data.position import Resumable

_STATES_KEPT = 16


class Producer(abc.ABC):
    """Rank 0's loader, asked for the batches of all ranks."""

    def __init__(self, loader: Any, world_size: int) -> None:
        self.loader, self.world_size = loader, world_size

    @property
    @abc.abstractmethod
    def start(self) -> order.OrderState | None:
        """Where the order stands that all ranks can count on from."""

    @abc.abstractmethod
    def begin(self) -> Iterator[Sequence[Any]]:
        """What is left of the epoch: for each step a batch of each rank."""

    @abc.abstractmethod
    def next_epoch(self) -> None: ...
    @abc.abstractmethod
    def set_epoch(self, epoch: int) -> None: ...
    @abc.abstractmethod
    def state(self, behind: int) -> dict[str, Any]: ...
    @abc.abstractmethod
    def load(self, state: Mapping[str, Any], *, ended: bool) -> None: ...
    @abc.abstractmethod
    def state_of_loader(self, state: Mapping[str, Any]) -> Mapping[str, Any]: ...
    def remember(self, batches: int) -> None:
        """Says how far :meth:`state` will at most be asked to go back."""


@final
class Elastic(Producer):
    """Cuts each step as ranks that load for themselves would."""

    loader: ElasticLoader

    def __init__(self, loader: ElasticLoader, world_size: int) -> None:
        super().__init__(loader, world_size)
        loader.make_for_all(world_size)

    @property
    def start(self) -> order.OrderState | None:
        return self.loader._start if self.loader.is_sized else None

    def begin(self) -> Iterator[Sequence[Any]]:
        return self.loader._open()

    def next_epoch(self) -> None:
        self.loader._next_epoch()

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def state(self, behind: int) -> dict[str, Any]:
        # whether an iteration has ended is the dispatching loader's to say
        return {**self.loader.state_dict(behind), "ended": False}

    def load(self, state: Mapping[str, Any], *, ended: bool) -> None:
        self.loader.load_state_dict(state)

    def state_of_loader(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return state


@final
class InTurn(Producer):
    """Gives the batches of any loader to the ranks in turn; those at the end that are too few open the next epoch.

    A state is the loader's, as it was after the last whole step, and how many epochs have ended since.
    """

    def __init__(self, loader: Resumable, world_size: int) -> None:
        super().__init__(loader, world_size)
        self._states: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=_STATES_KEPT)
        self._ended = False
        self._behind = 0
        """Epochs that have ended, whose last batches the loader still has to give."""
        self._left: list[Any] | None = None
        """Batches of ended epochs that made no step; ``None`` after a load, which has to read them again."""

    @property
    def start(self) -> None:
        return None

    def remember(self, batches: int) -> None:
        self.loader.remember(batches)
        self._states = collections.deque(self._states, maxlen=max(batches + 1, _STATES_KEPT))

    def begin(self) -> Iterator[Sequence[Any]]:
        last = self.state(0)
        self._states.clear()
        self._behind = 0
        if not last["epochs"]:
            batches = self.loader._open()
            self._note()
            return self._in_turn([], batches)
        self._states.append(last)
        if self._left is None:
            self._behind = last["epochs"]
            return self._in_turn([], self._read_again())
        self.loader._next_epoch()
        return self._in_turn(self._left, self.loader._open())

    def _read_again(self) -> Iterator[Any]:
        """What is left of epochs that have ended, then the epoch that it opens."""
        while self._behind:
            yield from self.loader._open()
            self.loader._next_epoch()
            self._behind -= 1
        yield from self.loader._open()

    def _in_turn(self, step: list[Any], batches: Iterator[Any]) -> Iterator[Sequence[Any]]:
        for batch in batches:
            step.append(batch)
            if len(step) == self.world_size:
                self._note()
                yield step
                step = []
        self._left, self._ended = step, True

    def _note(self) -> None:
        self._states.append({"loader": self.loader.state_dict(), "epochs": self._behind})

    def next_epoch(self) -> None:
        if self._ended:
            last = self._states.pop()
            self._states.append({**last, "epochs": last["epochs"] + 1})
        else:  # given up
            for _ in range(self._behind + 1):
                self.loader._next_epoch()
            self._states.clear()
            self._left, self._behind = None, 0
        self._ended = False

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)
        self._states.clear()
        self._left, self._ended, self._behind = None, False, 0

    def state(self, behind: int) -> dict[str, Any]:
        if not self._states:
            return {"loader": self.loader.state_dict(), "epochs": 0}
        if behind >= len(self._states):
            raise RuntimeError(
                f"The position {behind} batches ago is no longer known: only the last {len(self._states) - 1} are kept."
                " Save where the optimizer has just stepped."
            )
        return dict(self._states[-1 - behind])

    def load(self, state: Mapping[str, Any], *, ended: bool) -> None:
        self.loader.load_state_dict(state["loader"])
        self._states.clear()
        self._states.append(state)
        self._left, self._ended, self._behind = None, ended, state["epochs"]

    def state_of_loader(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return state["loader"]  # type: ignore[no-any-return]
