"""Weighted sampling: the right distribution, the same order at any topology, and torch's own sampler beside it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, WeightedRandomSampler

from lightning_resume import CheckpointMismatchError, Tail, WeightedSampler, make_resumable
from lightning_resume.data.weighted import _exponential, uniform
from tests.simulated_ranks import stored
from tests.test_fabric_api import ranks  # noqa: F401  # the fixture
from tests.toy_data import LENGTH, Noisy, plain, reseed
from tests.toy_fabric import fabric, launch

WEIGHTS = [0.0, 5.0, 1.0, 0.0, *[2.0] * (LENGTH - 4)]
POSITIVE = [index for index, weight in enumerate(WEIGHTS) if weight]


def sampler(**options: Any) -> WeightedSampler:
    return WeightedSampler(**{"weights": WEIGHTS, "num_samples": 11, **options})


def loader(of: Any, batch_size: int = 2, *, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    made = DataLoader(Noisy(), batch_size, sampler=of, num_workers=options.pop("num_workers", 0))
    return make_resumable(made, rank=rank, world_size=world_size, **{"seed": 3, "shared": True, **options})


def samples(batches: Any) -> list[tuple[int, float]]:
    return [sample for batch in batches for sample in zip(*plain(batch), strict=True)]


def drawn(of: WeightedSampler, epochs: int, seed: int = 3) -> list[list[int]]:
    source = of.order_source()
    return [source.draw(seed, epoch, 0, of.num_samples).tolist() for epoch in range(epochs)]


# -- distribution


def chi_square(counts: Any, expected: Any) -> float:
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


def test_with_replacement_each_index_comes_by_its_weight() -> None:
    counts = Counter(drawn(sampler(num_samples=200_000), 1)[0])
    weights = np.array(WEIGHTS)[POSITIVE]
    assert set(counts) == set(POSITIVE)
    # 11 degrees of freedom: above 31.3 in one of a thousand
    assert chi_square([counts[index] for index in POSITIVE], weights / weights.sum() * 200_000) < 31.3


def test_neighbouring_draws_are_independent() -> None:
    (indices,) = drawn(WeightedSampler([1, 1, 1, 1], 160_000), 1)
    pairs = Counter(zip(indices[::2], indices[1::2], strict=True))
    assert len(pairs) == 16
    assert chi_square(list(pairs.values()), 5000) < 37.7  # 15 degrees of freedom


def test_without_replacement_the_first_draws_are_those_of_the_theory() -> None:
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    pairs = Counter(tuple(epoch[:2]) for epoch in drawn(WeightedSampler(weights, 4, replacement=False), 40_000))
    total = weights.sum()
    expected = {
        (first, second): weights[first] / total * weights[second] / (total - weights[first])
        for first in range(4)
        for second in range(4)
        if first != second
    }
    assert chi_square([pairs[pair] for pair in expected], 40_000 * np.array(list(expected.values()))) < 31.3


@pytest.mark.parametrize("num_samples", [1, 5, len(POSITIVE)])
def test_without_replacement_no_index_comes_twice(num_samples: int) -> None:
    for epoch in drawn(sampler(num_samples=num_samples, replacement=False), 50):
        assert len(set(epoch)) == len(epoch) == num_samples
        assert set(epoch) <= set(POSITIVE)


@pytest.mark.parametrize("replacement", [True, False])
def test_epochs_and_seeds_differ(replacement: bool) -> None:
    of = sampler(replacement=replacement)
    orders = [tuple(epoch) for seed in range(5) for epoch in drawn(of, 8, seed)]
    assert len(set(orders)) == 40
    # no epoch is another shifted: keys are hashes, not sums
    assert drawn(of, 2, 3)[1] != drawn(of, 1, 4)[0]


@pytest.mark.parametrize("weights", [[1e-300, 1e300], [5e-324] * 3, [1e308] * 3, [0, 0, 1], [1]])
@pytest.mark.parametrize("replacement", [True, False])
def test_extreme_weights_draw_what_has_one(weights: list[float], replacement: bool) -> None:
    possible = {index for index, weight in enumerate(weights) if weight}
    of = WeightedSampler(weights, len(possible), replacement=replacement)
    for epoch in drawn(of, 20):
        assert set(epoch) <= possible


def test_the_exponential_keys_are_logarithms_to_the_last_bits() -> None:
    numbers = np.concatenate([uniform(5, 0, 100_000), [0.0, 2.0**-53, 0.5, 1 - 2.0**-53]])
    exact = np.array([-math.log1p(-number) for number in numbers])
    assert np.abs(_exponential(numbers) - exact).max() < 8e-15
    assert np.abs(_exponential(numbers) / np.maximum(exact, 1e-300) - (exact > 0)).max() < 1e-15


def test_the_draws_are_the_same_in_every_version() -> None:
    """A change of these would let every run go on with other samples."""
    assert drawn(sampler(), 2) == [[6, 10, 1, 6, 11, 8, 9, 8, 13, 6, 4], [6, 6, 12, 13, 12, 2, 7, 11, 2, 1, 6]]
    assert drawn(sampler(replacement=False), 1) == [[12, 2, 10, 11, 1, 9, 13, 7, 5, 6, 4]]


# -- resuming


@pytest.mark.parametrize("replacement", [True, False])
def test_it_resumes_exactly_from_every_batch_whatever_the_workers(replacement: bool) -> None:
    whole = loader(sampler(replacement=replacement))
    seen, states = [], []
    for epoch in range(3):
        for batch in whole:
            seen.append(plain(batch))
            states.append((epoch, stored(whole.state_dict())))
    assert len({value for _, value in samples(seen)}) == 33  # also of a sample that comes twice
    for taken, (epoch, state) in enumerate(states, 1):
        again = loader(sampler(replacement=replacement), num_workers=2 if taken == 4 else 0)
        again.load_state_dict(state)
        assert [plain(batch) for _ in range(epoch, 3) for batch in again] == seen[taken:]


Chain = list[tuple[int, int, int]]


@settings(max_examples=25, derandomize=True)
@given(
    chain=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=4),
    tail=st.sampled_from([Tail.EVEN, Tail.CARRY]),
    replacement=st.booleans(),
)
def test_the_order_is_the_same_under_any_chain_of_topologies(chain: Chain, tail: Tail, replacement: bool) -> None:
    assert under(chain, tail, replacement) == under([], tail, replacement)


def under(chain: Chain, tail: Tail, replacement: bool) -> list[tuple[int, float]]:
    """The samples of two epochs in global order: some steps at each (world size, batch size), the rest at (2, 3)."""
    state, seen, ended = None, [], 0
    for world_size, batch_size, steps in [*chain, (2, 3, 10**6)]:
        own = [sampler(replacement=replacement) for _ in range(world_size)]
        every = [loader(own[r], batch_size, rank=r, world_size=world_size, tail=tail) for r in range(world_size)]
        for rank in every:
            if state is not None:
                rank.load_state_dict(stored(state))
        while ended < 3 and steps:  # under EVEN samples may be left over to the third
            for batches in zip(*every, strict=True):
                seen += samples(batches)
                steps -= 1
                if steps == 0:
                    break
            else:
                ended += 1
        state = every[0].state_dict()
    return seen[:22]  # under CARRY the last step takes some of the next epoch


def test_it_is_an_ordinary_sampler_too() -> None:
    of = sampler()
    by_itself = list(of)
    assert len(by_itself) == len(of) == 11
    assert list(of) == by_itself
    of.set_epoch(1)
    assert list(of) != by_itself
    assert drawn(of, 2, seed=0) == [by_itself, list(of)]


def test_its_own_seed_counts_before_the_loaders() -> None:
    orders = [[index for index, _ in samples(loader(sampler(seed=8), seed=seed))] for seed in range(2)]
    assert orders[0] == orders[1] == list(sampler(seed=8))


def test_weights_may_be_a_tensor_or_an_array() -> None:
    expected = drawn(sampler(), 1)
    for weights in (torch.tensor(WEIGHTS), np.array(WEIGHTS, dtype=np.float32), tuple(WEIGHTS)):
        assert drawn(sampler(weights=weights), 1) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1.0] * LENGTH}, "not the same weights of the sampler"),
        ({"seed": 5}, "not the same seed of the sampler.\n  saved:   None\n  current: 5"),
        ({"num_samples": 12}, "not the same length"),
        ({"replacement": False}, "not the same order.\n  saved:   weighted sampler with replacement"),
    ],
)
def test_another_sampler_is_refused(change: dict[str, Any], message: str) -> None:
    saved, other = loader(sampler()), loader(sampler(**change))
    next(iter(saved))
    before = stored(other.state_dict())
    with pytest.raises(CheckpointMismatchError, match=message):
        other.load_state_dict(saved.state_dict())
    assert other.state_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, -1.0]}, "weights are"),
        ({"weights": [0.0, 0.0]}, "not all 0"),
        ({"weights": []}, "weights are"),
        ({"weights": [1.0, math.nan]}, "weights are"),
        ({"weights": [[1.0]]}, "weights are"),
        ({"num_samples": 0}, "must be at least 1"),
        ({"num_samples": 13, "replacement": False}, "at most 12: without replacement"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_a_hundred_million_weights_cost_nothing_to_go_on() -> None:
    of = WeightedSampler(np.ones(10**6), 10**12)
    source = of.order_source()
    assert source.draw(3, 0, 10**12 - 3, 10**12).tolist() == source.draw(3, 0, 10**12 - 70, 10**12).tolist()[-3:]
    assert len(set(source.draw(3, 0, 10**11, 10**11 + 1000).tolist())) > 990


# -- beside torch's


def test_torchs_weighted_sampler_goes_on_working() -> None:
    reseed(1)
    whole = loader(WeightedRandomSampler(WEIGHTS, 11), seed=None)
    batches = iter(whole)
    next(batches)
    again = loader(WeightedRandomSampler(WEIGHTS, 11), seed=None)
    again.load_state_dict(stored(whole.state_dict()))
    assert list(map(plain, again)) == list(map(plain, batches))


@pytest.mark.parametrize("drop_last", [True, False])
def test_torchs_batch_sampler_keeps_its_sampler_and_its_batch_size(drop_last: bool) -> None:
    batches = BatchSampler(sampler(), 4, drop_last)
    made = make_resumable(DataLoader(Noisy(), batch_sampler=batches), seed=0)
    expected = [list(batch) for batch in batches]
    assert [plain(batch)[0] for batch in made] == expected
    assert len(made) == len(batches) == len(expected)


def check_lightning_divides_it(_folder: Path) -> None:
    run = fabric("ddp")
    made = run.setup_dataloaders(DataLoader(Noisy(), 2, sampler=sampler(seed=3)))
    mine = [index for indices, _ in map(plain, made) for index in indices]
    of_all: list[Any] = [None, None]
    dist.all_gather_object(of_all, mine)
    assert sorted(map(len, of_all)) == [5, 6]
    steps = [index for step in range(0, 4, 2) for rank in of_all for index in rank[step : step + 2]]
    assert steps == list(sampler(seed=3))[:8]


def test_fabric_divides_it_over_the_ranks(ranks: Any, tmp_path: Path) -> None:  # noqa: F811
    launch(ranks, check_lightning_divides_it, tmp_path)
