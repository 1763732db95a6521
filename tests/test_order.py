"""The elastic order: exactly once and in one order, under any chain of topologies."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_resume.data.order import (
    OrderState,
    Permutation,
    Tail,
    advance,
    indices,
    next_epoch,
    rank_slice,
    steps_left,
    window,
)

TRILLION = 10**12
POWERS = [2**k for k in range(1, 17)]
LENGTHS = sorted({1, 2, 3} | {p + d for p in POWERS for d in (-1, 0, 1)} | {4**k + 1 for k in range(1, 9)})

untimed = settings(deadline=None)  # a slow machine is not a wrong order
sizes = st.integers(1, 9)
# world size, num_workers (drawn to show that nothing takes it), batch size, steps until the run stops
legs = st.lists(st.tuples(sizes, st.integers(0, 4), sizes, st.integers(0, 15)), min_size=1, max_size=5)
tails_that_lose_nothing = st.sampled_from([Tail.EVEN, Tail.CARRY])


def restarted(state: OrderState) -> OrderState:
    return OrderState.from_dict(json.loads(json.dumps(state.to_dict())))


def serve_step(state: OrderState, world_size: int, batch_size: int) -> list[int]:
    start, stop = window(state, 0, world_size=world_size, batch_size=batch_size)
    parts = [indices(state, *rank_slice(start, stop, rank=r, world_size=world_size)) for r in range(world_size)]
    assert all(len(part) > 0 for part in parts), "a rank without a sample hangs the next collective"
    return [int(index) for part in parts for index in part]


def train(state: OrderState, world_size: int, batch_size: int, steps: int) -> tuple[list[int], OrderState]:
    """Serves ``steps`` steps over as many epochs as they take."""
    served: list[int] = []
    topology = {"world_size": world_size, "batch_size": batch_size}
    for _ in range(steps):
        while steps_left(state, **topology) == 0:
            state = next_epoch(state, **topology)
        served += serve_step(state, world_size, batch_size)
        state = advance(state, **topology)
    return served, state


def uninterrupted(state: OrderState, count: int) -> list[int]:
    """The first ``count`` samples of a run, straight from the permutations."""
    order: list[int] = []
    for epoch in range(-(-count // state.length)):
        order += Permutation(state.length, seed=state.seed, epoch=epoch).take(0, state.length).tolist()
    return order[:count]


# --- the permutation


@pytest.mark.parametrize("length", LENGTHS)
def test_every_awkward_length_gets_a_true_bijection(length: int) -> None:
    taken = Permutation(length, seed=length, epoch=1).take(0, length)
    assert np.array_equal(np.sort(taken), np.arange(length))


@untimed
@given(st.integers(1, 20_000), st.integers(min_value=0), st.integers(min_value=0))
def test_every_length_seed_and_epoch_gets_a_true_bijection(length: int, seed: int, epoch: int) -> None:
    taken = Permutation(length, seed=seed, epoch=epoch).take(0, length)
    assert np.array_equal(np.sort(taken), np.arange(length))


@untimed
@given(st.integers(1, 2**63 - 1), st.data())
def test_take_and_single_access_agree_at_every_size(length: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, length - 1))
    permutation = Permutation(length, seed=5, epoch=2)
    taken = permutation.take(start, min(start + 20, length))
    assert taken.dtype == np.int64
    assert taken.tolist() == [permutation[start + i] for i in range(len(taken))]
    assert all(0 <= index < length for index in taken.tolist())


@pytest.mark.parametrize(
    ("length", "seed", "epoch", "golden"),
    [
        (1, 0, 0, [0]),
        (10, 0, 0, [0, 7, 1, 2, 8, 9]),
        (10, 1, 2, [1, 2, 7, 8, 3, 9]),
        (10, 2, 1, [7, 8, 1, 0, 3, 5]),
        (4096, 7, 3, [974, 4037, 1725, 1897, 63, 2244]),
        (4097, 7, 3, [1038, 818, 2649, 3193, 199, 1946]),
        (8192, 7, 3, [1038, 6295, 2649, 3193, 7132, 5398]),
        (50_000, 123456789, 4, [7796, 25879, 48821, 44160, 25071, 34128]),
        (TRILLION, 0, 0, [322503001834, 449167504955, 899078448063, 249816571746, 659272246133, 542745901614]),
        (2**63 - 1, 10**30, 9, [2847570137492231447, 3654428959551174123, 4850094255247238487]),
    ],
)
def test_version_1_of_the_order_never_changes(length: int, seed: int, epoch: int, golden: list[int]) -> None:
    permutation = Permutation(length, seed=seed, epoch=epoch)
    assert permutation.take(0, len(golden)).tolist() == golden
    assert [permutation[i] for i in range(len(golden))] == golden


@pytest.mark.parametrize("length", [1000, 5000])
def test_seed_1_epoch_2_is_not_seed_2_epoch_1(length: int) -> None:
    one, other = Permutation(length, seed=1, epoch=2), Permutation(length, seed=2, epoch=1)
    assert np.count_nonzero(one.take(0, length) == other.take(0, length)) < 10


def test_a_trillion_samples_need_no_array() -> None:
    permutation = Permutation(TRILLION, seed=0, epoch=0)
    before = set(vars(permutation))
    permutation[0]
    permutation.take(0, 100)
    assert set(vars(permutation)) - before == {"_round_keys"}
    assert len(permutation._round_keys) * 2 == 12


def test_construction_alone_computes_nothing() -> None:
    assert not {"_round_keys", "_table"} & set(vars(Permutation(1000, seed=0, epoch=0)))


@pytest.mark.parametrize("length", [10, 5000])
@pytest.mark.parametrize("beyond", [-1, 0])
def test_positions_outside_the_permutation_raise_index_error(length: int, beyond: int) -> None:
    permutation = Permutation(length, seed=0, epoch=0)
    position = beyond if beyond < 0 else length
    with pytest.raises(IndexError, match="outside a permutation"):
        permutation[position]
    with pytest.raises(IndexError, match="outside a permutation"):
        permutation.take(position, position + 1)


@pytest.mark.parametrize(
    ("length", "seed", "epoch", "message"),
    [(0, 0, 0, "length is 0"), (2**63, 0, 0, "length is 9"), (5, -1, 0, "seed is -1"), (5, 0, -1, "epoch is -1")],
)
def test_a_permutation_refuses_arguments_out_of_bounds(length: int, seed: int, epoch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Permutation(length, seed=seed, epoch=epoch)


def test_writing_into_what_take_returned_changes_no_order() -> None:
    permutation = Permutation(100, seed=0, epoch=0)
    permutation.take(0, 100)[:] = 0
    assert permutation.take(0, 100).sum() == sum(range(100))


# The statistics below are of fixed keys, so each passes or fails for ever. Their bounds are wide, near 5 sigma: what
# they would catch is a round function or a key schedule that stopped mixing.


@pytest.mark.parametrize("length", [1000, 4097, 5000, 8192, 10_007])
def test_an_epoch_has_no_excess_of_samples_in_their_old_place(length: int) -> None:
    orders = [Permutation(length, seed=3, epoch=epoch).take(0, length) for epoch in range(201)]
    repeated = sum(np.count_nonzero(a == b) for a, b in pairwise(orders))
    fixed = sum(np.count_nonzero(order == np.arange(length)) for order in orders)
    # one of each is expected in every epoch: Poisson with a mean near 200
    assert 130 < repeated < 270
    assert 130 < fixed < 270


@pytest.mark.parametrize("length", [1000, 4097, 8192, 10_007, TRILLION])
def test_steps_between_neighbours_are_uniform(length: int) -> None:
    orders = [Permutation(length, seed=seed, epoch=0).take(0, min(length, 4000)) for seed in range(50)]
    differences = np.concatenate([np.diff(order) % length for order in orders])
    counts = np.bincount(differences * 16 // length if length < TRILLION else differences // (length // 16))
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 60  # 15 degrees of freedom: mean 15, standard deviation 5.5


@pytest.mark.parametrize("length", [1000, 4097, 8192, 10_007])
def test_samples_of_every_part_come_in_every_part_of_the_epoch(length: int) -> None:
    counts = np.zeros((8, 8))
    for epoch in range(50):
        order = Permutation(length, seed=1, epoch=epoch).take(0, length)
        np.add.at(counts, (np.arange(length) * 8 // length, order * 8 // length), 1)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 120  # near 49 degrees of freedom: standard deviation 10


def test_all_orders_of_a_tiny_dataset_are_equally_likely() -> None:
    orders = [Permutation(3, seed=seed, epoch=epoch).take(0, 3).tolist() for seed in range(60) for epoch in range(100)]
    counts = [orders.count(list(order)) for order in permutations(range(3))]
    assert sum(counts) == 6000
    assert all(850 < count < 1150 for count in counts)


@pytest.mark.parametrize("length", [4000, TRILLION])
def test_seeds_and_epochs_that_are_near_each_other_are_uncorrelated(length: int) -> None:
    keys = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    orders = [Permutation(length, seed=seed, epoch=epoch).take(0, 4000) for seed, epoch in keys]
    correlations = np.abs(np.corrcoef(orders) - np.eye(len(keys)))
    assert correlations.max() < 0.08  # standard deviation 0.016


# --- chains of topologies


@untimed
@given(st.integers(1, 120), st.integers(0, 9), tails_that_lose_nothing, legs)
def test_any_chain_of_topologies_serves_the_uninterrupted_order(
    length: int, seed: int, tail: Tail, legs: list[tuple[int, int, int, int]]
) -> None:
    state = OrderState(seed=seed, length=length, tail=tail)
    served: list[int] = []
    for world_size, _num_workers, batch_size, steps in legs:
        more, state = train(restarted(state), world_size, batch_size, steps)
        served += more
    assert served == uninterrupted(state, len(served))
    assert state.epoch * length + state.consumed == len(served)


@untimed
@given(st.integers(2, 60), tails_that_lose_nothing, st.tuples(sizes, sizes), st.tuples(sizes, sizes), st.data())
def test_three_epochs_with_two_resumes_show_every_sample_three_times(
    length: int, tail: Tail, first: tuple[int, int], second: tuple[int, int], data: st.DataObject
) -> None:
    state = OrderState(seed=1, length=length, tail=tail)
    served: list[int] = []
    for topology in (first, second):
        more, state = train(restarted(state), *topology, data.draw(st.integers(0, 20)))
        served += more
    while len(served) < 3 * length:
        more, state = train(restarted(state), *first, 1)
        served += more
    assert np.bincount(served[: 3 * length]).tolist() == [3] * length


@untimed
@given(st.integers(81, 300), legs)
def test_drop_serves_a_prefix_of_every_epoch_and_reports_the_rest(
    length: int, legs: list[tuple[int, int, int, int]]
) -> None:
    state = OrderState(seed=2, length=length, tail=Tail.DROP)
    for world_size, _, batch_size, steps in legs:
        topology = {"world_size": world_size, "batch_size": batch_size}
        state, served = restarted(dataclasses.replace(state, consumed=0)), []
        for _ in range(min(steps, steps_left(state, **topology))):
            served += serve_step(state, world_size, batch_size)
            state = advance(state, **topology)
        order = Permutation(length, seed=2, epoch=state.epoch).take(0, length).tolist()
        assert served == order[: len(served)]
        dropped = state.length - advance(state, steps_left(state, **topology), **topology).consumed
        assert dropped == length % (world_size * batch_size)
        state = next_epoch(state, **topology)
        assert (state.consumed, state.batches) == (0, 0)


@untimed
@given(st.integers(81, 300), st.tuples(sizes, sizes), st.tuples(sizes, sizes), st.integers(0, 5))
def test_drop_goes_on_where_another_topology_stopped(
    length: int, first: tuple[int, int], second: tuple[int, int], steps: int
) -> None:
    state = OrderState(seed=2, length=length, tail=Tail.DROP)
    steps = min(steps, steps_left(state, world_size=first[0], batch_size=first[1]))
    served, state = train(state, *first, steps)
    more, state = train(state, *second, steps_left(state, world_size=second[0], batch_size=second[1]))
    assert served + more == uninterrupted(state, len(served + more))
    assert state.length - state.consumed < second[0] * second[1]


@untimed
@given(st.integers(20, 400), st.sampled_from(Tail), st.integers(1, 6), st.integers(1, 6))
def test_topologies_with_the_same_global_batch_share_every_full_step(
    length: int, tail: Tail, world_size: int, batch_size: int
) -> None:
    state = OrderState(seed=4, length=length, tail=tail)
    for _ in range(length // (world_size * batch_size) - 1):
        one, other = serve_step(state, world_size, batch_size), serve_step(state, batch_size, world_size)
        assert set(one) == set(other)
        state = advance(state, world_size=world_size, batch_size=batch_size)


@untimed
@given(st.integers(1, 200), st.sampled_from(Tail), sizes, sizes, st.data())
def test_windows_counted_ahead_are_the_windows_walked_to(
    length: int, tail: Tail, world_size: int, batch_size: int, data: st.DataObject
) -> None:
    topology = {"world_size": world_size, "batch_size": batch_size}
    start = OrderState(seed=0, length=length, tail=tail)
    steps = data.draw(st.integers(0, steps_left(start, **topology)))
    walked = start
    for step in range(steps):
        assert window(walked, 0, **topology) == window(start, step, **topology)
        walked = advance(walked, **topology)
    assert advance(start, steps, **topology) == walked
    assert steps_left(walked, **topology) == steps_left(start, **topology) - steps


# --- tails, by example


def test_even_divides_the_last_step_over_all_ranks() -> None:
    state = OrderState(seed=0, length=22)
    assert steps_left(state, world_size=4, batch_size=4) == 2
    start, stop = window(state, 1, world_size=4, batch_size=4)
    slices = [rank_slice(start, stop, rank=r, world_size=4) for r in range(4)]
    assert slices == [(16, 18), (18, 20), (20, 21), (21, 22)]


def test_even_adds_fewer_samples_than_ranks_to_the_step_before() -> None:
    state = OrderState(seed=0, length=35)
    assert steps_left(state, world_size=4, batch_size=4) == 2
    assert window(state, 1, world_size=4, batch_size=4) == (16, 35)


def test_even_hands_samples_that_no_step_can_take_to_the_next_epoch() -> None:
    state = OrderState(seed=0, length=10, consumed=8, batches=4)
    assert steps_left(state, world_size=4, batch_size=2) == 0
    state = next_epoch(state, world_size=4, batch_size=2)
    assert (state.epoch, state.consumed, state.batches) == (1, -2, 0)
    old, new = Permutation(10, seed=0, epoch=0), Permutation(10, seed=0, epoch=1)
    assert serve_step(state, 4, 2) == [old[8], old[9], *new.take(0, 6).tolist()]


def test_even_gathers_tiny_epochs_until_every_rank_has_a_sample() -> None:
    state = OrderState(seed=0, length=3)
    for _ in range(2):
        assert steps_left(state, world_size=8, batch_size=1) == 0
        state = next_epoch(state, world_size=8, batch_size=1)
    assert (state.epoch, state.consumed) == (2, -6)
    assert serve_step(state, 8, 1) == uninterrupted(state, 9)


def test_carry_fills_the_last_step_from_the_next_epoch() -> None:
    state = OrderState(seed=0, length=10, tail=Tail.CARRY)
    state = advance(state, steps_left(state, world_size=2, batch_size=3), world_size=2, batch_size=3)
    assert (state.consumed, state.batches) == (12, 2)
    state = next_epoch(state, world_size=2, batch_size=3)
    assert (state.epoch, state.consumed, state.batches) == (1, 2, 0)


@pytest.mark.parametrize("tail", Tail)
def test_an_epoch_that_is_left_midway_gives_up_its_rest(tail: Tail) -> None:
    state = advance(OrderState(seed=0, length=100, tail=tail), 3, world_size=2, batch_size=5)
    state = next_epoch(state, world_size=2, batch_size=5)
    assert (state.epoch, state.consumed, state.batches) == (1, 0, 0)


@untimed
@given(st.integers(-50, 50), sizes, sizes, st.data())
def test_a_full_window_gives_every_rank_one_batch(
    start: int, world_size: int, batch_size: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    part = rank_slice(start, start + world_size * batch_size, rank=rank, world_size=world_size)
    assert part == (start + rank * batch_size, start + (rank + 1) * batch_size)


def test_unshuffled_positions_are_the_dataset_s_own_order_over_epoch_ends() -> None:
    state = OrderState(seed=0, length=4, epoch=1, shuffle=False)
    assert indices(state, -2, 6).tolist() == [2, 3, 0, 1, 2, 3, 0, 1]


def test_an_empty_window_has_no_indices() -> None:
    empty = indices(OrderState(seed=0, length=4), 4, 4)
    assert empty.dtype == np.int64
    assert empty.size == 0


# --- refusals


def test_advance_refuses_to_pass_the_end_of_the_epoch() -> None:
    state = OrderState(seed=0, length=10)
    with pytest.raises(ValueError, match=r"has 2 steps left .* go on with next_epoch"):
        advance(state, 3, world_size=1, batch_size=5)
    with pytest.raises(ValueError, match="step -2"):
        advance(state, -1, world_size=1, batch_size=5)


def test_indices_refuses_positions_before_the_first_epoch() -> None:
    with pytest.raises(ValueError, match=r"position -5 of epoch 1 .* comes before epoch 0"):
        indices(OrderState(seed=0, length=4, epoch=1), -5, 0)


def test_reversed_windows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 2\) is reversed"):
        indices(OrderState(seed=0, length=4), 3, 2)
    with pytest.raises(ValueError, match=r"\[3, 2\) is reversed"):
        rank_slice(3, 2, rank=0, world_size=1)


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_slice_refuses_a_rank_outside_the_world(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}"):
        rank_slice(0, 4, rank=rank, world_size=2)


@pytest.mark.parametrize(("world_size", "batch_size"), [(0, 1), (1, 0), (-1, -1)])
def test_steps_left_refuses_an_empty_topology(world_size: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"world_size is {world_size} and batch_size is {batch_size}"):
        steps_left(OrderState(seed=0, length=4), world_size=world_size, batch_size=batch_size)


# --- the saved state


states = st.builds(
    OrderState,
    seed=st.integers(min_value=0),
    length=st.integers(1, 2**63 - 1),
    epoch=st.just(1),
    consumed=st.integers(min_value=-1),
    batches=st.integers(min_value=0),
    tail=st.sampled_from(Tail),
    shuffle=st.booleans(),
    fingerprint=st.text(),
)


@untimed
@given(states)
def test_a_state_survives_json(state: OrderState) -> None:
    assert restarted(state) == state
    assert restarted(state).tail is state.tail


@pytest.mark.parametrize("length", [10**3, TRILLION])
@pytest.mark.parametrize("percent", [1, 99])
def test_the_saved_state_grows_by_digits_only(length: int, percent: int) -> None:
    state = OrderState(seed=0, length=length)
    advanced = advance(state, length * percent // 1000, world_size=2, batch_size=5)
    texts = [json.dumps(s.to_dict()) for s in (state, advanced, OrderState(seed=0, length=1))]
    assert advanced.consumed == length * percent // 100
    assert len({re.sub(r"\d+", "0", text) for text in texts}) == 1


GOOD = OrderState(seed=1, length=10, epoch=1).to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1, but must be at least 0"),
        ({"seed": "7"}, "seed is '7', but must be of type int; .* load another checkpoint"),
        ({"length": 0}, "length is 0, but must be from 1 to .* check the dataset"),
        ({"length": 2**63}, "length is 9223372036854775808"),
        ({"epoch": 1.0}, r"epoch is 1\.0, but must be of type int"),
        ({"epoch": -1}, "epoch is -1, but must be at least 0"),
        ({"consumed": -11}, "consumed is -11, but must be at least -10"),
        ({"batches": True}, "batches is True, but must be of type int"),
        ({"batches": -3}, "batches is -3"),
        ({"tail": "odd"}, r"tail is 'odd', but must be one of \['even', 'drop', 'carry'\]"),
        ({"tail": ["even"]}, r"tail is \['even'\]"),
        ({"shuffle": 1}, "shuffle is 1, but must be of type bool"),
        ({"fingerprint": None}, "fingerprint is None, but must be of type str"),
        ({"version": 2}, "version is 2, .* newer lightning-resume: upgrade"),
        ({"version": 2, "lanes": 4}, "version is 2, .* newer lightning-resume: upgrade"),
        ({"version": 0}, "version is 0"),
        ({"lanes": 4}, "lanes is 4, but no such field is known"),
    ],
)
def test_from_dict_names_the_bad_field_its_value_and_what_to_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrderState.from_dict({**GOOD, **changes})


@pytest.mark.parametrize("name", GOOD)
def test_from_dict_misses_every_field(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is missing"):
        OrderState.from_dict({key: value for key, value in GOOD.items() if key != name})


def test_a_state_refuses_text_for_its_tail() -> None:
    with pytest.raises(ValueError, match=r"tail is 'even', but must be of type Tail; pass one of \['Tail.EVEN'"):
        OrderState(seed=0, length=1, tail="even")  # type: ignore[arg-type]
