"""All ranks of a topology in one process, step by step: a training loop, stopped anywhere, resumed anywhere."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_resume.data.position import Resumable
from lightning_resume.data.scenarios import merged
from tests.replay import end

NOTHING = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """What may differ between two runs over the same data."""

    world_size: int = 1
    num_workers: int = 0
    batch_size: int = 4

    @property
    def step_size(self) -> int:
        """Samples in a step of all ranks."""
        return self.world_size * self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A moment of a run: steps taken so far, epochs ended so far, and every rank's state as a file gives it back."""

    taken: int
    ended: int
    states: Sequence[Any]

    def of_rank(self, rank: int) -> Any:
        """The state that a checkpoint has for ``rank`` of whatever world size (`run.saved_loader`)."""
        if "lanes" in self.states[0]:
            return dict(merged(self.states))
        return self.states[min(rank, len(self.states) - 1)]


class Ranks:
    """The ranks of one run, which take their steps together."""

    def __init__(self, loaders: Sequence[Resumable]) -> None:
        self.loaders = loaders
        self.taken = self.ended = 0
        self._open: list[Any] = []

    def __del__(self) -> None:
        for loader in self.loaders:
            end(loader)

    def load(self, point: Point) -> None:
        """Goes on from ``point``, on every rank."""
        for rank, loader in enumerate(self.loaders):
            loader.load_state_dict(point.of_rank(rank))
        self.taken, self.ended, self._open = point.taken, point.ended, []

    def step(self) -> list[Any] | None:
        """The next batch of every rank, ``None`` at the end of the epoch, after which the next one begins."""
        self._open = self._open or [iter(loader) for loader in self.loaders]
        batches = self._next()
        ended = [batch is NOTHING for batch in batches]
        assert all(ended) or not any(ended), f"some ranks have ended the epoch, others wait in a collective: {ended}"
        if all(ended):
            self.ended += 1
            self._open = []
            return None
        self.taken += 1
        return batches

    def _next(self) -> list[Any]:
        return [next(batches, NOTHING) for batches in self._open]

    def point(self, behind: int = 0) -> Point:
        """Where the run is, or was so many batches ago."""
        states = [stored(loader.state_dict(behind)) for loader in self.loaders]
        return Point(taken=self.taken - behind, ended=self.ended, states=states)


def stored(state: Mapping[str, Any]) -> Any:
    """``state`` as it comes back from a file that holds no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def bits(value: Any) -> Any:
    """``value`` as plain Python, equal only for equal bits."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), content
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.str, value.shape, value.tolist() if value.dtype.hasobject else value.tobytes()
    if isinstance(value, Mapping):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    if callable(getattr(value, "to_pydict", None)):  # an Arrow table or record batch
        return bits(value.to_pydict())
    return value.hex() if isinstance(value, float) else value
