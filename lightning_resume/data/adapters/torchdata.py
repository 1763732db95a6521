"""torchdata's ``StatefulDataLoader`` over a dataset that saves its own position."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, final

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_resume.data.adapters.iterable import KEEPS_ITS_STATE, keyed_copy, shut_down
from lightning_resume.data.adapters.protocol import LoaderAdapter, is_from, skipped
from lightning_resume.data.randomness import EpochCell, is_stateful, keyed_seed


@final
class StatefulDataLoaderAdapter(LoaderAdapter):
    """Goes on by the loader's own ``state_dict``, which holds the dataset's of every worker.

    Only where the dataset has a state of its own. A map-style dataset without one gets the elastic order, as in a plain
    ``DataLoader``: exact at any topology, in O(1). An iterable dataset without one is read again by us, since torchdata
    0.11 counts twice what it has read again.
    """

    kind = "StatefulDataLoader"
    capabilities = KEEPS_ITS_STATE
    goes_on_after_its_end = True

    def __init__(self, loader: Any, **run: Any) -> None:
        super().__init__(loader, **run)
        self._epoch = EpochCell()
        self.engine, self._keyed = keyed_copy(loader, self.seed, self._epoch)

    @classmethod
    def matches(cls, loader: Any) -> bool:
        if not is_from(loader, "torchdata", "StatefulDataLoader"):
            return False
        dataset = loader.dataset
        return is_stateful(dataset) or (isinstance(dataset, IterableDataset) and is_stateful(iter(dataset)))

    def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
        self._epoch.set(epoch)
        set_epoch = getattr(self.engine.sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        if state is not None:
            self.engine.load_state_dict(state)
        elif epoch == 0:
            _seed_generators(self.engine.sampler, keyed_seed("sampler", self.seed))
        return skipped(iter(self.engine), 0 if state is not None else skip)

    def capture(self) -> Any:
        return copy.deepcopy(self.engine.state_dict())

    def reseed(self, seed: int) -> None:
        self.seed = self._keyed.seed = seed

    def shut_down(self) -> None:
        shut_down(self.engine)


def _seed_generators(sampler: object, seed: int) -> None:
    """Makes a sampler's order a function of ``seed``: torchdata's draws a seed of its own when it is made."""
    for value in getattr(sampler, "__dict__", {}).values():
        if isinstance(value, torch.Generator):
            value.manual_seed(seed)


def without_state(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A plain ``DataLoader`` like ``loader``, whose position we know ourselves: it takes no snapshot of every step.

    A class that the user has derived from ``StatefulDataLoader`` may iterate in its own way, and stays.
    """
    if type(loader).__module__.partition(".")[0] != "torchdata":
        return loader
    batched = loader.batch_sampler is not None
    batches = {"batch_sampler": loader.batch_sampler} if batched else {"batch_size": None, "sampler": loader.sampler}
    return DataLoader(loader.dataset, **batches, **{name: getattr(loader, name) for name in _OPTIONS})


_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)
