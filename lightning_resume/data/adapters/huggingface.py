"""Hugging Face ``datasets.IterableDataset``, in any ``DataLoader`` or by itself.

A map-style ``datasets.Dataset`` needs no adapter: it gets the elastic order like any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, final

from torch.utils.data import DataLoader

from lightning_resume.data.adapters.iterable import IterableAdapter, WorkersAdapter
from lightning_resume.data.adapters.protocol import LoaderAdapter, is_from
from lightning_resume.data.adapters.torchdata import StatefulDataLoaderAdapter
from lightning_resume.data.capabilities import Capabilities, Randomness


@final
class IterableDatasetAdapter(LoaderAdapter):
    """Goes on by the dataset's own state where that is exact, and reads again where it is not.

    It is not exact after ``.shuffle``, whose buffer is in no state, and where a batched ``.map`` runs on tables. The
    epoch of a shuffled dataset is set for it (``set_epoch``), unless the user sets it.
    """

    kind = "Hugging Face IterableDataset"

    def __init__(self, loader: Any, **run: Any) -> None:
        super().__init__(loader, **run)
        self._dataset = _dataset_of(loader)
        steps = list(_steps(self._dataset._ex_iterable))
        self._shuffled = any(name == _BUFFER for name, _ in steps)
        self._inner = _adapter_of(loader, reads_again=not _tells_position(self._dataset, steps), run=run)
        self._steps = steps
        self._epoch_set = 0

    @classmethod
    def matches(cls, loader: Any) -> bool:
        return is_from(_dataset_of(loader), "datasets", "IterableDataset")

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # read only
        # read ahead in threads, or again within one sample on resume: what is drawn there depends on when
        own = any(name in _DRAWS_ANYWHERE for name, _ in self._steps)
        randomness = Randomness.OWN if own else self._inner.capabilities.randomness
        return dataclasses.replace(self._inner.capabilities, randomness=randomness)

    @property
    def engine(self) -> Any:
        """What Lightning looks at to shut workers down."""
        return getattr(self._inner, "engine", None)

    def topology(self) -> dict[str, Any]:
        node = self._dataset._distributed
        return {**super().topology(), "split_dataset_by_node": 1 if node is None else node.world_size}

    def fixed(self) -> dict[str, Any]:
        split = self.topology()["split_dataset_by_node"]
        return {**super().fixed(), "split_dataset_by_node": split, "position kept by": self._inner.kind.split()[0]}

    def identity(self) -> dict[str, Any]:
        steps = [f"{name}({_seed_of(step)})" for name, step in self._steps]
        return {"shards": self._dataset._ex_iterable.num_shards, "steps and seeds": " < ".join(steps)}

    def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
        if state is not None:
            self._set_epoch(state["epoch"])
        elif self._shuffled and self._dataset.epoch == self._epoch_set:
            self._set_epoch(epoch)
        inner = None if state is None else state["inner"]
        if inner is None:
            # a state that was once loaded stays in the dataset, and would be gone on from in every later epoch
            self._dataset.load_state_dict(None)
        return self._inner.iterate(epoch, inner, skip)

    def _set_epoch(self, epoch: int) -> None:
        self._dataset.set_epoch(epoch)
        self._epoch_set = epoch

    def capture(self) -> Any:
        return {"epoch": self._dataset.epoch, "inner": self._inner.capture()}

    def reseed(self, seed: int) -> None:
        self.seed = seed
        self._inner.reseed(seed)

    def shut_down(self) -> None:
        self._inner.shut_down()


def _dataset_of(loader: Any) -> Any:
    return loader.dataset if isinstance(loader, DataLoader) else loader


def _adapter_of(loader: Any, *, reads_again: bool, run: dict[str, Any]) -> LoaderAdapter:
    if not isinstance(loader, DataLoader):
        return IterableAdapter(loader, reads_again=reads_again, **run)
    # a worker that lives on would go on from the state that it once loaded in every later epoch
    if is_from(loader, "torchdata", "StatefulDataLoader") and not (reads_again or loader.persistent_workers):
        return StatefulDataLoaderAdapter(loader, **run)
    if loader.num_workers:
        return WorkersAdapter(loader, **run)
    return IterableAdapter(loader, reads_again=reads_again, **run)


_BUFFER = "BufferShuffledExamplesIterable"
_DRAWS_ANYWHERE = {
    "ExamplesIterable",
    "InterleavedShardsExamplesIterable",
    "CyclingMultiSourcesExamplesIterable",
    "RandomlyCyclingMultiSourcesExamplesIterable",
}


def _steps(iterable: Any) -> Iterator[tuple[str, Any]]:
    """The parts that a dataset was put together of, the last first, by the names of their classes."""
    yield type(iterable).__name__, iterable
    sources = getattr(iterable, "ex_iterables", None) or [getattr(iterable, "ex_iterable", None)]
    for source in sources:
        if source is not None:
            yield from _steps(source)


def _tells_position(dataset: Any, steps: list[tuple[str, Any]]) -> bool:
    """Whether the dataset's state says all that has to be known to go on."""
    tables = dataset._formatting is not None and dataset._formatting.is_table
    batched = any(getattr(step, "batched", False) for _, step in steps)
    return not any(name == _BUFFER for name, _ in steps) and not (tables and batched)


def _seed_of(step: Any) -> str:
    """What a step's random numbers begin with, as a hash; empty where it draws none."""
    generator = getattr(step, "generator", None)
    if generator is None:
        return ""
    return hashlib.blake2b(repr(generator.bit_generator.state).encode(), digest_size=4).hexdigest()
