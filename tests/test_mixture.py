"""Mixtures of datasets by weight: exact counts, each dataset in its own epochs, the same order at any topology."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from lightning_resume import (
    CheckpointMismatchError,
    Mixture,
    ResumableSingleDeviceStrategy,
    ShardedDataset,
    Tail,
    make_resumable,
)
from lightning_resume.data import order
from lightning_resume.data.mixture import Blocks, shares_of
from lightning_resume.data.source import Permuted
from tests.simulated_ranks import stored
from tests.toy_data import draw, plain
from tests.toy_shards import TOTAL, write_parquet

SIZES = (7, 20, 1)
WEIGHTS = (0.25, 0.7, 0.05)


class Part(Dataset[Any]):
    """Each sample is its dataset's number, its index and a random augmentation."""

    def __init__(self, number: int, length: int) -> None:
        self.number, self.length = number, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.number, index, torch.tensor(draw(), dtype=torch.float64)


class Batched(Part):
    """Notes what it is asked for at once."""

    asked: list[list[int]]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.asked.append(indices)
        return [self[index] for index in indices]


class Own(Part):
    """Has an order of its own: backwards, shuffled or not."""

    class Backwards(Permuted):
        def take(self, state: order.OrderState, start: int, stop: int) -> Any:
            requests = super().take(state, start, stop)
            return [request._replace(index=self.length - 1 - request.index) for request in requests]

    def order_source(self, *, shuffle: bool) -> Any:
        return self.Backwards(self.length, shuffle=shuffle)


def mixture(sizes: Sequence[int] = SIZES, weights: Any = WEIGHTS, **options: Any) -> Mixture:
    return Mixture([Part(number, size) for number, size in enumerate(sizes)], weights, **options)


def loader(of: Mixture, batch_size: int = 4, *, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    tail = options.pop("tail", None)
    made = DataLoader(of, batch_size, **{"shuffle": True, **options})
    return make_resumable(made, rank=rank, world_size=world_size, seed=3, tail=tail, shared=True)


def samples(batches: Any) -> list[tuple[Any, ...]]:
    """(dataset, index, random number) of each sample."""
    return [sample for batch in batches for sample in zip(*plain(batch), strict=True)]


def epochs(of: Mixture, count: int, **options: Any) -> list[list[tuple[Any, ...]]]:
    made = loader(of, **options)
    return [samples(made) for _ in range(count)]


# -- counts


@pytest.mark.parametrize(
    ("weights", "block"),
    [((0.7, 0.2, 0.1), 10), ((0.7, 0.2, 0.1), None), ((2, 1), 3), ((0.125, 0.875), None), ((1, 0, 3), 8)],
)
def test_every_block_holds_each_weight_exactly(weights: tuple[float, ...], block: int | None) -> None:
    of = mixture([50] * len(weights), weights, length=20_000, block_size=block)
    drawn = [dataset for dataset, _ in requests(of, 0, 20_000)]
    size, total = of.blocks.size, sum(Fraction(str(weight)) for weight in weights)
    for start in range(0, 20_000 - size + 1, size):
        counts = np.bincount(drawn[start : start + size], minlength=len(weights))
        assert counts.tolist() == [Fraction(str(weight)) / total * size for weight in weights]


def requests(of: Mixture, start: int, stop: int, *, shuffle: bool = True, epoch: int = 0) -> list[Any]:
    state = order.OrderState(seed=3, length=len(of), epoch=epoch)
    return [request.index for request in of.order_source(shuffle=shuffle).take(state, start, stop)]


@settings(max_examples=60, derandomize=True)
@given(
    st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-9),
    st.integers(0, 10**12),
    st.integers(1, 2000),
)
def test_no_weight_drifts_however_long_the_run(weights: list[float], block: int, length: int) -> None:
    shares = shares_of(weights, [1] * len(weights))
    blocks = Blocks(shares, None, length=length)
    largest = shares.index(max(shares))
    before, after = blocks.before(block), blocks.before(block + 1)
    assert sum(before) == block * blocks.size
    for dataset, (share, count, later) in enumerate(zip(shares, before, after, strict=True)):
        bound = Fraction(len(shares) - 1 if dataset == largest else 1, 2)
        assert abs(count - share * block * blocks.size) <= bound
        assert later >= count


