"""Every kind of loader goes on exactly, from every batch; and what it does to the user's objects: nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from lightning_resume import make_resumable
from lightning_resume.data.position import Resumable
from tests.simulated_ranks import stored
from tests.toy_data import (
    BATCH,
    LENGTH,
    LOADERS,
    Noisy,
    NoisyBatches,
    Plain,
    Reversing,
    draw,
    global_rng,
    plain,
    reseed,
)

EPOCHS = 2


def run(loader: Any, *, epochs: int) -> tuple[list[Any], list[tuple[int, int, Any]]]:
    """The batches of some epochs, and after each the number taken, the epochs ended and the loader's state."""
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


def resumed(name: str, state: Any, *, seed: int) -> Any:
    reseed(seed)
    loader = make_resumable(LOADERS[name]())
    loader.load_state_dict(state)
    return loader


@pytest.mark.parametrize("name", LOADERS)
def test_it_resumes_exactly_from_every_batch_of_two_epochs(name: str) -> None:
    reseed(1)
    batches, states = run(make_resumable(LOADERS[name]()), epochs=EPOCHS)
    assert len(batches) > 1
    wrong = []
    for number, (taken, ended, state) in enumerate(states):
        if rest(resumed(name, state, seed=number + 2), ended=ended) != batches[taken:]:
            wrong.append((taken, ended))
    assert wrong == []


@pytest.mark.parametrize("name", LOADERS)
def test_it_resumes_exactly_when_each_run_does_one_batch(name: str) -> None:
    reseed(1)
    batches, _ = run(make_resumable(LOADERS[name]()), epochs=EPOCHS)
    reseed(1)
    state = stored(make_resumable(LOADERS[name]()).state_dict())
    seen: list[Any] = []
    ended = 0
    while ended < EPOCHS:
        loader = resumed(name, state, seed=len(seen) + 9)
        batch = next(iter(loader), None)
        if batch is None:  # saved at the last batch: nothing was left of the epoch
            ended += 1
        else:
            seen.append((ended, plain(batch)))
        state = stored(loader.state_dict())
        del loader
    assert seen == batches


@pytest.mark.parametrize("name", LOADERS)
def test_iterating_draws_no_global_random_number(name: str) -> None:
    loader = make_resumable(LOADERS[name]())
    reseed(1)
    before = global_rng()
    rest(loader, ended=0)
    assert global_rng() == before


@pytest.mark.parametrize("name", LOADERS)
def test_the_order_does_not_depend_on_random_numbers_drawn_between_batches(name: str) -> None:
    reseed(1)
    batches, _ = run(make_resumable(LOADERS[name]()), epochs=EPOCHS)
    reseed(1)
    disturbed = []
    loader = make_resumable(LOADERS[name]())
    for epoch in range(EPOCHS):
        for batch in loader:
            disturbed.append((epoch, plain(batch)))
            draw()
    assert disturbed == batches


def augmentation(loader: Any, *, epochs: int = 2) -> dict[tuple[int, int], float]:
    """The random number of each sample of each epoch."""
    reseed(7)
    resumable = make_resumable(loader, seed=3)
    return {
        (epoch, index): value
        for epoch in range(epochs)
        for indices, values in map(plain, resumable)
        for index, value in zip(indices, values, strict=True)
    }


@pytest.mark.parametrize(("workers", "context", "epochs"), [(1, "fork", 2), (2, "fork", 2), (2, "spawn", 1)])
def test_a_samples_random_numbers_do_not_depend_on_workers(workers: int, context: str, epochs: int) -> None:
    alone = augmentation(DataLoader(Noisy(), BATCH, shuffle=True), epochs=epochs)
    loader = DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers, multiprocessing_context=context)
    assert augmentation(loader, epochs=epochs) == alone


@pytest.mark.parametrize("batch_size", [1, 3, LENGTH])
def test_a_samples_random_numbers_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    alone = augmentation(DataLoader(Noisy(), BATCH, shuffle=True))
    assert augmentation(DataLoader(Noisy(), batch_size, shuffle=True)) == alone


