"""Random numbers of a sample: keyed by seed, epoch and sample, whatever the worker, world size or resume.

A sampler asks for a sample with a :class:`Request`; :class:`KeyedDataset` seeds the generators from it before it asks
the user's dataset, :class:`KeyedCollate` does the same for each batch. Both run wherever the batch is made: in the main
process or in a worker.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    get_worker_info,
)

from lightning_resume.data.fingerprint import is_hugging_face
from lightning_resume.data.sample_rng import Key, making, now_making
from lightning_resume.state import rng


class Request(NamedTuple):
    """One sample to fetch: ``index`` into the dataset, and what its random numbers are keyed by."""

    index: Any
    epoch: int
    key: Any


@final
class Batch(Sequence[Request]):
    """The samples of a batch, as columns: made, and pickled for a worker, in a fraction of the time of tuples.

    Args:
        indices: Of the samples.
        epochs: Of each.
        keys: What the random numbers of each are keyed by.
        positions: How many positions of the order it takes, by default one for each sample.
    """

    __slots__ = ("epochs", "indices", "keys", "positions")

    def __init__(self, indices: list[Any], epochs: list[int], keys: list[Any], positions: int | None = None) -> None:
        self.indices, self.epochs, self.keys = indices, epochs, keys
        self.positions = len(indices) if positions is None else positions

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Batch:
        if isinstance(requests, Batch):
            return requests
        indices, epochs, keys = map(list, zip(*requests, strict=True)) if requests else ([], [], [])
        return cls(indices, epochs, keys)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, n: Any) -> Any:
        if isinstance(n, slice):
            return Batch(self.indices[n], self.epochs[n], self.keys[n])
        return Request(self.indices[n], self.epochs[n], self.keys[n])

    def __iter__(self) -> Iterator[Request]:
        return map(Request, self.indices, self.epochs, self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return Batch, (self.indices, self.epochs, self.keys)


def keyed_seed(*parts: object) -> int:
    """A 63-bit seed from a hash of ``parts``: sums of seed, epoch and index would alias."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class KeyedDataset(Dataset[Any]):
    """Fetches samples of ``dataset`` with random numbers keyed by seed, epoch and sample."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self._draws = not draws_nothing(dataset)
        self._first: Request | None = None

    def __getitem__(self, request: Request) -> Any:
        self._first = request
        if not self._draws:
            return self.dataset[request.index]
        with making():
            self._seeds(Batch.of([request]))(0)
            return self.dataset[request.index]

    def __getitems__(self, batch: Batch) -> Any:
        self._first = batch[0] if batch else None
        if not self._draws:
            dataset = self.dataset
            return [dataset[index] for index in batch.indices]
        with making():
            return fetch(self.dataset, batch.indices, self._seeds(batch))

    @property
    def batch_key(self) -> int:
        """What the batch is keyed by whose samples were fetched last."""
        first = self._first  # none of a batch without samples
        return keyed_seed("batch", self.seed, *(() if first is None else (first.epoch, first.key)))

    def _seeds(self, batch: Batch) -> SampleSeeds:
        return SampleSeeds([("sample", self.seed, *of) for of in zip(batch.epochs, batch.keys, strict=True)])


def draws_nothing(code: Any) -> bool:
    """Whether ``code``, a dataset or ``collate_fn``, is known to draw no random numbers, so that none need be seeded.

    Of anything that a user may have written it is not known.
    """
    if type(code) is Subset:
        return draws_nothing(code.dataset)
    if type(code) is ConcatDataset:
        return all(map(draws_nothing, code.datasets))
    return type(code) is TensorDataset or code is default_collate or code is default_convert


@final
class SampleSeeds:
    """Seeds the random number generators for the n-th of some samples, when it is called."""

    def __init__(self, keys: Sequence[Key]) -> None:
        # together: what samples do between them pushes the code of this out of the processor's caches
        self._keys, self._seeds = keys, [keyed_seed(*key) for key in keys]

    def __call__(self, n: int) -> None:
        key = self._keys[n]
        rng.seed_all(self._seeds[n])
        now_making(key, (key,))

    def batch(self) -> None:
        """Seeds them for all samples at once, by the first."""
        rng.seed_all(self._seeds[0])
        now_making(("samples", *self._keys[0]), self._keys)

    def part(self, numbers: Sequence[int]) -> SampleSeeds:
        """The seeds of some of the samples."""
        return SampleSeeds([self._keys[n] for n in numbers])


def fetch(dataset: Any, indices: Sequence[Any], seeds: SampleSeeds) -> Any:
    """The samples at ``indices`` of any dataset, with the random numbers that ``seeds`` gives each of them."""
    fetch_keyed = getattr(dataset, "fetch_keyed", None)
    if callable(fetch_keyed):  # our own: fetches the batch at once, and asks for each sample's random numbers
        return fetch_keyed(indices, seeds)
    if _fetches_batches(dataset):
        seeds.batch()
        return dataset.__getitems__(list(indices))
    samples = []
    for n, index in enumerate(indices):
        seeds(n)
        samples.append(dataset[index])
    return samples


def _fetches_batches(dataset: Any) -> bool:
    # Subset offers __getitems__ but only loops, and asking it one by one keeps the samples' keys apart
    return not isinstance(dataset, Subset) and bool(getattr(dataset, "__getitems__", None))


def keys_each_sample(dataset: Any) -> bool:
    """Whether each sample gets random numbers of its own: not where the dataset makes a batch of them at once.

    Hugging Face's gives its transform the whole batch, and draws nothing where it has none.
    """
    own = getattr(dataset, "keys_each_sample", None)
    if isinstance(own, bool):
        return own
    if callable(getattr(dataset, "fetch_keyed", None)) or not _fetches_batches(dataset):
        return True
    return is_hugging_face(dataset) and dataset.format["type"] != "custom"


class KeyedCollate:
    """Runs the user's ``collate_fn`` with random numbers keyed by the batch."""

    def __init__(self, collate_fn: Callable[[Any], Any], dataset: KeyedDataset | KeyedIterable) -> None:
        self.collate_fn, self.dataset = collate_fn, dataset

    def __call__(self, samples: Any) -> Any:
        if draws_nothing(self.collate_fn):
            return self.collate_fn(samples)
        rng.seed_all(self.dataset.batch_key)
        with making():
            now_making(("collate", self.dataset.batch_key))
            return self.collate_fn(samples)


