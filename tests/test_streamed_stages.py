"""Filters, sequence packing and batches by length: what is grouped is found again from every batch."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_resume import BatchByLength, Packing, ShardedDataset
from lightning_resume.errors import CheckpointMismatchError
from tests.streams import LENGTH, Ranks, make, noisy, number_of, plain, samples, stored, write
from tests.toy_data import draw

EPOCHS = 2


def runs(create: Callable[..., Any], *, epochs: int = EPOCHS) -> tuple[list[Any], list[tuple[int, int, Any]]]:
    loader, batches = create(), []
    states = [(0, 0, stored(loader.state_dict()))]
    for epoch in range(epochs):
        for batch in loader:
            batches.append((epoch, plain(batch)))
            states.append((len(batches), epoch, stored(loader.state_dict())))
        states.append((len(batches), epoch + 1, stored(loader.state_dict())))
    return batches, states


def replays(create: Callable[..., Any]) -> None:
    """Asserts that the run goes on exactly from every batch."""
    batches, states = runs(create)
    assert len(batches) > 4
    for taken, ended, state in states:
        loader = create()
        loader.load_state_dict(state)
        rest = [(epoch, plain(batch)) for epoch in range(ended, EPOCHS) for batch in loader]
        assert rest == batches[taken:], (taken, ended)


# -- filters


def odd(sample: Any) -> bool:
    return number_of(sample) % 2 == 1


def half(_sample: Any) -> bool:
    """Draws: which samples are left out is keyed by sample, too."""
    return draw() < 1.5


@pytest.mark.parametrize("name", ["jsonl", "tar", "parquet"])
@pytest.mark.parametrize("chosen", [odd, half])
def test_a_filter_counts_inputs_and_replays(tmp_path: Path, name: str, chosen: Callable[[Any], bool]) -> None:
    create = functools.partial(make, write(tmp_path / "data", name), name, lanes=2, filter=chosen, batch_size=2)
    replays(create)
    if chosen is odd:
        numbers = [number_of(sample) for batch in create() for sample in batch]
        assert sorted(numbers) == list(range(1, LENGTH, 2))


def test_a_filter_that_leaves_out_everything_is_an_empty_epoch(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    loader = make(folder, filter=lambda _: False)
    assert [list(loader) for _ in range(2)] == [[], []]
    ranks = Ranks(lambda **options: make(folder, filter=lambda _: False, **options), 2)
    assert [ranks.epoch() for _ in range(2)] == [[], []]


def test_a_filter_leaves_the_random_numbers_of_samples_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    kept = {number_of(s): plain(s) for batch in make(folder, filter=odd) for s in batch}
    everything = {number_of(s): plain(s) for batch in make(folder) for s in batch}
    assert kept == {number: everything[number] for number in range(1, LENGTH, 2)}


LEGS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=4)


@settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(legs=LEGS, lanes=st.integers(1, 4))
def test_filtered_samples_come_once_through_every_change(
    tmp_path: Path, legs: list[tuple[int, int, int]], lanes: int
) -> None:
    folder = tmp_path / "data"
    if not folder.exists():
        write(folder, "jsonl")
    seen, left = chained(functools.partial(make, folder, filter=odd, lanes=lanes), legs, samples)
    assert sorted([*seen, *left]) == list(range(1, LENGTH, 2))


def chained(
    create: Callable[..., Any], legs: list[tuple[int, int, int]], read: Callable[[Any], list[Any]]
) -> tuple[list[Any], list[Any]]:
    """What the first epoch of a chain of runs gives, and what it leaves to the next."""
    states: list[Any] = []
    seen: list[Any] = []
    for world_size, batch_size, steps in [*legs, (*legs[-1][:2], 1000)]:
        ranks = Ranks(create, world_size, states=states, batch_size=batch_size)
        for _ in range(steps):
            step = ranks.step()
            if step is None:
                alone = Ranks(create, 1, states=ranks.states(), batch_size=batch_size)
                following = read(alone.epoch())
                fresh = Ranks(create, 1, batch_size=batch_size)
                fresh.epoch()
                for item in read(fresh.epoch()):
                    following.remove(item)
                assert len(following) < world_size
                return seen, following
            seen += read([step])
        states = ranks.states()
    raise AssertionError("the epoch did not end")


# -- packing


def tokens(sample: Any) -> list[int]:
    """A document of a length of its own, which says whose it is."""
    number = int(sample["id"])
    return [1000 + number] * (number * 7 % 11)


def pack(folder: Path, **options: Any) -> Any:
    group = options.pop("group", Packing(8, eos=1))
    return make(folder, transform=tokens, group=group, **{"lanes": 2, "batch_size": 2, **options})


@pytest.mark.parametrize(
    "group",
    [
        Packing(8, eos=1),
        Packing(8, eos=1, last="drop"),
        Packing(3),
        Packing(8, across=False, segments=True),
        Packing(30, segments=True),
    ],
    ids=["eos", "drop", "short", "not across", "long"],
)
def test_packing_replays_from_every_batch(tmp_path: Path, group: Packing) -> None:
    folder = write(tmp_path / "data", "jsonl", (20, 3, 40, 11))
    replays(lambda: pack(folder, group=group))


def all_tokens(steps: Any) -> list[int]:
    rows = [row for batches in steps for batch in batches for row in batch]
    return [int(token) for row in rows for token in row["input_ids"] if token]


def test_packing_holds_every_token_once_and_keeps_documents_together(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    packed = [row["input_ids"].tolist() for batch in pack(folder, lanes=1) for row in batch]
    assert {len(row) for row in packed} == {8}
    flat = [token for row in packed for token in row]
    while flat[-1] == 0:
        flat.pop()
    documents = [tokens({"id": number}) for number in range(LENGTH)]
    assert sorted(flat) == sorted(token for document in documents for token in [*document, 1])
    assert 0 not in flat
    runs_of_one = [token for token, before in zip(flat, [0, *flat], strict=False) if token != before and token != 1]
    assert len(runs_of_one) == len(set(runs_of_one)) == sum(bool(document) for document in documents)


def test_segments_and_positions_tell_documents_apart(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("5 5 5\n6 6\n7 7 7 7 7\n8\n")
    split = lambda line: list(map(int, line.split()))  # noqa: E731
    rows = lambda **options: [  # noqa: E731
        {name: value.tolist() for name, value in row.items()}
        for batch in ShardedDataset.create_dataloader(
            folder, format="text", transform=split, collate_fn=list, group=Packing(4, segments=True, **options)
        )[0]
        for row in batch
    ]
    assert rows() == [
        {"input_ids": [5, 5, 5, 6], "segment_ids": [1, 1, 1, 2], "position_ids": [0, 1, 2, 0]},
        {"input_ids": [6, 7, 7, 7], "segment_ids": [1, 2, 2, 2], "position_ids": [0, 0, 1, 2]},
        {"input_ids": [7, 7, 8, 0], "segment_ids": [1, 1, 2, 0], "position_ids": [0, 1, 0, 0]},
    ]
    assert [row["input_ids"] for row in rows(last="drop")] == [[5, 5, 5, 6], [6, 7, 7, 7]]
    assert rows(across=False, pad=9) == [
        {"input_ids": [5, 5, 5, 9], "segment_ids": [1, 1, 1, 0], "position_ids": [0, 1, 2, 0]},
        {"input_ids": [6, 6, 9, 9], "segment_ids": [1, 1, 0, 0], "position_ids": [0, 1, 0, 0]},
        {"input_ids": [7, 7, 7, 7], "segment_ids": [1, 1, 1, 1], "position_ids": [0, 1, 2, 3]},
        {"input_ids": [8, 9, 9, 9], "segment_ids": [1, 0, 0, 0], "position_ids": [0, 0, 0, 0]},
    ]


def test_packed_batches_are_tensors(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    loader, _ = ShardedDataset.create_dataloader(
        folder,
        format="jsonl",
        transform=lambda s: {"ids": torch.tensor(tokens(s), dtype=torch.int32)},
        group=Packing(8, key="ids"),
        batch_size=2,
    )
    first = next(iter(loader))
    assert first["ids"].shape == (2, 8)


@settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(legs=LEGS, lanes=st.integers(1, 4))
def test_every_token_comes_once_through_every_change(
    tmp_path: Path, legs: list[tuple[int, int, int]], lanes: int
) -> None:
    folder = tmp_path / "data"
    if not folder.exists():
        write(folder, "jsonl")
    create = lambda **options: pack(folder, **{**options, "lanes": lanes})  # noqa: E731
    states: list[Any] = []
    seen: list[int] = []
    for world_size, batch_size, steps in [*legs, (1, 2, 1000)]:
        ranks = Ranks(create, world_size, states=states, batch_size=batch_size)
        for _ in range(steps):
            step = ranks.step()
            if step is None:
                break
            seen += all_tokens([step])
        states = ranks.states()
        if states[0]["epoch"] or states[0]["ended"]:
            break
    expected = [token for n in range(LENGTH) for token in [*tokens({"id": n}), 1]]
    if world_size == 1 or not any(cursor[0] == -3 for state in states for cursor in state["lanes"].values()):
        assert sorted(seen) == sorted(expected)


def test_what_cannot_be_packed_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    with pytest.raises(ValueError, match=r"shard-\d\.jsonl: a sample to pack is one list of whole numbers"):
        list(make(folder, transform=lambda _: [1.5], group=Packing(4)))
    with pytest.raises(ValueError, match="has no 'ids'; it has"):
        list(make(folder, transform=None, group=Packing(4, key="ids")))
    for wrong in ({"length": 0}, {"length": 4, "last": "keep"}):
        with pytest.raises(ValueError, match=r"pass|at least"):
            Packing(**wrong)


def test_another_packing_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    state = stored(pack(folder).state_dict())
    with pytest.raises(CheckpointMismatchError, match="not the same group"):
        pack(folder, group=Packing(9, eos=1)).load_state_dict(state)


# -- batches by length


def long(sample: Any) -> str:
    return f"{int(sample['id']):03}" + "x" * (int(sample["id"]) * 13 % 17)


def by_length(folder: Path, *, lanes: int = 2, batch_size: int = 3, **options: Any) -> Any:
    group = BatchByLength(**{"window": 10, **options.pop("group", {})})
    return make(folder, transform=long, group=group, lanes=lanes, batch_size=batch_size, **options)


@pytest.mark.parametrize("group", [{}, {"max_tokens": 40}, {"boundaries": [6, 12]}, {"shuffle": False}])
def test_batches_by_length_replay_from_every_batch(tmp_path: Path, group: dict[str, Any]) -> None:
    folder = write(tmp_path / "data", "jsonl", (20, 3, 40, 11))
    replays(lambda: by_length(folder, group=group))


def test_batches_hold_similar_lengths_and_as_many_as_fit(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl", (60, 40))
    batches = list(by_length(folder, group={"max_tokens": 60, "window": 50}))
    assert sorted(text for batch in batches for text in batch) == sorted(long({"id": n}) for n in range(100))
    assert all(len(batch) * max(map(len, batch)) <= 60 for batch in batches)
    padding = sum(len(batch) * max(map(len, batch)) - sum(map(len, batch)) for batch in batches)
    assert padding < 0.1 * sum(len(text) for batch in batches for text in batch)
    assert [len(batch[0]) for batch in batches] != sorted(len(batch[0]) for batch in batches)
    for batch in by_length(folder, group={"boundaries": [6, 12]}):
        assert len({(len(text) >= 6) + (len(text) >= 12) for text in batch}) == 1


def test_a_sample_that_is_longer_than_all_that_fits_is_a_batch_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl", (20,))
    batches = list(by_length(folder, group={"max_tokens": 10}))
    assert all(len(batch) == 1 for batch in batches if max(map(len, batch)) > 5)
    assert sum(map(len, batches)) == 20


@settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(legs=LEGS, lanes=st.integers(1, 4), most=st.sampled_from([None, 40]))
def test_samples_by_length_come_once_through_every_change(
    tmp_path: Path, legs: list[tuple[int, int, int]], lanes: int, most: int | None
) -> None:
    folder = tmp_path / "data"
    if not folder.exists():
        write(folder, "jsonl")
    create = functools.partial(by_length, folder, lanes=lanes, group={"max_tokens": most})
    read = lambda steps: [text for batches in steps for batch in batches for text in batch]  # noqa: E731
    seen, left = chained(create, legs, read)
    assert sorted([*seen, *left]) == sorted(long({"id": n}) for n in range(LENGTH))


def test_arguments_out_of_bounds_are_refused() -> None:
    for wrong in ({"window": 0}, {"max_tokens": 0}, {"boundaries": [5, 3]}):
        with pytest.raises(ValueError, match="pass"):
            BatchByLength(**wrong)  # type: ignore[arg-type]


def test_the_random_numbers_of_packed_samples_do_not_depend_on_workers(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl", (20, 3, 40, 11))
    random.seed(1)
    create = functools.partial(
        make, folder, lanes=4, transform=lambda s: [int(noisy(s)["noise"] * 1e9)] * 3, group=Packing(8)
    )
    alone, _ = runs(create, epochs=1)
    with_workers, _ = runs(functools.partial(create, num_workers=2), epochs=1)
    assert with_workers == alone
