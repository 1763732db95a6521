"""Datasets, samplers and loaders of every kind whose samples show where every random number came from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, Subset, WeightedRandomSampler
from torch.utils.data import get_worker_info as worker
from torchdata.stateful_dataloader import StatefulDataLoader

LENGTH = 14
BATCH = 4


def draw() -> float:
    """One number from the generators of Python, NumPy and torch together."""
    return random.random() + float(np.random.rand()) + float(torch.rand((), dtype=torch.float64))


def reseed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def global_rng() -> tuple[Any, ...]:
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )


class Noisy(Dataset[Any]):
    """Each sample is its index and a random augmentation."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.tensor(draw(), dtype=torch.float64)


class NoisyBatches(Noisy):
    """Fetches a whole batch at once, as many real datasets do."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


class CountsItsSamples(Noisy):
    """A map-style dataset with a state of its own, which its samples show."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched = 0

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        self.fetched += 1
        return index, torch.tensor(draw() + self.fetched, dtype=torch.float64)

    def state_dict(self) -> dict[str, int]:
        return {"fetched": self.fetched}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.fetched = state_dict["fetched"]


class Plain(IterableDataset[Any]):
    """Has no position; divides its items over the workers."""

    def __iter__(self) -> Iterator[Any]:
        info = worker()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        for i in range(start, LENGTH, step):
            yield i, torch.tensor(draw(), dtype=torch.float64)


class Stateful(IterableDataset[Any]):
    """Knows its position, and has no length."""

    def __init__(self) -> None:
        self.position = self.start = 0

    def __iter__(self) -> Iterator[Any]:
        self.position, self.start = self.start, 0
        return self._items()

    def _items(self) -> Iterator[Any]:
        while self.position < LENGTH:
            self.position += 1
            yield self.position - 1, torch.tensor(draw(), dtype=torch.float64)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.start = state_dict["position"]


class OwnGenerator(Sampler[int]):
    """A permutation from a generator of its own, which goes on from epoch to epoch."""

    def __init__(self, kind: str) -> None:
        self.generator: Any = {
            "torch": torch.Generator().manual_seed(5),
            "numpy": np.random.default_rng(5),
            "python": random.Random(5),
        }[kind]

    def __iter__(self) -> Iterator[int]:
        if isinstance(self.generator, torch.Generator):
            order = torch.randperm(LENGTH, generator=self.generator).tolist()
        elif isinstance(self.generator, random.Random):
            order = self.generator.sample(range(LENGTH), LENGTH)
        else:
            order = self.generator.permutation(LENGTH).tolist()
        return iter(order)

    def __len__(self) -> int:
        return LENGTH


class LazyGenerator(OwnGenerator):
    """Draws from its generator only as far as it is asked."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(LENGTH):
            yield int(self.generator.integers(LENGTH))


class GlobalRandom(Sampler[int]):
    """Draws from the global generators."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(LENGTH):
            yield random.randrange(LENGTH) if random.random() < 0.5 else int(np.random.randint(LENGTH))

    def __len__(self) -> int:
        return LENGTH


class CountingEpochs(Sampler[int]):
    """Another order in each epoch, by its own state."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter([(i * 3 + self.epoch) % LENGTH for i in range(LENGTH)])

    def __len__(self) -> int:
        return LENGTH

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.epoch = state_dict["epoch"]


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(8)
        while True:
            yield from torch.randperm(LENGTH, generator=generator).tolist()


class Buckets(Sampler[list[int]]):
    """Batches of unequal size from a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(5)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.generator.permutation(LENGTH).tolist()
        return iter([order[:2], order[2:7], order[7:8], order[8:]])

    def __len__(self) -> int:
        return 4


class Reversing(DataLoader[Any]):
    """A user's loader that changes each batch on its way out."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for index, value in super().__iter__():
            yield index.flip(0), value


class Batches:
    """Any iterable over batches."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(4):
            yield torch.tensor([i, draw()], dtype=torch.float64)


