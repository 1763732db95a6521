"""The conformance suite on mixtures and weighted samplers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_resume import Mixture, WeightedSampler, make_resumable
from tests.conformance import LoaderConformance
from tests.toy_data import LENGTH, Noisy


class TestMixture(LoaderConformance):
    length = LENGTH
    unique = False  # each dataset has epochs of its own

    def make(self, *, rank: int = 0, world_size: int = 1, num_workers: int = 0, batch_size: int = 4, seed: int = 3,
             folder: Path, prefetch_factor: int | None = None) -> Any:  # fmt: skip
        mixture = Mixture([Noisy(5), Noisy(20)], [0.3, 0.7], length=LENGTH)
        return loader(mixture, rank, world_size, num_workers, batch_size, seed, prefetch_factor, shuffle=True)

    def ids(self, batch: Any) -> list[int]:
        return batch[0].tolist()

    def noise(self, batch: Any) -> Any:
        return batch[1].tolist()


class TestWeightedSampler(TestMixture):
    workers = (0,)  # a sampler knows nothing of workers, and the mixture is tried with them

    def make(self, *, rank: int = 0, world_size: int = 1, num_workers: int = 0, batch_size: int = 4, seed: int = 3,
             folder: Path, prefetch_factor: int | None = None) -> Any:  # fmt: skip
        sampler = WeightedSampler([1.0, 2.0] * 7, LENGTH)
        return loader(Noisy(), rank, world_size, num_workers, batch_size, seed, prefetch_factor, sampler=sampler)


class TestWithoutReplacement(TestMixture):
    unique = True
    workers = (0,)

    def make(self, *, rank: int = 0, world_size: int = 1, num_workers: int = 0, batch_size: int = 4, seed: int = 3,
             folder: Path, prefetch_factor: int | None = None) -> Any:  # fmt: skip
        sampler = WeightedSampler([1.0, 2.0] * 7, LENGTH, replacement=False)
        return loader(Noisy(), rank, world_size, num_workers, batch_size, seed, prefetch_factor, sampler=sampler)


def loader(
    dataset: Any, rank: int, world_size: int, num_workers: int, batch_size: int, seed: int, prefetch: Any, **kwargs: Any
) -> Any:
    made = DataLoader(dataset, batch_size, num_workers=num_workers, prefetch_factor=prefetch, **kwargs)
    return make_resumable(made, rank=rank, world_size=world_size, seed=seed, shared=True)
