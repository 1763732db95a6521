"""Hugging Face datasets, map-style and iterable, in DataLoader and StatefulDataLoader."""

from __future__ import annotations

import itertools
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_resume import CheckpointMismatchError, make_resumable
from lightning_resume.data.capabilities import Randomness
from lightning_resume.data.loader import ElasticLoader
from lightning_resume.errors import UnsafeResumeWarning
from tests.conformance import LoaderConformance
from tests.replay import (
    assert_replays_from_every_batch,
    assert_replays_in_a_chain,
    lost_and_repeated,
    plain,
    resumable,
    stored,
)
from tests.toy_data import draw

datasets = pytest.importorskip("datasets")
split_dataset_by_node = pytest.importorskip("datasets.distributed").split_dataset_by_node
LENGTH, SHARDS = 26, 4


def table(length: int = LENGTH) -> Any:
    return datasets.Dataset.from_dict({"i": list(range(length)), "text": [str(i) * 2 for i in range(length)]})


def generate(shards: list[int]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for i in range(shard, LENGTH, SHARDS):
            yield {"i": i}


def stream() -> Any:
    return datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": list(range(SHARDS))})


def arrow(length: int = LENGTH) -> Any:
    return table(length).to_iterable_dataset(num_shards=SHARDS)


def noisy(_example: dict[str, Any]) -> dict[str, Any]:
    return {"noise": draw()}


def doubled(example: dict[str, Any]) -> dict[str, Any]:
    return {"twice": example["i"] * 2}


def doubled_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {"i": [i for i in batch["i"] for _ in range(2)]}


def is_odd(example: dict[str, Any]) -> bool:
    return bool(example["i"] % 2)


STREAMS: dict[str, Callable[[], Any]] = {
    "generator": stream,
    "arrow": arrow,
    "map": lambda: arrow().map(doubled),
    "batched map": lambda: arrow().map(doubled_batch, batched=True, batch_size=3, remove_columns=["text"]),
    "filter": lambda: arrow().filter(is_odd),
    "skip and take": lambda: arrow().skip(3).take(17),
    "interleaved": lambda: datasets.interleave_datasets([arrow(), arrow().filter(is_odd)], seed=3),
    "concatenated": lambda: datasets.concatenate_datasets([arrow(), arrow()]),
    "torch": lambda: arrow().select_columns(["i"]).with_format("torch"),
    "numpy, batched map": lambda: (
        arrow().with_format("numpy").map(doubled_batch, batched=True, batch_size=3, remove_columns=["text"])
    ),
    "shuffled": lambda: arrow().shuffle(seed=5, buffer_size=6),
    "shuffled generator": lambda: stream().shuffle(seed=5, buffer_size=6),
    "split by node": lambda: split_dataset_by_node(arrow(), 1, 2),
    "split by node, examples": lambda: split_dataset_by_node(arrow(), 1, 3),
}


def make(
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    batch_size: int = 4,
    *,
    data: Any = "arrow",
    loader: Any = DataLoader,
    **options: Any,
) -> Any:
    dataset = STREAMS[data]() if isinstance(data, str) else data
    if world_size > 1:
        dataset = split_dataset_by_node(dataset, rank, world_size)
    return loader(dataset, batch_size, num_workers=num_workers, **options)


class TestStream(LoaderConformance):
    length = 14
    world_sizes = (1, 2)  # its ranks have different numbers of samples where shards cannot be dealt evenly
    seed_shuffles = False
    loader_class: ClassVar[Any] = DataLoader

    def make(self, *, folder: Path, rank: int = 0, world_size: int = 1, seed: int = 3, **options: Any) -> Any:
        data = arrow(self.length)
        if self.seed_shuffles:
            data = data.shuffle(seed=seed, buffer_size=6)
        loader = make(rank, world_size, data=data.map(noisy), loader=self.loader_class, **options)
        return make_resumable(loader, rank=rank, world_size=world_size, seed=seed)

    def ids(self, batch: Any) -> list[int]:
        return plain(batch["i"])  # type: ignore[no-any-return]

    def noise(self, batch: Any) -> list[float]:
        return plain(batch["noise"])  # type: ignore[no-any-return]


class TestStreamInStatefulDataLoader(TestStream):
    loader_class: ClassVar[Any] = StatefulDataLoader
    ends_alike = False  # the loader's own counts are those of a new one


class TestShuffledStream(TestStream):
    workers = (0,)  # read again there, too, as above
    seed_shuffles = True


class TestTable(TestStream):
    world_sizes = (1, 2, 3)
    workers = (0,)  # it is in the order of every map-style dataset

    def make(  # type: ignore[override]
        self, *, folder: Path, rank: int = 0, world_size: int = 1, batch_size: int = 4, seed: int = 3, **options: Any
    ) -> Any:
        loader = DataLoader(table(self.length).with_transform(augmented), batch_size, shuffle=True, **options)
        return make_resumable(loader, rank=rank, world_size=world_size, seed=seed, shared=True)


IN_STATEFUL = ("arrow", "batched map", "interleaved", "split by node", "shuffled")


@pytest.mark.parametrize(
    ("data", "loader"),
    [*((data, DataLoader) for data in STREAMS), *((data, StatefulDataLoader) for data in IN_STATEFUL)],
)
def test_a_stream_resumes_exactly_from_every_batch_and_in_a_chain(data: str, loader: Any) -> None:
    made = lambda: make(data=data, loader=loader)  # noqa: E731
    assert_replays_in_a_chain(made, assert_replays_from_every_batch(made))


def test_a_shuffled_stream_in_workers_resumes_exactly() -> None:
    made = lambda: make(num_workers=2, batch_size=9, data="shuffled generator")  # noqa: E731
    assert_replays_in_a_chain(made, assert_replays_from_every_batch(made))


@pytest.mark.parametrize("data", ["arrow", "shuffled"])
def test_a_stream_in_persistent_workers_resumes_exactly(data: str) -> None:
    options = {"loader": StatefulDataLoader, "persistent_workers": True}
    made = lambda: make(num_workers=1, batch_size=9, data=data, **options)  # noqa: E731
    assert_replays_from_every_batch(made)


def indices(batches: Any) -> list[int]:
    return [i for batch in batches for i in plain(batch["i"])]


def test_a_shuffled_stream_has_another_order_in_each_epoch_and_every_sample_once() -> None:
    loader = resumable(lambda: make(data="shuffled"))
    first, second = indices(loader), indices(loader)
    assert sorted(first) == sorted(second) == list(range(LENGTH))
    assert first != second


def test_an_epoch_that_the_user_sets_stays_and_comes_back() -> None:
    dataset = arrow().shuffle(seed=5, buffer_size=6)
    dataset.set_epoch(7)
    expected = indices(DataLoader(dataset, 4))
    loader = make_resumable(DataLoader(dataset, 4))
    batches = iter(loader)
    seen = indices(itertools.islice(batches, 2))
    again = resumable(lambda: make(data="shuffled"), stored(loader.state_dict()))
    assert seen + indices(again) == expected


def test_splitting_by_node_gives_each_rank_its_own() -> None:
    seen = []
    for rank in range(2):
        seen += indices(resumable(lambda: make(rank, 2), rank=rank, world_size=2))  # noqa: B023
    assert sorted(seen) == list(range(LENGTH))


# -- what it gets wrong by itself


def test_stock_loses_the_shuffle_buffer_and_we_do_not() -> None:
    stock = make(data="shuffled")
    batches = iter(stock)
    seen = indices(itertools.islice(batches, 3))
    state = stock.dataset.state_dict()
    batches._dataset_fetcher.dataset_iter.close()  # type: ignore[attr-defined]  # ends its threads
    again = make(data="shuffled")
    again.dataset.load_state_dict(state)
    seen += indices(again)
    assert lost_and_repeated(seen, range(LENGTH)) != (0, 0)

    ours = resumable(lambda: make(data="shuffled"))
    seen = indices(itertools.islice(ours, 3))
    seen += indices(resumable(lambda: make(data="shuffled"), stored(ours.state_dict())))
    assert lost_and_repeated(seen, range(LENGTH)) == (0, 0)


def test_stock_goes_on_from_a_state_in_every_later_epoch_and_we_do_not() -> None:
    stock = make()
    next(iter(stock))
    state = stock.dataset.state_dict()
    again = make()
    again.dataset.load_state_dict(state)
    assert [len(indices(again)) for _ in range(2)] == [LENGTH - 4] * 2

    ours = resumable(make)
    next(iter(ours))
    resumed = resumable(make, stored(ours.state_dict()))
    assert [len(indices(resumed)) for _ in range(2)] == [LENGTH - 4, LENGTH]


# -- what is refused

REFUSED = {
    "num_workers": {"num_workers": 2},
    "batch_size": {"batch_size": 2},
    "world_size": {"world_size": 2},
}


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.parametrize("data", ["arrow", "shuffled"])
def test_another_topology_is_refused_and_with_strict_false_goes_on(data: str, field: str) -> None:
    first = resumable(lambda: make(data=data))
    seen = indices(itertools.islice(first, 3))
    state = stored(first.state_dict())
    options = {"world_size": 1, **REFUSED[field]}
    other = make_resumable(make(data=data, **options), world_size=options["world_size"])  # type: ignore[arg-type]
    with pytest.raises(CheckpointMismatchError, match=rf"not the same {field}(.|\n)*strict=False"):
        other.load_state_dict(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_state_dict(state, strict=False)
    assert {warning.category for warning in caught} == {UnsafeResumeWarning}
    assert field in str(caught[0].message)
    rest = indices(other)
    if field != "world_size":
        lost, repeated = lost_and_repeated(seen + rest, range(LENGTH))
        assert max(lost, repeated) <= 12
        assert len(seen) + len(rest) == LENGTH


def test_another_node_split_is_refused_although_the_world_size_is_the_same() -> None:
    first = resumable(lambda: make(1, 2))
    with pytest.raises(CheckpointMismatchError, match="not the same split_dataset_by_node"):
        resumable(make, first.state_dict())


CHANGED: dict[str, Callable[[], Any]] = {
    "another seed": lambda: arrow().shuffle(seed=6, buffer_size=6),
    "no seed": lambda: arrow().shuffle(buffer_size=6),
    "another pipeline": lambda: arrow().filter(is_odd).shuffle(seed=5, buffer_size=6),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_pipeline_is_refused(name: str) -> None:
    state = resumable(lambda: make(data="shuffled")).state_dict()
    other = make_resumable(DataLoader(CHANGED[name](), 4), strict=False)
    with pytest.raises(CheckpointMismatchError, match="not the same steps and seeds"):
        other.load_state_dict(state)


# -- map-style


def augmented(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        "i": batch["i"],
        "noise": [random.random() + float(np.random.rand()) + float(torch.rand(())) for _ in batch["i"]],
    }


TABLES: dict[str, Callable[[], Any]] = {
    "plain": table,
    "torch": lambda: table().select_columns(["i"]).with_format("torch"),
    "transform": lambda: table().with_transform(augmented),
    "shuffled": lambda: table().shuffle(seed=4),
    "mapped": lambda: table().map(doubled),
    "selected": lambda: table().select(range(3, 21)),
}


@pytest.mark.parametrize("data", TABLES)
def test_a_table_gets_the_elastic_order(data: str) -> None:
    made = lambda: DataLoader(TABLES[data](), 4, shuffle=True)  # noqa: E731
    assert isinstance(make_resumable(made()), ElasticLoader)
    assert_replays_in_a_chain(made, assert_replays_from_every_batch(made))


def test_a_table_in_workers_resumes_exactly() -> None:
    made = lambda: DataLoader(TABLES["transform"](), 13, shuffle=True, num_workers=2)  # noqa: E731
    assert_replays_from_every_batch(made)


def test_a_transforms_random_numbers_are_keyed_by_the_batch() -> None:
    """It is given the whole batch at once, so what it draws for a sample may depend on the others: declared."""
    noises = []
    for batch_size in (4, 4, 5):
        loader = resumable(lambda: DataLoader(table().with_transform(augmented), batch_size, shuffle=True))  # noqa: B023
        assert loader.capabilities.randomness is Randomness.POSITION
        noises.append({i: n for batch in loader for i, n in zip(plain(batch["i"]), plain(batch["noise"]), strict=True)})
    assert noises[0] == noises[1] != noises[2]
    one_by_one = [
        resumable(lambda: DataLoader(torch.utils.data.Subset(table().with_transform(augmented), range(LENGTH)), size))  # noqa: B023
        for size in (4, 5)
    ]
    assert [loader.capabilities.randomness for loader in one_by_one] == [Randomness.SAMPLE] * 2
    first, second = (
        {i: n for batch in loader for i, n in zip(plain(batch["i"]), plain(batch["noise"]), strict=True)}
        for loader in one_by_one
    )
    assert first == second


def test_a_table_without_transform_draws_nothing_so_that_all_may_change() -> None:
    assert make_resumable(DataLoader(table(), 4)).capabilities.randomness is Randomness.SAMPLE


def test_the_fingerprint_is_of_the_rows_not_of_how_they_are_shown() -> None:
    state = resumable(lambda: DataLoader(table(), 4, shuffle=True)).state_dict()
    for same in (TABLES["torch"](), table().with_transform(lambda batch: batch), table().with_format("numpy")):
        if "text" in same.column_names:
            resumable(lambda: DataLoader(same, 4, shuffle=True), state)  # noqa: B023
    others = [
        table().shuffle(seed=4),
        table().map(lambda row: {"i": row["i"] + 1}),
        table().select(range(LENGTH)[::-1]),
    ]
    for other in others:
        with pytest.raises(CheckpointMismatchError, match="fingerprint"):
            resumable(lambda: DataLoader(other, 4, shuffle=True), state)  # noqa: B023


logging.getLogger("datasets").setLevel(logging.ERROR)