def test_the_places_within_a_block_are_shuffled_and_differ_from_block_to_block() -> None:
    of = mixture((50, 50), (1, 1), length=4000, block_size=100)
    places = np.array([dataset for dataset, _ in requests(of, 0, 4000)]).reshape(40, 100)
    assert len({tuple(row) for row in places.tolist()}) == 40
    runs = (places[:, 1:] == places[:, :-1]).mean()
    assert 0.44 < runs < 0.56  # of neighbours, a little under half are of the same dataset
    assert places.mean(axis=0).std() < 0.13  # no place is kept for one dataset


def test_a_tiny_weight_comes_as_often_as_it_should() -> None:
    of = mixture((10**6, 5), (1, 1e-4), length=10**5, block_size=500)
    found = [position for position, (dataset, _) in enumerate(requests(of, 0, 10**5)) if dataset == 1]
    assert len(found) == 10
    assert 9_000 < min(np.diff(found)) <= max(np.diff(found)) < 11_000


def test_a_dataset_of_weight_0_is_not_used() -> None:
    of = mixture((5, 0, 5), (1, 0, 0.0), length=50)
    assert {dataset for dataset, _ in requests(of, 0, 50)} == {0}


# -- each dataset's own order


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_dataset_comes_in_epochs_of_its_own_over_those_of_the_mixture(shuffle: bool) -> None:
    of = mixture(length=33)
    drawn = [sample for epoch in epochs(of, 5, shuffle=shuffle) for sample in epoch]
    assert len(drawn) == 5 * 33
    for number, size in enumerate(SIZES):
        mine = [index for dataset, index, _ in drawn if dataset == number]
        passes = [mine[start : start + size] for start in range(0, len(mine) - size + 1, size)]
        assert passes
        assert all(sorted(one) == list(range(size)) for one in passes)
        if not shuffle:
            assert all(one == list(range(size)) for one in passes)
        elif size > 6:
            assert len({tuple(one) for one in passes}) == len(passes) > 1


def test_equal_datasets_come_in_different_orders() -> None:
    of = mixture((30, 30), (1, 1), length=60)
    (drawn,) = epochs(of, 1)
    one, other = ([index for dataset, index, _ in drawn if dataset == number] for number in range(2))
    assert one != other


@pytest.mark.parametrize(("stop", "expected"), [(None, 10), ("first_exhausted", 10), ("all_exhausted", 40)])
def test_an_epoch_ends_as_asked(stop: Any, expected: int) -> None:
    of = Mixture([Part(0, 8), Part(1, 8), Part(2, 0)], [0.8, 0.2, 0], stop=stop, block_size=5)
    assert len(of) == expected
    assert len(set(requests(of, 0, expected))) == (10 if expected == 10 else 16)


def test_by_default_every_sample_weighs_the_same() -> None:
    of = mixture((6, 18), None)
    assert len(of) == 24
    assert len(set(requests(of, 0, 24))) == 24


def test_a_dataset_with_an_order_of_its_own_keeps_it() -> None:
    of = Mixture([Own(0, 5), Part(1, 5)], [1, 1])
    drawn = samples(loader(of, shuffle=False))
    assert [index for dataset, index, _ in drawn if dataset == 0] == [4, 3, 2, 1, 0]
    assert [index for dataset, index, _ in drawn if dataset == 1] == [0, 1, 2, 3, 4]


def test_a_mixture_may_be_part_of_another() -> None:
    inner = mixture((4, 4), (1, 1))
    of = Mixture([inner, Part(2, 8)], [1, 1])
    (drawn,) = epochs(of, 1)
    assert len({sample[:2] for sample in drawn}) == len(drawn) == 16