def test_a_samples_random_numbers_do_not_depend_on_the_order() -> None:
    assert augmentation(DataLoader(Noisy(), BATCH)) == augmentation(DataLoader(Noisy(), BATCH, shuffle=True))


def test_random_numbers_differ_between_samples_and_epochs() -> None:
    values = list(augmentation(DataLoader(Noisy(), BATCH, shuffle=True), epochs=3).values())
    assert len(set(values)) == len(values) == 3 * LENGTH


def test_random_numbers_differ_between_ranks_of_one_step() -> None:
    values = [
        value
        for rank in range(2)
        for _, row in map(plain, make_resumable(DataLoader(Noisy(), 3), rank=rank, world_size=2, seed=3, shared=True))
        for value in row
    ]
    assert len(set(values)) == LENGTH


def test_a_collate_fn_draws_the_same_whatever_the_workers() -> None:
    def batches(workers: int) -> list[float]:
        reseed(7)
        return list(make_resumable(DataLoader(Noisy(), BATCH, num_workers=workers, collate_fn=draw_one), seed=3))

    assert batches(0) == batches(2)
    assert len(set(batches(0))) == 4


def draw_one(_samples: Any) -> float:
    return draw()


def test_the_users_objects_stay_theirs() -> None:
    loader = Reversing(Noisy(), BATCH, shuffle=True, collate_fn=keep)
    resumable = make_resumable(loader)
    assert isinstance(resumable, Reversing)
    for name in ("dataset", "sampler", "batch_sampler", "collate_fn", "batch_size", "num_workers", "generator"):
        assert getattr(resumable, name) is getattr(loader, name)
    assert len(resumable) == len(loader)


def keep(samples: Any) -> Any:
    return samples


def test_a_subclass_of_dataloader_iterates_its_own_way() -> None:
    reseed(1)
    plain_order = [index for index, _ in make_resumable(DataLoader(Noisy(), BATCH, shuffle=True), seed=3)]
    its_own = [index for index, _ in make_resumable(Reversing(Noisy(), BATCH, shuffle=True), seed=3)]
    assert [index.flip(0).tolist() for index in its_own] == [index.tolist() for index in plain_order]


def test_the_users_loader_is_not_changed() -> None:
    loader = DataLoader(Noisy(), BATCH, shuffle=True)
    before = dict(loader.__dict__)
    list(make_resumable(loader))
    assert loader.__dict__ == before


class Named(Noisy):
    """Sets a name in each worker, which its samples show."""

    name = -1

    def __getitem__(self, index: int) -> Any:
        return index, torch.tensor(self.name)


