"""Streams go on exactly from every batch, and hold every sample once through every change of topology."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_resume.data import order
from lightning_resume.data.capabilities import Change, Randomness
from tests.streams import FORMATS, LENGTH, Ranks, make, plain, samples, stored, write

EPOCHS = 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # depends on the machine's cores
    pytest.mark.filterwarnings("ignore:.* lanes have nothing to read:UserWarning"),  # more lanes than tar files
]


@pytest.fixture(params=FORMATS)
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


def run(loader: Any, *, epochs: int = EPOCHS) -> tuple[list[Any], list[tuple[int, int, Any]]]:
    """The batches of some epochs, and after each the number taken, the epochs ended and the state."""
    batches: list[Any] = []
    states = [(0, 0, stored(loader.state_dict()))]
    for epoch in range(epochs):
        for batch in loader:
            batches.append((epoch, plain(batch)))
            states.append((len(batches), epoch, stored(loader.state_dict())))
        states.append((len(batches), epoch + 1, stored(loader.state_dict())))
    return batches, states


def rest(loader: Any, *, ended: int) -> list[Any]:
    return [(epoch, plain(batch)) for epoch in range(ended, EPOCHS) for batch in loader]


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own(tmp_path: Path, name: str) -> None:
    run_ = Ranks(functools.partial(make, write(tmp_path / "data", name), name), lanes=3)
    epochs = [samples(run_.epoch()) for _ in range(EPOCHS)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(LENGTH))] * EPOCHS
    assert epochs[0] != epochs[1] != sorted(epochs[1])


@pytest.mark.parametrize("shuffle", [True, False])
def test_it_replays_from_every_batch_of_two_epochs(tmp_path: Path, name: str, shuffle: bool) -> None:
    create = functools.partial(make, write(tmp_path / "data", name), name, lanes=2, shuffle=shuffle)
    batches, states = run(create())
    assert len(batches) == EPOCHS * 6
    wrong = []
    for taken, ended, state in states:
        loader = create()
        loader.load_state_dict(state)
        if rest(loader, ended=ended) != batches[taken:]:
            wrong.append((taken, ended))
    assert wrong == []


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 3, "persistent_workers": True}])
def test_workers_change_neither_order_nor_random_numbers(tmp_path: Path, options: dict[str, Any]) -> None:
    create = functools.partial(make, write(tmp_path / "data", "jsonl"), lanes=4)
    batches, states = run(create())
    again, of_workers = run(create(**options))
    assert again == batches
    assert plain(of_workers) == plain(states)


def test_a_state_taken_with_workers_goes_on_with_others(tmp_path: Path) -> None:
    create = functools.partial(make, write(tmp_path / "data", "jsonl"), lanes=4)
    batches, states = run(create(num_workers=2, prefetch_factor=4))
    for taken, ended, state in states[1:9:3]:
        loader = create(num_workers=3)
        loader.load_state_dict(state)
        assert rest(loader, ended=ended) == batches[taken:]


def test_spawned_workers_give_the_same(tmp_path: Path) -> None:
    create = functools.partial(make, write(tmp_path / "data", "jsonl"), lanes=2)
    spawned = create(num_workers=1, multiprocessing_context="spawn")
    assert [plain(batch) for batch in spawned] == [plain(batch) for batch in create()]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_end_together_and_replay_from_every_step(tmp_path: Path, name: str, world_size: int) -> None:
    create = functools.partial(make, write(tmp_path / "data", name), name)
    whole = Ranks(create, world_size)
    states, steps = [whole.states()], []
    while (step := whole.step()) is not None:
        steps.append(step)
        states.append(whole.states())
    assert sorted(samples(steps)) == list(range(LENGTH))
    counted = order.OrderState(seed=0, length=LENGTH)
    assert len(steps) == order.steps_left(counted, world_size=world_size, batch_size=4)
    second = whole.epoch()
    for taken, state in enumerate(states):
        again = Ranks(create, world_size, states=state)
        assert plain(again.epoch()) == plain(steps[taken:])
        assert plain(again.epoch()) == plain(second)


def test_while_all_lanes_live_the_global_order_is_that_of_any_world_size(tmp_path: Path) -> None:
    create = functools.partial(make, write(tmp_path / "data", "jsonl", (40, 40, 40, 40)), lanes=4, batch_size=2)
    orders = []
    for world_size in (1, 2, 4):
        run = Ranks(create, world_size)
        orders.append(samples([run.step() or [] for _ in range(40 // world_size)]))
    assert orders[0] == orders[1] == orders[2]


def test_the_position_of_batches_ago_is_known(tmp_path: Path) -> None:
    create = functools.partial(make, write(tmp_path / "data", "jsonl"), lanes=3)
    batches, states = run(create())
    loader = create()
    for taken, batch in enumerate(loader, 1):
        assert plain(batch) == batches[taken - 1][1]
        for behind in range(min(3, taken) + 1):
            expected = next(state for count, _, state in states if count == taken - behind)
            assert plain(stored(loader.state_dict(behind))) == plain(expected)
    assert plain(stored(loader.state_dict(2))["lanes"]) == plain(states[len(batches) // 2 - 2][2]["lanes"])


def test_a_state_is_not_changed_by_going_on(tmp_path: Path) -> None:
    loader = make(write(tmp_path / "data", "jsonl"), lanes=3)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    before = plain(state)
    next(batches)
    assert plain(state) == before


def test_saving_each_step_and_resuming_goes_through_the_run(tmp_path: Path, name: str) -> None:
    create = functools.partial(make, write(tmp_path / "data", name), name, lanes=2)
    batches, _ = run(create())
    state, seen, ended = stored(create().state_dict()), [], 0
    while ended < EPOCHS:
        loader = create()
        loader.load_state_dict(state)
        batch = next(iter(loader), None)
        if batch is None:
            ended += 1
        else:
            seen.append((ended, plain(batch)))
        state = stored(loader.state_dict())
    assert seen == batches


def test_set_epoch_after_a_load_keeps_the_position(tmp_path: Path) -> None:
    create = functools.partial(make, write(tmp_path / "data", "jsonl"), lanes=2)
    batches, states = run(create())
    taken, ended, state = states[9]
    loader = create()
    loader.load_state_dict(state)
    loader.set_epoch(ended)
    assert rest(loader, ended=ended) == batches[taken:]
    loader = create()
    loader.set_epoch(1)
    assert rest(loader, ended=1) == [batch for batch in batches if batch[0] == 1]


def test_breaking_out_of_a_loop_begins_the_next_epoch(tmp_path: Path) -> None:
    create = functools.partial(make, write(tmp_path / "data", "jsonl"), lanes=2)
    batches, _ = run(create())
    loader = create()
    next(iter(loader))
    assert rest(loader, ended=1) == [batch for batch in batches if batch[0] == 1]


TOPOLOGIES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 4))
"""World size, batch size and steps of a part of a run."""


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("which", ["jsonl", "jsonl.zst, frames", "tar", "parquet"])
@settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(legs=st.lists(TOPOLOGIES, min_size=1, max_size=5), lanes=st.integers(1, 5))
def test_every_sample_comes_once_through_every_change(
    tmp_path: Path, which: str, drop_last: bool, legs: list[tuple[int, int, int]], lanes: int
) -> None:
    folder = tmp_path / "data"
    if not folder.exists():
        write(folder, which)
    seen: list[list[int]] = [[], []]
    states: list[Any] = []
    epoch = 0
    last = legs[-1][:2]
    for world_size, batch_size, steps in [*legs, (*last, 2 * LENGTH), (*last, 2 * LENGTH)]:
        if epoch == EPOCHS:
            break
        ranks = Ranks(
            functools.partial(make, folder, which),
            world_size,
            states=states,
            batch_size=batch_size,
            lanes=lanes,
            drop_last=drop_last,
        )
        for _ in range(steps):
            step = ranks.step()
            if step is None:
                epoch += 1
                break
            seen[epoch] += samples([step])
            assert len({len(batch) for batch in step}) <= 2
            assert all(step)
        states = ranks.states()
    if drop_last:
        assert all(len(set(of_epoch)) == len(of_epoch) for of_epoch in seen)
        assert len(seen[1]) > LENGTH - last[0] * last[1] or len(seen[0]) > LENGTH - 4 * 6
    elif epoch == EPOCHS:
        left = set(range(LENGTH)) - set(seen[1])
        assert sorted(seen[0] + seen[1] + list(left)) == sorted([*range(LENGTH), *range(LENGTH)])
        assert len(left) < last[0]


def test_lanes_without_work_are_warned_about_once(tmp_path: Path) -> None:
    loader = make(write(tmp_path / "data", "tar", (3, 2)), "tar", lanes=5)
    with pytest.warns(UserWarning, match="3 of 5 lanes have nothing to read: there are 2 tar files"):
        list(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(loader)


def test_what_it_declares(tmp_path: Path) -> None:
    capabilities = make(write(tmp_path / "data", "jsonl")).capabilities
    assert capabilities.elastic
    assert (capabilities.repeated, capabilities.lost) == (0, 0)
    assert capabilities.randomness is Randomness.SAMPLE
    assert capabilities.world_size is Change.ELASTIC


def test_a_stream_has_no_length(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="has no length"):
        len(make(write(tmp_path / "data", "jsonl")))


def test_an_epoch_that_is_set_begins_at_its_start_unless_it_was_just_loaded(tmp_path: Path) -> None:
    loader = make(write(tmp_path, "jsonl"))

    def epoch_of(epoch: int) -> Any:
        loader.set_epoch(epoch)
        return plain(list(loader))

    whole, other = epoch_of(0), epoch_of(1)
    assert epoch_of(0) == epoch_of(0) == whole != other
    loader.set_epoch(0)
    next(iter(loader))
    state = stored(loader.state_dict())
    assert epoch_of(0) == whole
    loader.load_state_dict(state)
    assert epoch_of(0) == whole[1:]
    assert epoch_of(1) == other


def test_samples_that_an_epoch_leaves_over_come_in_the_next_although_it_is_set(tmp_path: Path) -> None:
    run = Ranks(lambda **options: make(write(tmp_path, "jsonl", (2,)), **options), 3)
    assert run.epoch() == []
    for loader in run.loaders:
        loader.set_epoch(1)
    assert sorted(samples(run.epoch())) == [0, 0, 1, 1]