# -- as a dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_an_ordinary_dataset_too(workers: int) -> None:
    of = mixture(length=30)
    by_itself = [tuple(sample[:2]) for sample in (of[index] for index in range(30))]
    assert [sample[:2] for sample in samples(DataLoader(of, 4, num_workers=workers))] == by_itself
    assert [sample[:2] for sample in samples(loader(of, shuffle=False, num_workers=workers))] == by_itself
    assert of[-1][:2] == by_itself[-1]
    for outside in (30, -31):
        with pytest.raises(IndexError, match="outside a mixture of 30 samples"):
            of[outside]


def test_a_dataset_that_fetches_batches_is_asked_once_for_each() -> None:
    parts = [Batched(number, 6) for number in range(2)]
    for part in parts:
        part.asked = []
    drawn = samples(loader(Mixture(parts, [1, 1]), 6, shuffle=False))
    assert [sum(batch, []) for batch in (part.asked for part in parts)] == [[0, 1, 2, 3, 4, 5]] * 2  # noqa: RUF017
    assert all(len(part.asked) == 2 for part in parts)
    assert sorted(sample[:2] for sample in drawn) == [(number, index) for number in range(2) for index in range(6)]


# -- resuming


def test_it_resumes_exactly_from_every_batch_whatever_the_workers() -> None:
    of = mixture(length=18)
    whole = loader(of)
    seen: list[Any] = []
    states = []
    for epoch in range(3):
        for batch in whole:
            seen.append((epoch, plain(batch)))
            states.append((epoch, stored(whole.state_dict())))
    for taken, (epoch, state) in enumerate(states, 1):
        again = loader(mixture(length=18), num_workers=2 if taken == 3 else 0)
        again.load_state_dict(state)
        assert [(n, plain(batch)) for n in range(epoch, 3) for batch in again] == seen[taken:]


Chain = list[tuple[int, int, int]]


@settings(max_examples=25, derandomize=True)
@given(
    chain=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=4),
    tail=st.sampled_from([Tail.EVEN, Tail.CARRY]),
)
def test_the_order_is_the_same_under_any_chain_of_topologies(chain: Chain, tail: Tail) -> None:
    assert under(chain, tail) == under([], tail)


def under(chain: Chain, tail: Tail) -> list[tuple[Any, ...]]:
    """The samples of two epochs in global order: some steps at each (world size, batch size), the rest at (2, 3)."""
    state, seen, ended = None, [], 0
    for world_size, batch_size, steps in [*chain, (2, 3, 10**6)]:
        ranks = [
            loader(mixture(length=23), batch_size, rank=rank, world_size=world_size, tail=tail)
            for rank in range(world_size)
        ]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(stored(state))
        while ended < 3 and steps:  # under EVEN samples may be left over to the third
            for batches in zip(*ranks, strict=True):
                seen += samples(batches)
                steps -= 1
                if steps == 0:
                    break
            else:
                ended += 1
        state = ranks[0].state_dict()
    return seen[:46]


def test_a_samples_random_numbers_are_keyed_by_its_dataset_and_that_ones_epoch() -> None:
    drawn = [sample for epoch in epochs(mixture(length=20, block_size=20), 4) for sample in epoch]
    assert len({value for _, _, value in drawn}) == len(drawn)
    longer = [sample for epoch in epochs(mixture(length=40, block_size=20), 2, batch_size=7) for sample in epoch]
    assert longer == drawn  # the mixture's own epochs and batches do not matter