class StepDataset(KeyedDataset):
    """Makes the batches of all ranks for a step: one batch of this dataset is a list of them, collated already."""

    def __init__(self, keyed: KeyedDataset, collate: Callable[[Any], Any], *, batched: bool) -> None:
        super().__init__(keyed.dataset, keyed.seed)
        self._keyed, self._collate, self._batched = keyed, collate, batched

    def __getitems__(self, requests: Sequence[Any]) -> list[Any]:
        return [
            self._collate(self._keyed.__getitems__(of_rank) if self._batched else self._keyed[of_rank[0]])
            for of_rank in requests
        ]


def as_it_is(batch: Any) -> Any:
    return batch


class EpochCell:
    """The epoch, readable in workers that were started in an earlier one (``persistent_workers``)."""

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def __int__(self) -> int:
        return int(self._value)

    def set(self, epoch: int) -> None:
        self._value.fill_(epoch)


class EpochKeyedDataset(KeyedDataset):
    """A :class:`KeyedDataset` that is asked for plain indices; the epoch comes from ``epoch``."""

    def __init__(self, dataset: Any, seed: int, epoch: EpochCell) -> None:
        super().__init__(dataset, seed)
        self.epoch = epoch

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(Request(index, int(self.epoch), index))

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        return super().__getitems__(Batch(list(indices), [int(self.epoch)] * len(indices), list(indices)))

    def __getattr__(self, name: str) -> Any:
        if name in ("state_dict", "load_state_dict"):  # so that a stateful dataset still looks like one
            return getattr(self.dataset, name)
        raise AttributeError(name)


