"""LitData's streaming datasets: exact at the same topology, and refused at another unless the user insists."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
from torch.utils.data import DataLoader

from lightning_resume import CheckpointMismatchError, make_resumable
from lightning_resume.errors import UnsafeResumeWarning
from tests.conformance import LoaderConformance
from tests.loader_packages import package
from tests.replay import (
    assert_replays_from_every_batch,
    assert_replays_in_a_chain,
    end,
    lost_and_repeated,
    plain,
    resumable,
    run,
    stored,
)
from tests.toy_data import draw

litdata = package("litdata")
writer = package("litdata.streaming.writer")
env = package("litdata.utilities.env")
LENGTH, OTHER = 26, 10


def noisy(index: int) -> tuple[int, float]:
    return index, draw()


def write(folder: Path, start: int = 0, length: int = LENGTH) -> None:
    binary = writer.BinaryWriter(str(folder), chunk_size=3)
    for i in range(length):
        binary[i] = start + i
    binary.done()
    binary.merge()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("litdata")
    write(made / "one")
    write(made / "two", 100, OTHER)
    return made


def one(folder: Path, name: str = "one", **options: Any) -> Any:
    return litdata.StreamingDataset(str(folder / name), **{"shuffle": True, "seed": 3, "transform": noisy, **options})


def combined(folder: Path, *, seed: int = 3, **options: Any) -> Any:
    parts = [one(folder, seed=seed), one(folder, "two", seed=seed)]
    return litdata.CombinedStreamingDataset(parts, seed=seed, **{"iterate_over_all": True, **options})


def make(
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    batch_size: int = 4,
    *,
    folder: Path,
    data: Any = one,
    loader: Any = None,
    prefetch_factor: int | None = None,
    **options: Any,
) -> Any:
    """One rank's loader, which is told what a process group would tell it."""
    of_rank = env._DistributedEnv(world_size=world_size, global_rank=rank, num_nodes=1)
    with mock.patch.object(env._DistributedEnv, "detect", return_value=of_rank):
        dataset = data(folder, **options)
    loader = loader or litdata.StreamingDataLoader
    return loader(dataset, batch_size=batch_size, num_workers=num_workers, prefetch_factor=prefetch_factor)


def indices(batches: Any) -> list[int]:
    return [i for batch in batches for i in plain(batch[0])]


class TestLitData(LoaderConformance):
    length = 14
    workers: Sequence[int] = (0,)  # see below
    ends_alike = False  # the loader's own counts are those of a new one
    options: ClassVar[dict[str, Any]] = {}

    def prepare(self, folder: Path) -> None:
        write(folder / "one", length=self.length)

    def make(self, *, rank: int = 0, world_size: int = 1, seed: int = 3, **options: Any) -> Any:
        loader = make(rank, world_size, seed=seed, **options, **self.options)
        return make_resumable(loader, rank=rank, world_size=world_size, seed=seed)

    def ids(self, batch: Any) -> list[int]:
        return plain(batch[0])  # type: ignore[no-any-return]

    def noise(self, batch: Any) -> list[float] | None:
        return plain(batch[1])  # type: ignore[no-any-return]


class TestLitDataInWorkers(TestLitData):
    workers = (0, 2)

    def noise(self, batch: Any) -> None:
        """Its workers draw as they like (`Randomness.OWN`)."""

    def content(self, batch: Any) -> Any:
        return self.ids(batch)


class TestLitDataInPlainDataLoader(TestLitData):
    workers = (0, 2)
    options: ClassVar[dict[str, Any]] = {"loader": DataLoader}


KINDS: dict[str, dict[str, Any]] = {
    "in order": {"shuffle": False},
    "drop last": {"drop_last": True},
    "combined": {"data": combined},
    "combined by weights": {"data": combined, "iterate_over_all": False, "weights": [0.3, 0.7]},
}


@pytest.mark.parametrize("name", KINDS)
def test_it_resumes_exactly_from_every_batch_and_in_a_chain(name: str, folder: Path) -> None:
    made = lambda: make(folder=folder, **KINDS[name])  # noqa: E731
    assert_replays_in_a_chain(made, assert_replays_from_every_batch(made))