def test_huge_datasets_cost_nothing_to_begin() -> None:
    of = Mixture([Part(0, 10**15), Part(1, 3 * 10**14)], [0.5, 0.5], stop="all_exhausted")
    assert len(of) == 2 * 10**15
    made = loader(of)
    state = made.state_dict()
    state["order"].update(consumed=10**15 + 17, batches=5)
    made.load_state_dict(state)
    datasets, indices, _ = plain(next(iter(made)))
    assert set(datasets) == {0, 1}
    assert max(indices) > 10**13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sizes": (7, 21, 1)},
            r"not the same dataset 1 of the mixture.\n  saved: +Part of 20 samples\n  current: Part of 21",
        ),
        ({"weights": (0.25, 0.6, 0.15)}, r"not the same weights.\n.*'7/10'.*\n.*'3/5'"),
        ({"sizes": (7, 20), "weights": (1, 2)}, r"not the same number of datasets in the mixture.\n  saved:   3"),
        ({"seed": 1}, "not the same seed of the mixture"),
        ({"block_size": 2000}, "not the same block_size of the mixture"),
        ({"length": 12}, "not the same length"),
    ],
)
def test_another_mixture_is_refused_before_anything_changes(change: dict[str, Any], message: str) -> None:
    saved = loader(mixture(length=30))
    next(iter(saved))
    other = loader(mixture(**{"length": 30, **change}))
    before = stored(other.state_dict())
    with pytest.raises(CheckpointMismatchError, match=message):
        other.load_state_dict(saved.state_dict())
    assert other.state_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1, 2)}, "3 datasets and 2 weights"),
        ({"weights": (1, -1, 1)}, "weight 1 is -1"),
        ({"weights": (1, math.nan, 1)}, "weight 1 is nan"),
        ({"weights": (1, math.inf, 1)}, "weight 1 is inf"),
        ({"weights": (0, 0, 0.0)}, "All weights are 0"),
        ({"sizes": (3, 0, 3)}, "dataset 1 has no samples"),
        ({"sizes": (), "weights": ()}, "There are 0 datasets"),
        ({"length": 0}, "a length of at least 1"),
        ({"length": 5, "stop": "all_exhausted"}, "pass one of them"),
        ({"stop": "never"}, "stop is 'never'"),
        ({"block_size": 3}, "block_size is 3, but these weights need 20"),
        ({"sizes": [1] * 2000, "weights": [1 + n * 1e-9 for n in range(2000)]}, r"2000 datasets .* Round the weights"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(**options)


def test_fabric_goes_on_with_a_mixture(tmp_path: Any) -> None:
    def run() -> tuple[L.Fabric, dict[str, Any]]:
        fabric = L.Fabric(accelerator="cpu", devices=1, strategy=ResumableSingleDeviceStrategy())
        model, optimizer = fabric.setup(net := torch.nn.Linear(1, 1), torch.optim.SGD(net.parameters(), 0.1))
        made = fabric.setup_dataloaders(DataLoader(mixture(length=20), 4, shuffle=True))
        return fabric, {"model": model, "optimizer": optimizer, "loader": made}

    L.seed_everything(1, verbose=False)
    fabric, state = run()
    batches = iter(state["loader"])
    for _ in range(2):
        next(batches)
        state["optimizer"].step()
    fabric.save(tmp_path / "checkpoint", state)
    expected = samples(batches)

    fabric, state = run()
    fabric.load(tmp_path / "checkpoint", state)
    assert samples(state["loader"]) == expected


def test_sharded_files_are_part_of_a_mixture(tmp_path: Any) -> None:
    write_parquet(tmp_path)

    def made() -> Any:
        sharded = ShardedDataset.from_path(tmp_path, columns=["id"], transform=number_of)
        return loader(Mixture([sharded, Part(1, 30)], [0.5, 0.5], stop="all_exhausted"), 8)

    whole = made()
    seen, states = [], []
    for batch in whole:
        seen.append(plain(batch))
        states.append(stored(whole.state_dict()))
    drawn = samples(seen)
    assert {index for dataset, index, _ in drawn if dataset == 0} == set(range(TOTAL))
    assert len({value for _, _, value in drawn}) == len(drawn)
    for taken in (1, len(seen) // 2, len(seen)):
        again = made()
        again.load_state_dict(states[taken - 1])
        assert list(map(plain, again)) == seen[taken:]


def number_of(row: Any) -> Any:
    return 0, row["id"], torch.tensor(draw(), dtype=torch.float64)