class KeyedIterable(IterableDataset[Any]):
    """Iterates over ``dataset`` with random numbers keyed by seed, epoch, worker and count of items.

    In the process that iterates, ``live`` is the latest iterator: its state is the position in the data.
    """

    def __init__(self, dataset: Iterable[Any], seed: int, epoch: EpochCell) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch
        self.batch_key = 0
        self._live: weakref.ref[KeyedIterator] | None = None
        self.pending: Mapping[str, Any] | None = None
        self.reads_again = False
        """Whether the dataset's own state is left alone, because it does not tell the position."""

    @property
    def live(self) -> KeyedIterator | None:
        """The latest iterator, if it is still in use; held weakly, so that what it has opened is closed after use.

        (Hugging Face's threads wait for themselves where the garbage collector closes their iterator in one of them.)
        """
        return None if self._live is None else self._live()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}

    def __iter__(self) -> KeyedIterator:
        live = KeyedIterator(self)
        self._live = weakref.ref(live)
        if not self.reads_again and (is_stateful(self.dataset) or is_stateful(live.inner)):
            # made anew it would call iter(dataset) again, which may already have used up a position set by the user
            live.__class__ = StatefulKeyedIterator
            if self.pending is not None:
                live.load_state_dict(self.pending)  # type: ignore[attr-defined]
                self.pending = None
        return live

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # a TypeError is what is expected of an unsized dataset


class KeyedIterator(Iterator[Any]):
    """One pass over a :class:`KeyedIterable`."""

    def __init__(self, owner: KeyedIterable) -> None:
        self.owner, self.count = owner, 0
        self.loaded: Mapping[str, Any] | None = None
        info = get_worker_info()
        self.worker = 0 if info is None else info.id
        key = ("iter", owner.seed, int(owner.epoch), self.worker)
        rng.seed_all(keyed_seed(*key))
        with making():
            now_making(key)
            self.inner: Any = iter(owner.dataset)

    def __next__(self) -> Any:
        self.count += 1
        self.loaded = None
        key = ("item", self.owner.seed, int(self.owner.epoch), self.worker, self.count)
        self.owner.batch_key = keyed_seed("batch", *key)
        rng.seed_all(keyed_seed(*key))
        with making():
            now_making(key)
            return next(self.inner)


class StatefulKeyedIterator(KeyedIterator):
    """One pass over a dataset that saves and loads its position, itself or through its iterator."""

    def state_dict(self) -> dict[str, Any]:
        if self.loaded is not None:  # one that is a generator takes its state in at the first item only
            return dict(self.loaded)
        dataset: Any = self.owner.dataset
        source = dataset if is_stateful(dataset) else self.inner
        return {"count": self.count, "source": copy.deepcopy(source.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.loaded = state["count"], state
        dataset: Any = self.owner.dataset
        if is_stateful(dataset):
            dataset.load_state_dict(state["source"])
            self.inner = iter(dataset)
        else:
            self.inner.load_state_dict(state["source"])


def is_stateful(obj: object) -> bool:
    return callable(getattr(obj, "state_dict", None)) and callable(getattr(obj, "load_state_dict", None))


def show_user_dataset(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    """Runs the user's ``worker_init_fn`` with ``get_worker_info().dataset`` being the user's own dataset."""
    info = get_worker_info()
    assert info is not None
    if isinstance(info.dataset, (KeyedDataset, KeyedIterable)):
        object.__setattr__(info, "dataset", info.dataset.dataset)  # WorkerInfo refuses ordinary assignment
    if worker_init_fn is not None:
        worker_init_fn(worker_id)


def worker_init(worker_init_fn: Callable[[int], None] | None) -> Callable[[int], None]:
    return functools.partial(show_user_dataset, worker_init_fn)


class RandomStream:
    """Random numbers of its own for code that draws from the global generators, keyed by ``parts``.

    Enter it around each piece of that code: the stream goes on where it was, the outside notices nothing.
    """

    def __init__(self, *parts: object) -> None:
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        self._numpy: tuple[Any, rng.Leftover] = np.random.MT19937(0), (0, 0.0)
        with self():
            rng.seed_all(keyed_seed(*parts))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        python, torch_cpu, numpy = random.getstate(), torch.get_rng_state(), rng.swap_numpy(*self._numpy)
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        try:
            yield
        finally:
            self._python, self._torch, self._numpy = random.getstate(), torch.get_rng_state(), rng.swap_numpy(*numpy)
            random.setstate(python)
            torch.set_rng_state(torch_cpu)
