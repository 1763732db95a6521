"""Loaders whose order is not ours to give: iterable datasets, StatefulDataLoader, any iterable.

Their position is the state that they keep themselves, or, where they keep none, the number of batches taken: the same
batches are then read again and skipped. Either way it belongs to one topology.
"""

from __future__ import annotations

import abc
import collections
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_resume.data.capabilities import Capabilities, Change, Order, Randomness
from lightning_resume.data.position import Resumable
from lightning_resume.data.randomness import (
    EpochCell,
    EpochKeyedDataset,
    KeyedCollate,
    KeyedIterable,
    RandomStream,
    StatefulKeyedIterator,
    is_stateful,
    keyed_seed,
    worker_init,
)
from lightning_resume.state.component import Sharing

READS_AGAIN = Capabilities(
    world_size=Change.SAME,
    num_workers=Change.SAME,
    batch_size=Change.SAME,
    order=Order.TOPOLOGY,
    randomness=Randomness.POSITION,
    resume_cost="reads again what was read of the epoch",
    state_size="O(1)",
)
KEEPS_ITS_STATE = dataclasses.replace(READS_AGAIN, resume_cost="the dataset's own", state_size="the dataset's own")


class Engine(abc.ABC):
    """What batches of one pass come from."""

    kind: str
    capabilities: Capabilities
    goes_on_after_its_end = False
    """Whether the state captured at the end of an epoch leads into the next one by itself."""
    keyed: Any
    """The wrapped dataset whose ``seed`` keys the random numbers."""

    @abc.abstractmethod
    def iterate(self, epoch: int, inner: Any, skip: int) -> Iterator[Any]:
        """Starts a pass: from ``inner``, an earlier :meth:`capture`, or from its start, past ``skip`` batches."""

    @abc.abstractmethod
    def capture(self) -> Any:
        """The state after the batch handed out last, ``None`` where this engine keeps none."""

    def shut_down(self) -> None:
        """Ends worker processes."""


@final
class LiveEngine(Engine):
    """An iterable that runs in this process: its iterator's state is the position, or the count of what was taken."""

    def __init__(self, iterable: Iterable[Any], keyed: KeyedIterable, epoch: EpochCell) -> None:
        self.iterable, self.keyed, self.epoch = iterable, keyed, epoch
        self.kind = f"iterable {type(keyed.dataset).__qualname__}"
        self.capabilities = KEEPS_ITS_STATE if is_stateful(keyed.dataset) else READS_AGAIN

    def iterate(self, epoch: int, inner: Any, skip: int) -> Iterator[Any]:
        self.epoch.set(epoch)
        self.keyed.pending = inner
        batches = iter(self.iterable)
        for _ in range(0 if inner is not None else skip):
            next(batches)
        return batches

    def capture(self) -> Any:
        live = self.keyed.live
        return live.state_dict() if isinstance(live, StatefulKeyedIterator) else None


@final
class WorkersEngine(Engine):
    """A ``DataLoader`` over an iterable dataset in worker processes: batches are read again and skipped."""

    capabilities = READS_AGAIN

    def __init__(self, loader: DataLoader[Any], keyed: KeyedIterable, epoch: EpochCell) -> None:
        self.loader, self.keyed, self.epoch = loader, keyed, epoch
        self.kind = f"iterable {type(keyed.dataset).__qualname__}"

    def iterate(self, epoch: int, inner: Any, skip: int) -> Iterator[Any]:
        self.epoch.set(epoch)
        batches = iter(self.loader)
        for _ in range(skip):
            next(batches)
        return batches

    def capture(self) -> Any:
        return None

    def shut_down(self) -> None:
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self.loader._iterator = None


