"""Any iterable: its iterator's state is the position, or the count of what was taken."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, final

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_resume.data.adapters.protocol import READS_AGAIN, LoaderAdapter, skipped
from lightning_resume.data.randomness import (
    EpochCell,
    EpochKeyedDataset,
    KeyedCollate,
    KeyedIterable,
    StatefulKeyedIterator,
    is_stateful,
    keyed_seed,
    worker_init,
)

KEEPS_ITS_STATE = dataclasses.replace(READS_AGAIN, resume_cost="the dataset's own", state_size="the dataset's own")


@final
class IterableAdapter(LoaderAdapter):
    """An iterable that runs in this process, or a ``DataLoader`` without workers over an iterable dataset."""

    def __init__(self, loader: Any, *, reads_again: bool = False, **run: Any) -> None:
        super().__init__(loader, **run)
        self._epoch = EpochCell()
        self._batches: Iterable[Any]
        if isinstance(loader, DataLoader):
            self._batches, self._keyed = keyed_copy(loader, self.seed, self._epoch)
        else:
            self._batches = self._keyed = KeyedIterable(loader, self.seed, self._epoch)
        self._keyed.reads_again = reads_again
        self.kind = f"iterable {type(self._keyed.dataset).__qualname__}"
        saves = is_stateful(self._keyed.dataset) and not reads_again
        self.capabilities = KEEPS_ITS_STATE if saves else READS_AGAIN

    @classmethod
    def matches(cls, loader: Any) -> bool:
        return not isinstance(loader, DataLoader) or (
            isinstance(loader.dataset, IterableDataset) and not loader.num_workers
        )

    def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
        self._epoch.set(epoch)
        self._keyed.pending = state
        return skipped(iter(self._batches), 0 if state is not None else skip)

    def capture(self) -> Any:
        live = self._keyed.live
        return live.state_dict() if isinstance(live, StatefulKeyedIterator) else None

    def reseed(self, seed: int) -> None:
        self.seed = self._keyed.seed = seed


@final
class WorkersAdapter(LoaderAdapter):
    """A ``DataLoader`` over an iterable dataset in worker processes: batches are read again and skipped."""

    capabilities = READS_AGAIN

    def __init__(self, loader: DataLoader[Any], **run: Any) -> None:
        super().__init__(loader, **run)
        self._epoch = EpochCell()
        self.engine, self._keyed = keyed_copy(loader, self.seed, self._epoch)
        self.kind = f"iterable {type(self._keyed.dataset).__qualname__}"

    @classmethod
    def matches(cls, loader: Any) -> bool:
        return isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)

    def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
        self._epoch.set(epoch)
        return skipped(iter(self.engine), skip)

    def capture(self) -> Any:
        return None

    def reseed(self, seed: int) -> None:
        self.seed = self._keyed.seed = seed

    def shut_down(self) -> None:
        shut_down(self.engine)


def keyed_copy(loader: DataLoader[Any], seed: int, epoch: EpochCell, wrapper: Any = None) -> tuple[Any, Any]:
    """A private copy of ``loader`` and its dataset, wrapped so that random numbers are keyed by ``seed`` and epoch."""
    dataset: Any = loader.dataset
    if wrapper is None:
        wrapper = KeyedIterable if isinstance(dataset, IterableDataset) else EpochKeyedDataset
    keyed = wrapper(dataset, seed, epoch)
    engine = copy.copy(loader)
    # DataLoader refuses these assignments after construction; the copy has not been iterated over yet
    engine.__dict__.update(
        dataset=keyed,
        collate_fn=KeyedCollate(loader.collate_fn, keyed),
        worker_init_fn=worker_init(loader.worker_init_fn),
        generator=torch.Generator().manual_seed(keyed_seed("workers", seed)),
        _iterator=None,
    )
    return engine, keyed


def shut_down(engine: Any) -> None:
    """Ends the workers of a ``DataLoader``, if it has any."""
    if getattr(engine._iterator, "_shutdown_workers", None) is not None:
        engine._iterator._shutdown_workers()
    engine._iterator = None