def set_name(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert type(info.dataset) is Named
    info.dataset.name = worker_id


def test_worker_init_fn_sees_the_users_dataset() -> None:
    loader = make_resumable(DataLoader(Named(), BATCH, num_workers=2, worker_init_fn=set_name))
    assert [names.tolist() for _, names in loader] == [[0] * 4, [1] * 4, [0] * 4, [1] * 2]


def test_iterable_workers_see_the_users_dataset() -> None:
    loader = make_resumable(DataLoader(Plain(), BATCH, num_workers=2, worker_init_fn=check_plain))
    assert sorted(index for indices, _ in map(plain, loader) for index in indices) == list(range(LENGTH))


def check_plain(_worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert type(info.dataset) is Plain


def test_a_dataset_that_fetches_batches_is_asked_for_batches() -> None:
    asked: list[list[int]] = []

    class Asked(NoisyBatches):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            asked.append(indices)
            return super().__getitems__(indices)

    list(make_resumable(DataLoader(Asked(), BATCH)))
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]


def test_a_second_iterator_ends_the_first_with_an_error() -> None:
    loader = make_resumable(DataLoader(Noisy(), BATCH))
    first = iter(loader)
    next(first)
    iter(loader)
    with pytest.raises(RuntimeError, match="no longer the loader's position"):
        next(first)


def test_an_iterator_that_ends_after_a_load_does_not_end_the_loaded_iteration() -> None:
    loader = make_resumable(DataLoader(Noisy(), BATCH))
    state = loader.state_dict()
    first = iter(loader)
    for _ in range(4):
        next(first)
    loader.load_state_dict(state)
    assert next(first, None) is None
    assert not loader.state_dict()["ended"]


def test_breaking_out_of_a_loop_begins_the_next_epoch() -> None:
    loader = make_resumable(DataLoader(Noisy(), BATCH, shuffle=True), seed=3)
    epochs = [[plain(batch)[0] for batch in loader] for _ in range(2)]
    again = make_resumable(DataLoader(Noisy(), BATCH, shuffle=True), seed=3)
    next(iter(again))
    assert [plain(batch)[0] for batch in again] == epochs[1]


def test_a_resumable_loader_is_not_wrapped_twice() -> None:
    loader = make_resumable(DataLoader(Noisy(), BATCH))
    assert isinstance(loader, Resumable)
    assert make_resumable(loader) is loader


def test_samples_without_batches_are_divided_into_as_many_steps_for_each_rank() -> None:
    ranks = [
        make_resumable(
            DataLoader(Noisy(9), batch_size=None, shuffle=True), rank=rank, world_size=2, seed=3, shared=True
        )
        for rank in range(2)
    ]
    epochs = [[plain(batch) for batch in loader] for _ in range(2) for loader in ranks]
    assert [len(epoch) for epoch in epochs] == [5, 5, 4, 4]
    seen = [index for epoch in epochs for index, _ in epoch]
    assert sorted(seen) == sorted([*range(9), *range(9)])


# -- epochs by number


def epoch_of(loader: Any, epoch: int) -> list[Any]:
    loader.set_epoch(epoch)
    return list(map(plain, loader))


@pytest.mark.parametrize("name", LOADERS)
def test_an_epoch_that_is_set_begins_at_its_start_unless_it_was_just_loaded(name: str) -> None:
    reseed(1)
    loader = make_resumable(LOADERS[name]())
    whole = epoch_of(loader, 0)
    assert epoch_of(loader, 0) == whole
    loader.set_epoch(0)
    _ = next(iter(loader))
    state = stored(loader.state_dict())
    assert epoch_of(loader, 0) == whole
    loader.load_state_dict(state)
    assert epoch_of(loader, 0) == whole[1:]
    assert epoch_of(loader, 0) == whole
    assert (epoch_of(loader, 1) != whole) == (name != "list of tensors")


def test_batches_come_in_their_order_although_in_order_is_false() -> None:
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": 2, "shuffle": True}
    whole = list(map(plain, make_resumable(DataLoader(Noisy(), **options), seed=0)))
    for taken in range(len(whole)):
        with pytest.warns(UserWarning, match="in_order=False is not honoured"):
            loader = make_resumable(DataLoader(SlowAtFirst(), in_order=False, **options), seed=0)
        batches = iter(loader)
        seen = [plain(next(batches)) for _ in range(taken)]
        loader.load_state_dict(stored(loader.state_dict()))
        assert seen + list(map(plain, loader)) == whole


class SlowAtFirst(Noisy):
    """The first worker lags behind."""

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        time.sleep(0.02 if info is not None and info.id == 0 else 0)
        return super().__getitem__(index)


class WithAnEmptyBatch:
    """Batches of the user's own making, one of which has no samples."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([0, 1], [2], [], [3, 4], [5])

    def __len__(self) -> int:
        return 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_without_samples_is_a_batch(num_workers: int) -> None:
    def loader() -> Any:
        options: dict[str, Any] = {"batch_sampler": WithAnEmptyBatch(), "collate_fn": list, "num_workers": num_workers}
        return make_resumable(DataLoader(range(6), **options), seed=1)  # type: ignore[arg-type]

    expected = [[0, 1], [2], [], [3, 4], [5]]
    whole = loader()
    assert list(whole) == expected
    for count in range(1, 5):
        begun, resumed = loader(), loader()
        batches = iter(begun)
        assert [next(batches) for _ in range(count)] == expected[:count]
        resumed.load_state_dict(begun.state_dict())
        assert list(resumed) == expected[count:]
