"""torchdata's StatefulDataLoader: what it gets wrong by itself, and that it does not with us."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from lightning_resume import CheckpointMismatchError, make_resumable
from lightning_resume.data.capabilities import Change
from lightning_resume.data.loader import ElasticLoader
from lightning_resume.errors import UnsafeResumeWarning
from tests.replay import (
    assert_replays_from_every_batch,
    lost_and_repeated,
    plain,
    resumable,
    stored,
)
from tests.toy_data import Noisy, draw, reseed

LENGTH = 22


class Counted(IterableDataset[Any]):
    """Every worker of every rank has its own items, a state, and random numbers."""

    def __init__(self, rank: int = 0, world_size: int = 1, length: int = LENGTH) -> None:
        self.rank, self.world_size, self.length = rank, world_size, length
        self.taken = self.start = 0

    def __iter__(self) -> Iterator[Any]:
        self.taken, self.start = self.start, 0
        info = get_worker_info()
        share, shares = (0, 1) if info is None else (info.id, info.num_workers)
        return self._items(self.rank * shares + share, self.world_size * shares)

    def _items(self, share: int, shares: int) -> Iterator[Any]:
        for index in range(share + self.taken * shares, self.length, shares):
            self.taken += 1
            yield index, torch.tensor(draw(), dtype=torch.float64)

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["taken"]


class Stateless(Counted):
    """The same without a state, which torchdata reads again."""

    state_dict = load_state_dict = None  # type: ignore[assignment]


class Remembering(Noisy):
    """A map-style dataset with a state: a number that grows with every sample, and that samples show."""

    fetched = 0

    def __getitem__(self, index: int) -> Any:
        self.fetched += 1
        return index, torch.tensor(self.fetched)

    def state_dict(self) -> dict[str, int]:
        return {"fetched": self.fetched}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.fetched = state["fetched"]


DATASETS: dict[str, Any] = {
    "map": lambda *_: Noisy(LENGTH),
    "map, stateful": lambda *_: Remembering(LENGTH),
    "iterable, stateful": Counted,
    "iterable, stateless": Stateless,
}


def make(
    rank: int = 0, world_size: int = 1, num_workers: int = 0, batch_size: int = 3, *, data: str, **options: Any
) -> Any:
    if data.startswith("map"):
        options = {"shuffle": True, **options}
    dataset = DATASETS[data](rank, world_size)
    return StatefulDataLoader(dataset, batch_size, num_workers=num_workers, **options)


@pytest.mark.parametrize("data", ["iterable, stateful", "map, stateful"])
def test_a_snapshot_every_few_steps_is_exact_too(data: str) -> None:
    assert_replays_from_every_batch(lambda: make(num_workers=1, data=data, snapshot_every_n_steps=3))


def test_a_map_style_dataset_gets_the_elastic_order() -> None:
    loader = make_resumable(make(data="map"))
    assert isinstance(loader, ElasticLoader)
    assert isinstance(loader, StatefulDataLoader)
    assert loader.capabilities.elastic


def samples(batches: Any) -> list[Any]:
    return [
        (index, value) for indices, values in map(plain, batches) for index, value in zip(indices, values, strict=True)
    ]


def test_a_map_style_dataset_goes_on_at_another_topology() -> None:
    whole = samples(make_resumable(make(data="map"), seed=3))
    before = [
        make_resumable(make(rank, 2, 1, data="map"), rank=rank, world_size=2, seed=3, shared=True) for rank in (0, 1)
    ]
    taken = [samples(itertools.islice(loader, 2)) for loader in before]
    after = resumable(lambda: make(num_workers=2, batch_size=5, data="map"), stored(before[1].state_dict()))
    seen = [pair for rank in taken for pair in rank]
    assert sorted(seen) == sorted(whole[:12])
    assert samples(after) == whole[12:]


def test_ranks_agree_on_the_order_although_torchdata_seeds_each_by_itself() -> None:
    seen = []
    for rank in (0, 1):
        loader = resumable(lambda: make(data="map"), seed=5, rank=rank, world_size=2, shared=True)
        seen += [index for indices, _ in map(plain, loader) for index in indices]
    assert sorted(seen) == list(range(LENGTH))


@pytest.mark.parametrize("sampler", [DistributedSampler, StatefulDistributedSampler])
def test_a_distributed_sampler_is_one_order_over_the_ranks(sampler: Any) -> None:
    seen = []
    for rank in (0, 1):
        order = sampler(Noisy(LENGTH), num_replicas=2, rank=rank, shuffle=True)
        loader = make_resumable(make(data="map", shuffle=None, sampler=order), rank=rank, world_size=2)
        assert loader.capabilities.elastic
        seen += [index for indices, _ in map(plain, loader) for index in indices]
    assert sorted(seen) == list(range(LENGTH))


# -- what it gets wrong by itself


def test_stock_fails_bare_at_other_workers_and_we_say_what_to_do() -> None:
    stock = make(num_workers=2, data="iterable, stateful")
    next(iter(stock))
    other = make(num_workers=1, data="iterable, stateful")
    other.load_state_dict(stock.state_dict())
    with pytest.raises(AssertionError):
        next(iter(other))
    ours = make_resumable(make(num_workers=2, data="iterable, stateful"))
    next(iter(ours))
    with pytest.raises(CheckpointMismatchError, match=r"not the same num_workers(.|\n)*saved: +2\n +current: 1"):
        make_resumable(make(num_workers=1, data="iterable, stateful")).load_state_dict(ours.state_dict())
    stock._iterator._shutdown_workers()  # left to the garbage collector, torchdata waits 5 s for each
    ours._iterator = None


def test_stock_loses_samples_at_another_world_size_and_we_refuse() -> None:
    expected, seen = range(LENGTH), []
    state: Any = None
    for rank in (0, 1):
        stock = make(rank, 2, data="iterable, stateful")
        seen += [index for indices, _ in map(plain, itertools.islice(stock, 2)) for index in indices]
        state = stock.state_dict()
    alone = make(data="iterable, stateful")
    alone.load_state_dict(state)
    seen += [index for indices, _ in map(plain, alone) for index in indices]
    assert lost_and_repeated(seen, expected) != (0, 0)

    ours = make_resumable(make(1, 2, data="iterable, stateful"), rank=1, world_size=2)
    next(iter(ours))
    other = make_resumable(make(data="iterable, stateful"))
    with pytest.raises(CheckpointMismatchError, match="not the same world_size"):
        other.load_state_dict(ours.state_dict())
    untouched = [index for indices, _ in map(plain, other) for index in indices]
    assert untouched == list(range(LENGTH))


def test_stock_does_not_bring_back_the_workers_random_numbers() -> None:
    stock = make(num_workers=1, data="iterable, stateful")
    reseed(1)
    batches = iter(stock)
    next(batches)
    state = stock.state_dict()
    rest = [plain(batch) for batch in batches]
    again = make(num_workers=1, data="iterable, stateful")
    reseed(2)
    again.load_state_dict(state)
    resumed = [plain(batch) for batch in again]
    assert [indices for indices, _ in resumed] == [indices for indices, _ in rest]
    assert resumed != rest


def test_stock_ignores_a_state_that_is_loaded_into_an_open_iterator_and_we_say_so() -> None:
    state = make(data="iterable, stateful").state_dict()
    stock = make(data="iterable, stateful")
    open_already = iter(stock)
    stock.load_state_dict(state)
    assert plain(next(open_already))[0] == [0, 1, 2]

    ours = make_resumable(make(data="iterable, stateful"))
    next(iter(ours))
    state = ours.state_dict()
    again = make_resumable(make(data="iterable, stateful"))
    open_already = iter(again)
    again.load_state_dict(state)
    with pytest.raises(RuntimeError, match="no longer the loader's position"):
        next(open_already)
    assert plain(next(iter(again)))[0] == [3, 4, 5]


def test_stock_skips_the_next_epoch_after_a_save_at_the_last_batch_and_we_do_not() -> None:
    stock = make(data="map", shuffle=False)
    batches = iter(stock)
    for _ in range(len(stock)):
        next(batches)
    again = make(data="map", shuffle=False)
    again.load_state_dict(stock.state_dict())
    assert list(again) == []

    ours = make_resumable(make(data="map", shuffle=False))
    batches = iter(ours)
    for _ in range(len(ours)):
        next(batches)
    again = resumable(lambda: make(data="map", shuffle=False), ours.state_dict())
    assert [len(list(again)), len(list(again))] == [0, len(ours)]
    again = resumable(lambda: make(data="map", shuffle=False))
    again.load_epoch_end(ours.state_dict())
    assert len(list(again)) == len(ours)


# -- strict=False

CHANGES = [
    {"num_workers": 0},
    {"num_workers": 1},
    {"batch_size": 4},
    {"num_workers": 1, "batch_size": 2},
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("data", ["iterable, stateful", "iterable, stateless"])
def test_with_strict_false_it_goes_on_and_warns(data: str, change: dict[str, int]) -> None:
    first = make_resumable(make(num_workers=2, data=data))
    batches = iter(first)
    seen = [index for indices, _ in map(plain, itertools.islice(batches, 3)) for index in indices]
    state = stored(first.state_dict())
    del batches, first
    other = make_resumable(make(**{"num_workers": 2, "data": data, **change}))  # type: ignore[arg-type]
    with pytest.raises(CheckpointMismatchError, match="strict=False"):
        other.load_state_dict(state)
    with pytest.warns(UnsafeResumeWarning, match="goes on"):
        other.load_state_dict(state, strict=False)
    seen += [index for indices, _ in map(plain, other) for index in indices]
    lost, repeated = lost_and_repeated(seen, range(LENGTH))
    # as many are skipped as were taken, down to a whole batch: not more can be wrong than that
    assert lost <= 9
    assert repeated <= 9 + change.get("batch_size", 3)
    assert len(seen) - LENGTH == repeated - lost


def test_strict_false_can_be_said_once_for_all_loads() -> None:
    first = make_resumable(make(num_workers=2, data="iterable, stateful"))
    next(iter(first))
    other = make_resumable(make(num_workers=1, data="iterable, stateful"), strict=False)
    with pytest.warns(UnsafeResumeWarning):
        other.load_state_dict(first.state_dict())
    with pytest.raises(CheckpointMismatchError):
        other.load_state_dict(first.state_dict(), strict=True)
    first._iterator = None


def test_it_declares_what_it_can_do() -> None:
    capabilities = make_resumable(make(data="iterable, stateful")).capabilities
    assert {capabilities.world_size, capabilities.num_workers, capabilities.batch_size} == {Change.SAME}
    assert capabilities.caution
