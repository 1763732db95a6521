"""Where indices come from: the elastic permutation, or the user's own sampler, replayed."""

from __future__ import annotations

import abc
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_resume.data import order
from lightning_resume.data.randomness import Batch, RandomStream, Request
from lightning_resume.errors import CheckpointMismatchError

UNSIZED = 1 << 62
"""The length that stands for a sampler without one."""


class Source(abc.ABC):
    """Gives the samples at positions of an epoch."""

    length: int
    kind: str
    """What a checkpoint is compared by: another kind is another order."""
    resume_cost: str
    state_size: str
    """Both as in :class:`~lightning_resume.data.capabilities.Capabilities`."""
    shuffle = False
    lazy = False
    """Whether ``length`` takes reading, so that it is asked for only when it is needed."""

    @abc.abstractmethod
    def take(self, state: order.OrderState, start: int, stop: int) -> Sequence[Request]:
        """The samples at positions ``[start, stop)`` of the epoch that ``state`` is in."""

    def length_of(self, epoch: int) -> int:
        """The length of a certain epoch."""
        return self.length

    def plan(self, *, readers: int, batch_size: int) -> None:
        """Is told, before the first sample of a new run, how many processes will read and in batches of what size."""

    def visit(self, starts: Sequence[int], *, steps_apart: int, batch: int) -> None:
        """Is told, before an iteration, which positions a process takes: ``batch`` from ``starts`` on, again and again.

        Args:
            starts: Where it begins, now and in epochs to come.
            steps_apart: Positions from one of its batches to the next.
            batch: Positions that follow each other.
        """

    def facts(self) -> Mapping[str, Any]:
        """What the order depends on beside the :class:`~lightning_resume.data.order.OrderState`, by argument."""
        return {}

    def agree(self, *, fresh: bool) -> None:
        """Takes rank 0's view of what ranks may see differently: files. A collective.

        ``fresh`` says that no position depends on it yet.
        """

    def reseed(self, seed: int) -> None:
        """Is told another seed, before the first sample of a new run."""

    def check(self, state: Mapping[str, Any], saved: order.OrderState, current: order.OrderState) -> None:
        """Raises :class:`CheckpointMismatchError` when ``state`` belongs to other samples; changes nothing."""
        for field, advice in _SAMPLES.items():
            if getattr(saved, field) != getattr(current, field):
                raise CheckpointMismatchError(
                    "loader",
                    field,
                    saved=getattr(saved, field),
                    current=getattr(current, field),
                    advice=f"{advice} (`fabric.load(..., strict=False)` leaves this loader's position out.)",
                )

    def state_dict(self) -> dict[str, Any]:
        """What the positions need beside the :class:`~lightning_resume.data.order.OrderState`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], *, seed: int) -> None:
        """Restores what :meth:`state_dict` returned; ``seed`` is the saved one."""

    def hint(self, state: Mapping[str, Any]) -> None:
        """Is told a state that may be loaded later: nothing may change but what it saves from being read."""

    def grow(self, epoch: int) -> bool:
        """Takes in, from ``epoch`` on, what has come since the state was saved; whether there was anything."""
        return False


_SAMPLES = {
    "length": "The dataset has another number of samples: use the one that the run was started with.",
    "fingerprint": "This is another dataset: use the one that the run was started with.",
}


class Permuted(Source):
    """All samples of a dataset once an epoch, in the elastic order or (``shuffle=False``) as they lie."""

    resume_cost = "O(1)"
    state_size = "O(1)"

    def __init__(self, length: int, *, shuffle: bool) -> None:
        self.length, self.shuffle = length, shuffle
        self.kind = "shuffled" if shuffle else "sequential"

    def take(self, state: order.OrderState, start: int, stop: int) -> Batch:
        indices: list[int] = order.indices(state, start, stop).tolist()
        if start >= 0 and stop <= self.length:
            return Batch(indices, [state.epoch] * len(indices), indices)
        return Batch(indices, [state.epoch + position // self.length for position in range(start, stop)], indices)


class Replayed(Source):
    """The user's own sampler: what it draws in an epoch is a function of the epoch and its state at the epoch's start.

    Its draws from the global generators come from a stream keyed by seed and epoch; generators that it holds itself
    (``torch.Generator``, ``numpy.random.Generator``, ``random.Random``) and its ``state_dict``, if it has one, are
    remembered as they were at the epoch's start. To continue at position ``n`` costs drawing ``n`` indices, no data.
    """

    resume_cost = "draws the indices of the epoch again, no data"
    state_size = "that of the sampler's generators"

    def __init__(self, sampler: Iterable[Any], seed: int, *, length: int) -> None:
        self.sampler, self.seed, self.length = sampler, seed, length
        self.sized = length < UNSIZED
        self.kind = f"sampler {type(sampler).__qualname__}"
        self._epoch: int | None = None
        self._position = 0
        self._drawn: Iterator[Any] = iter(())
        self._at_epoch_start: dict[str, Any] = {}
        self._previous_at_start: dict[int, dict[str, Any]] = {}

    def take(self, state: order.OrderState, start: int, stop: int) -> list[Request]:
        if start < 0 < stop:  # what an earlier epoch left over comes first
            return self.take(state, start, 0) + self.take(state, 0, stop)
        epoch, offset = state.epoch + start // self.length, start % self.length
        if epoch != self._epoch or offset < self._position:
            self._begin(epoch)
        self._draw(offset - self._position)
        room = min(stop - start, self.length - offset)
        requests = [Request(index, epoch, offset + i) for i, index in enumerate(self._draw(room))]
        return requests + (self.take(state, start + room, stop) if start + room < stop else [])

    def _begin(self, epoch: int) -> None:
        self._finish_epochs_before(epoch)
        if epoch in self._previous_at_start:
            _restore_generators(self.sampler, self._previous_at_start[epoch])
        self._at_epoch_start = _generators_of(self.sampler)
        self._previous_at_start = {
            e: s for e, s in {**self._previous_at_start, epoch: self._at_epoch_start}.items() if e >= epoch - 1
        }
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        self._stream = RandomStream("sampler", self.seed, epoch)
        with self._stream():
            self._drawn = iter(self.sampler)
        self._epoch, self._position = epoch, 0

    def _finish_epochs_before(self, epoch: int) -> None:
        # the sampler's own generators must stand where a whole epoch leaves them, however much of it was used
        if self._epoch is None and epoch - 1 in self._previous_at_start and epoch not in self._previous_at_start:
            self._begin(epoch - 1)
        if self._epoch is not None and self._epoch < epoch and self.sized:
            self._draw(self.length - self._position)

    def _draw(self, count: int) -> list[Any]:
        drawn: list[Any] = []
        if count:
            with self._stream():
                for index in self._drawn:
                    drawn.append(index)
                    if len(drawn) == count:
                        break
        self._position += len(drawn)
        return drawn  # fewer than asked for, where a sampler without a length has come to its end

    def reseed(self, seed: int) -> None:
        self.seed = seed

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": {str(epoch): state for epoch, state in self._previous_at_start.items()}}

    def load_state_dict(self, state: Mapping[str, Any], *, seed: int) -> None:
        self.seed = seed
        self._previous_at_start = {int(epoch): dict(saved) for epoch, saved in state.get("sampler", {}).items()}
        self._epoch = None


def _generators_of(sampler: Any) -> dict[str, Any]:
    """The states of the generators that ``sampler`` holds in its attributes, and its own ``state_dict``."""
    states: dict[str, Any] = {}
    for name, value in getattr(sampler, "__dict__", {}).items():
        if isinstance(value, torch.Generator):
            states[name] = value.get_state()
        elif isinstance(value, np.random.Generator):
            states[name] = dict(value.bit_generator.state)
        elif isinstance(value, random.Random):
            version, key, gauss = value.getstate()
            states[name] = [version, list(key), gauss]
    if callable(getattr(sampler, "state_dict", None)) and callable(getattr(sampler, "load_state_dict", None)):
        states["state_dict()"] = sampler.state_dict()
    return states


def _restore_generators(sampler: Any, states: Mapping[str, Any]) -> None:
    for name, state in states.items():
        if name == "state_dict()":
            sampler.load_state_dict(state)
            continue
        value = getattr(sampler, name)
        if isinstance(value, torch.Generator):
            value.set_state(state)
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = state
        else:
            value.setstate((state[0], tuple(state[1]), state[2]))
