"""The conformance suite over torch's loaders, torchdata's, and plain iterables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_resume import ResumableDataLoader, make_resumable
from lightning_resume.data.order import Tail
from lightning_resume.data.position import Resumable
from tests.conformance import LoaderConformance
from tests.toy_data import (
    LENGTH,
    Batches,
    Buckets,
    CountingEpochs,
    CountsItsSamples,
    Endless,
    GlobalRandom,
    Noisy,
    NoisyBatches,
    OwnGenerator,
    Plain,
    Stateful,
    StatefulBatches,
)


class NoisyConformance(LoaderConformance):
    """Of a user's loader over samples that are an index and a random number."""

    length = LENGTH
    shared = True
    """Whether the ranks divide each step between them."""

    def user_loader(self, **options: Any) -> Iterable[Any]:
        raise NotImplementedError

    def make(
        self, *, folder: Path, rank: int = 0, world_size: int = 1, seed: int = 3, batch_size: int = 4, **options: Any
    ) -> Resumable:
        loader = self.user_loader(batch_size=batch_size, **options)
        return make_resumable(loader, rank=rank, world_size=world_size, seed=seed, tail=self.tail, shared=self.shared)

    def ids(self, batch: Any) -> list[int]:
        return batch[0].tolist()

    def noise(self, batch: Any) -> list[Any] | None:
        return batch[1].tolist()


class InProcess(NoisyConformance):
    """Of what is no different with workers, which take long to start."""

    workers: Sequence[int] = (0,)


# -- map-style, in our order


class TestShuffled(NoisyConformance):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), shuffle=True, **options)


class TestSequential(InProcess):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), **options)


class TestDropLast(InProcess):
    tail = Tail.DROP

    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), shuffle=True, drop_last=True, **options)


class TestCarry(InProcess):
    tail = Tail.CARRY

    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), shuffle=True, **options)


class TestOneSampleAtATime(InProcess):
    batch_sizes = (1,)  # a loader with batch_size=None makes no batches
    tail = Tail.CARRY  # one sample more on some ranks is one step more

    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), shuffle=True, **options | {"batch_size": None})

    def ids(self, batch: Any) -> list[int]:
        return [batch[0]]

    def noise(self, batch: Any) -> list[Any] | None:
        return [batch[1].item()]


class TestResumableDataLoader(InProcess):
    def make(self, *, folder: Path, seed: int = 3, batch_size: int = 4, **options: Any) -> Resumable:
        return ResumableDataLoader(Noisy(), batch_size, shuffle=True, seed=seed, **options)


class TestDatasetThatFetchesBatches(InProcess):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(NoisyBatches(), shuffle=True, **options)


# -- map-style, in the order of the user's sampler


class TestSampler(NoisyConformance):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), sampler=OwnGenerator("numpy"), **options)


class TestSamplerOfEachRank(InProcess):
    shared = False

    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), sampler=OwnGenerator("torch"), **options)


class TestSamplerOnGlobalGenerators(InProcess):
    unique = False

    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), sampler=GlobalRandom(), **options)


class TestStatefulSampler(InProcess):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), sampler=CountingEpochs(), **options)


class TestWeightedSampler(InProcess):
    unique = False
    length = 18

    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), sampler=WeightedRandomSampler([1.0, 2.0] * 7, self.length), **options)


class TestEndlessSampler(InProcess):
    length = None

    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), sampler=Endless(), **options)


class TestBatchSampler(NoisyConformance):
    def user_loader(self, *, batch_size: int, **options: Any) -> Iterable[Any]:
        return DataLoader(Noisy(), batch_sampler=Buckets(), **options)


# -- in an order of their own


class TestIterableDataset(NoisyConformance):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Plain(), **options)


class TestStatefulIterableDataset(InProcess):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return DataLoader(Stateful(), **options)


class TestTorchdata(NoisyConformance):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return StatefulDataLoader(Noisy(), shuffle=True, **options)


class TestTorchdataStatefulMap(NoisyConformance):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return StatefulDataLoader(CountsItsSamples(), shuffle=True, **options)


class TestTorchdataIterable(InProcess):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return StatefulDataLoader(Plain(), **options)


class TestTorchdataStatefulIterable(NoisyConformance):
    ends_alike = False  # torchdata notes whether a worker has met the end, which one with nothing left has not

    def user_loader(self, **options: Any) -> Iterable[Any]:
        return StatefulDataLoader(Stateful(), **options)


class TestIterable(InProcess):
    length = 4

    def user_loader(self, **options: Any) -> Iterable[Any]:
        return Batches()

    def ids(self, batch: Any) -> list[int]:
        return [int(batch[0])]

    def noise(self, batch: Any) -> list[Any] | None:
        return [batch[1].item()]


class TestStatefulIterable(TestIterable):
    def user_loader(self, **options: Any) -> Iterable[Any]:
        return StatefulBatches()