def test_combined_datasets_resume_exactly_in_workers(folder: Path) -> None:
    made = lambda: make(num_workers=2, batch_size=7, folder=folder, data=combined)  # noqa: E731
    assert_replays_in_a_chain(made, assert_replays_from_every_batch(made, show=samples), show=samples)


def samples(batch: Any) -> Any:
    """What comes back where the loader's own workers draw as they like."""
    return plain(batch[0])


def test_every_rank_resumes_exactly_and_all_together_see_every_sample(folder: Path) -> None:
    seen: list[int] = []
    for rank in range(2):
        made = lambda rank=rank: make(rank, 2, folder=folder, drop_last=False)  # type: ignore[misc]  # noqa: E731
        batches = assert_replays_from_every_batch(made, epochs=1, rank=rank, world_size=2)
        seen += [i for _, batch in batches for i in batch[0]]
    assert sorted(seen) == list(range(LENGTH))


def test_epochs_differ(folder: Path) -> None:
    loader = resumable(lambda: make(folder=folder))
    epochs = [indices(loader) for _ in range(3)]
    assert all(sorted(epoch) == list(range(LENGTH)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    loader.set_epoch(1)
    assert indices(loader) == epochs[1]


# -- what it gets wrong by itself


def test_stock_begins_the_epoch_again_from_a_state_at_its_last_batch_and_we_do_not(folder: Path) -> None:
    stock = make(folder=folder)
    batches = iter(stock)
    for _ in range(len(stock)):
        next(batches)
    again = make(folder=folder)
    again.load_state_dict(stock.state_dict())
    assert len(indices(again)) == LENGTH
    ours = resumable(lambda: make(folder=folder))
    _, states = run(ours, epochs=1)
    assert indices(resumable(lambda: make(folder=folder), states[-2][2])) == []


def test_stock_forgets_the_epoch_in_a_chain_of_resumes_in_workers_and_we_do_not(folder: Path) -> None:
    def loader() -> Any:
        return make(num_workers=2, batch_size=13, folder=folder)

    stock = loader()
    indices(stock)  # epoch 1
    batches = iter(stock)
    next(batches)
    state = stored(stock.state_dict())
    del batches
    again = loader()
    again.load_state_dict(state)
    next(iter(again))
    assert state["dataset"]["current_epoch"] == 2
    assert again.state_dict()["dataset"]["current_epoch"] == 1


# -- what is refused

REFUSED: dict[str, dict[str, int]] = {
    "num_workers": {"num_workers": 2},
    "batch_size": {"batch_size": 8},
    "world_size": {"world_size": 2},
}


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.parametrize("name", ["alone", "combined"])
def test_another_topology_is_refused_and_with_strict_false_goes_on(name: str, field: str, folder: Path) -> None:
    data = combined if name == "combined" else one
    loader = resumable(lambda: make(folder=folder, data=data))
    seen = indices(itertools.islice(loader, 3))
    state = stored(loader.state_dict())
    for rank in range(REFUSED[field].get("world_size", 1)):
        other = make_resumable(make(rank, folder=folder, data=data, **REFUSED[field]))
        with pytest.raises(CheckpointMismatchError, match=rf"not the same {field}(.|\n)*strict=False"):
            other.load_state_dict(state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other.load_state_dict(state, strict=False)
        assert {warning.category for warning in caught} == {UnsafeResumeWarning}
        seen += indices(other)
        end(other)
    every = [*range(LENGTH), *(range(100, 100 + OTHER) if name == "combined" else ())]
    lost, repeated = lost_and_repeated(seen, every)
    # not more than was taken before can be wrong, nor than one step is padded by
    assert lost <= 12
    assert repeated <= 12 + 8


CHANGED: dict[str, dict[str, Any]] = {
    "seed": {"seed": 4},
    "shuffle": {"shuffle": False},
    "part": {"subsample": 0.5},
}


@pytest.mark.parametrize("name", CHANGED)
def test_other_data_or_another_order_is_refused(name: str, folder: Path) -> None:
    state = resumable(lambda: make(folder=folder)).state_dict()
    other = make_resumable(make(folder=folder, **CHANGED[name]), strict=False)
    with pytest.raises(CheckpointMismatchError, match="not the same datasets"):
        other.load_state_dict(state)