@final
class StatefulDataLoaderEngine(Engine):
    """A torchdata ``StatefulDataLoader``: its own ``state_dict``."""

    capabilities = KEEPS_ITS_STATE
    goes_on_after_its_end = True

    def __init__(self, loader: Any, keyed: Any, epoch: EpochCell) -> None:
        self.loader, self.keyed, self.epoch = loader, keyed, epoch
        self.kind = "StatefulDataLoader"

    def iterate(self, epoch: int, inner: Any, skip: int) -> Iterator[Any]:
        self.epoch.set(epoch)
        set_epoch = getattr(self.loader.sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        if inner is not None:
            self.loader.load_state_dict(inner)
        elif epoch == 0:
            _seed_generators(self.loader.sampler, keyed_seed("sampler", self.keyed.seed))
        return iter(self.loader)

    def capture(self) -> Any:
        return copy.deepcopy(self.loader.state_dict())

    def shut_down(self) -> None:
        if getattr(self.loader._iterator, "_shutdown_workers", None) is not None:
            self.loader._iterator._shutdown_workers()
        self.loader._iterator = None


class StreamLoader(Resumable):
    """A loader that goes on by its own state, or by reading again, at the topology that it was saved at."""

    sharing = Sharing.PER_RANK

    def attach(self, wrapped: Any, engine: Engine, *, seed: int, topology: Mapping[str, Any]) -> None:
        """Takes over from ``wrapped``."""
        self.__dict__.update(getattr(wrapped, "__dict__", {}))
        self._begin_attributes()
        self._wrapped, self._stream_engine, self._seed, self.topology = wrapped, engine, seed, topology
        self._epoch = self._skip = 0
        self._inner: Any = None
        self._done = self._ended_when_saved = self._exhausted = False
        self.remember(2)

    def __len__(self) -> int:
        return len(self._wrapped)

    @property
    def epoch(self) -> int:  # type: ignore[override]  # read only
        return self._epoch

    def remember(self, batches: int) -> None:
        """Keeps the states of so many batches, for ``state_dict(behind=...)``."""
        known = getattr(self, "_history", ())  # a batch that was fetched ahead is in it
        self._history: collections.deque[tuple[int, Any]] = collections.deque(known, maxlen=batches + 1)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._skip, self._inner = epoch, 0, None
            self._begin_attributes()

    def _at_end(self) -> bool:
        return self._done

    def _begun(self) -> bool:
        return self._skip > 0

    def _next_epoch(self) -> None:
        if self._resumed and self._inner is not None and not self._ended_when_saved:
            with RandomStream("stream", self._seed, self._epoch)():
                self._stream_engine.iterate(self._epoch, self._inner, self._skip)
            self._inner = None
        elif not self._resumed or not self._stream_engine.goes_on_after_its_end:
            self._inner = None
        self._epoch, self._skip, self._done = self._epoch + 1, 0, False

    def load_exhausted(self, state_dict: Mapping[str, Any]) -> None:
        super().load_exhausted(state_dict)
        self._exhausted = True

    def _batches(self) -> Iterator[Any]:
        if self._exhausted:
            self._exhausted, self._done = False, True
            return
        stream = RandomStream("stream", self._seed, self._epoch)
        with stream():
            batches = self._stream_engine.iterate(self._epoch, self._inner, self._skip)
            self._history.append((0, self._inner))
        while True:
            with stream():
                try:
                    batch = next(batches)
                except StopIteration:
                    self._done = True
                    self._handed_out()
                    return
            yield batch

    def _opened(self) -> None:
        self._history.clear()

    def _handed_out(self) -> None:
        self._history.append((self._taken, self._stream_engine.capture()))

    def _state(self, behind: int) -> dict[str, Any]:
        taken = self._taken - behind
        states = dict(self._history) if self._history else {0: self._inner}
        if taken not in states:
            raise RuntimeError(
                f"The position {behind} batches ago is no longer known: only the last {len(states) - 1} are kept."
                " Save where the optimizer has just stepped."
            )
        return {
            "kind": self._kind(),
            "seed": self._seed,
            "epoch": self._epoch,
            "batches": self._skip + taken,
            "inner": states[taken],
            "fixed": self._fixed(),
        }

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        self._seed, self._epoch = state_dict["seed"], state_dict["epoch"]
        self._skip, self._inner, self._done = state_dict["batches"], state_dict["inner"], False
        self._ended_when_saved = state_dict["ended"]
        self._history.clear()
        self._stream_engine.shut_down()
        self._stream_engine.keyed.seed = self._seed

    def _kind(self) -> str:
        return self._stream_engine.kind

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # read only
        return self._stream_engine.capabilities

    @property
    def _iterator(self) -> Any:
        return getattr(getattr(self._stream_engine, "loader", None), "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._stream_engine.shut_down()


@final
class ResumableIterable(StreamLoader):
    """Stands in for an iterable that is no ``DataLoader``; its attributes are the iterable's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_wrapped":
            raise AttributeError(name)
        return getattr(self._wrapped, name)


def keyed_engine_of(loader: DataLoader[Any], seed: int, *, stateful_dataloader: bool) -> Engine:
    """The engine for ``loader``, a ``DataLoader`` over an iterable dataset or a ``StatefulDataLoader``."""
    epoch = EpochCell()
    engine = copy.copy(loader)
    iterable = isinstance(loader.dataset, IterableDataset)
    dataset: Any = loader.dataset
    keyed = KeyedIterable(dataset, seed, epoch) if iterable else EpochKeyedDataset(dataset, seed, epoch)
    engine.__dict__.update(
        dataset=keyed,
        collate_fn=KeyedCollate(loader.collate_fn, keyed),
        worker_init_fn=worker_init(loader.worker_init_fn),
        generator=_seeded(keyed_seed("workers", seed)),
        _iterator=None,
    )
    # what keeps no state, StatefulDataLoader reads again, but counts twice (torchdata 0.11): the second resume is off
    if stateful_dataloader and (not iterable or is_stateful(dataset) or is_stateful(iter(dataset))):
        return StatefulDataLoaderEngine(engine, keyed, epoch)
    assert isinstance(keyed, KeyedIterable)
    return WorkersEngine(engine, keyed, epoch) if loader.num_workers else LiveEngine(engine, keyed, epoch)


def iterable_engine_of(iterable: Iterable[Any], seed: int) -> Engine:
    """The engine for any iterable that makes its batches in this process."""
    epoch = EpochCell()
    keyed = KeyedIterable(iterable, seed, epoch)
    return LiveEngine(keyed, keyed, epoch)


def _seed_generators(sampler: object, seed: int) -> None:
    """Makes a sampler's order a function of ``seed``: torchdata's draws a seed of its own when it is made."""
    for value in getattr(sampler, "__dict__", {}).values():
        if isinstance(value, torch.Generator):
            value.manual_seed(seed)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