class StatefulBatches(Batches):
    """An iterable that knows its position."""

    def __init__(self) -> None:
        self.position = self.start = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.position, self.start = self.start, 0
        return self._items()

    def _items(self) -> Iterator[torch.Tensor]:
        while self.position < 4:
            self.position += 1
            yield torch.tensor([self.position, draw()], dtype=torch.float64)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.start = state_dict["position"]


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(Noisy(), BATCH, shuffle=True),
    "sequential": lambda: DataLoader(Noisy(), BATCH),
    "drop last": lambda: DataLoader(Noisy(), BATCH, shuffle=True, drop_last=True),
    "one sample": lambda: DataLoader(Noisy(), shuffle=True),
    "one batch": lambda: DataLoader(Noisy(), LENGTH, shuffle=True),
    "no batches": lambda: DataLoader(Noisy(), batch_size=None, shuffle=True),
    "fetches batches": lambda: DataLoader(NoisyBatches(), BATCH, shuffle=True),
    "subset": lambda: DataLoader(Subset(Noisy(20), range(3, 17)), BATCH, shuffle=True),
    "seeded generator": lambda: DataLoader(Noisy(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(4)),
    "persistent workers": lambda: DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2, persistent_workers=True),
    "no batches, workers": lambda: DataLoader(Noisy(4), batch_size=None, shuffle=True, num_workers=2),
    "weighted sampler": lambda: DataLoader(Noisy(), BATCH, sampler=WeightedRandomSampler([1.0, 2.0] * 7, LENGTH)),
    "weighted sampler, more": lambda: DataLoader(Noisy(), BATCH, sampler=WeightedRandomSampler([1.0] * LENGTH, 18)),
    "weighted sampler, workers": lambda: DataLoader(
        Noisy(), BATCH, sampler=WeightedRandomSampler([1.0, 2.0] * 7, LENGTH), num_workers=2
    ),
    "sampler with torch's generator": lambda: DataLoader(Noisy(), BATCH, sampler=OwnGenerator("torch")),
    "sampler with numpy's generator": lambda: DataLoader(Noisy(), BATCH, sampler=OwnGenerator("numpy")),
    "sampler with python's generator": lambda: DataLoader(Noisy(), BATCH, sampler=OwnGenerator("python")),
    "sampler that draws lazily": lambda: DataLoader(Noisy(), BATCH, sampler=LazyGenerator("numpy")),
    "sampler, drop last": lambda: DataLoader(Noisy(), BATCH, sampler=LazyGenerator("numpy"), drop_last=True),
    "sampler on global generators": lambda: DataLoader(Noisy(), BATCH, sampler=GlobalRandom()),
    "stateful sampler": lambda: DataLoader(Noisy(), BATCH, sampler=CountingEpochs()),
    "list as sampler": lambda: DataLoader(Noisy(), BATCH, sampler=[3, 1, 4, 1, 5, 9, 2, 6]),
    "batch sampler": lambda: DataLoader(Noisy(), batch_sampler=Buckets()),
    "torch's batch sampler": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(OwnGenerator("numpy"), BATCH, drop_last=False)
    ),
    "list of batches": lambda: DataLoader(Noisy(), batch_sampler=[[3, 1], [4, 1, 5], [9]]),
    "subclass": lambda: Reversing(Noisy(), BATCH, shuffle=True),
    "iterable dataset": lambda: DataLoader(Plain(), BATCH),
    "iterable dataset, drop last": lambda: DataLoader(Plain(), BATCH, drop_last=True),
    "iterable dataset, no batches": lambda: DataLoader(Plain(), batch_size=None),
    "iterable dataset, persistent workers": lambda: DataLoader(Plain(), BATCH, num_workers=2, persistent_workers=True),
    "stateful iterable dataset": lambda: DataLoader(Stateful(), BATCH),
    "stateful iterable dataset, worker": lambda: DataLoader(Stateful(), BATCH, num_workers=1),
    "torchdata": lambda: StatefulDataLoader(Noisy(), BATCH, shuffle=True),
    "torchdata, sequential": lambda: StatefulDataLoader(Noisy(), BATCH),
    "torchdata, persistent workers": lambda: StatefulDataLoader(
        Noisy(), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "torchdata, iterable": lambda: StatefulDataLoader(Plain(), BATCH),
    "torchdata, iterable, worker": lambda: StatefulDataLoader(Plain(), BATCH, num_workers=1),
    "torchdata, stateful iterable": lambda: StatefulDataLoader(Stateful(), BATCH),
    "torchdata, stateful iterable, worker": lambda: StatefulDataLoader(Stateful(), BATCH, num_workers=1),
    "list of tensors": lambda: [torch.arange(4) + i for i in range(4)],
    "iterable": Batches,
    "stateful iterable": StatefulBatches,
}


def plain(batch: Any) -> Any:
    """A batch as lists of numbers, equal only for equal bits."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return [plain(part) for part in batch] if isinstance(batch, (list, tuple)) else batch
