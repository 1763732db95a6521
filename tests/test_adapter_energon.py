"""Megatron-Energon's savable loader: exact, also when ranks become workers and workers ranks."""

from __future__ import annotations

import gc
import io
import itertools
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from lightning_resume import CheckpointMismatchError, make_resumable
from lightning_resume.data.adapters.energon import plain, rebuilt
from lightning_resume.data.scenarios import merged
from lightning_resume.errors import UnsafeResumeWarning
from lightning_resume.state.component import digest
from tests.conformance import LoaderConformance
from tests.loader_packages import package
from tests.replay import end, resumable, stored

energon = package("megatron.energon")
webdataset = package("megatron.energon.flavors.webdataset")
LENGTH, SHARDS = 40, 8


def write(folder: Path, length: int = LENGTH) -> None:
    """What ``energon prepare`` makes of some tar files."""
    names = [f"shard_{shard}.tar" for shard in range(SHARDS)]
    for shard, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for index in range(shard * length // SHARDS, (shard + 1) * length // SHARDS):
                info = tarfile.TarInfo(f"{index:05d}.txt")
                info.size = len(str(index))
                tar.addfile(info, io.BytesIO(str(index).encode()))
    webdataset.BaseWebdatasetFactory.prepare_dataset(
        folder, names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: TextSample\nfield_map:\n  text: txt\n"
    )


class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
    """Each sample is its number and a random augmentation."""

    def encode_sample(self, sample: Any) -> Any:
        drawn = random.random() + float(np.random.rand()) + float(torch.rand((), dtype=torch.float64))
        sample.text = f"{sample.text} {drawn!r}"
        return sample


@pytest.fixture(scope="module", autouse=True)
def keeps_what_is_there_out_of_sight() -> Iterator[None]:
    """Every worker looks through all objects that Python's garbage collector knows: a second, in all of pytest."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("energon")
    write(made)
    return made


def make(
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    batch_size: int = 5,
    *,
    folder: Path,
    seed: int = 0,
    prefetch_factor: int | None = None,
    **options: Any,
) -> Any:
    config = energon.WorkerConfig(rank=rank, world_size=world_size, num_workers=num_workers, seed_offset=seed)
    options = {"shuffle_buffer_size": 6, "max_samples_per_sequence": 3, "repeat": False, **options}
    dataset = energon.get_train_dataset(
        folder, batch_size=batch_size, worker_config=config, task_encoder=Encoder(), **options
    )
    # the garbage of all of pytest, collected at the start of every worker, takes seconds
    loader = energon.get_savable_loader(
        dataset, watchdog_timeout_seconds=None, gc_collect_every_n_steps=0, prefetch_factor=prefetch_factor or 2
    )
    loader.pin_memory = False  # it asks for it also where there is no GPU, and torch warns
    return loader


def numbers(batches: Any) -> list[int]:
    return [int(text.split()[0]) for batch in batches for text in batch.text]


def texts(batch: Any) -> list[str]:
    return list(batch.text)


def taken(loader: Any, steps: int) -> list[Any]:
    return [texts(batch) for batch in itertools.islice(loader, steps)]


class TestEnergon(LoaderConformance):
    length = 16
    world_sizes = (1, 2)  # ranks end at different steps where they have no equal parts of the shards
    batch_sizes = (4, 3)

    def prepare(self, folder: Path) -> None:
        write(folder, 16)

    def make(self, *, rank: int = 0, world_size: int = 1, batch_size: int = 4, seed: int = 3, **options: Any) -> Any:
        loader = make(rank, world_size, batch_size=batch_size, repeat=self.length is None, seed=seed, **options)
        return make_resumable(loader, rank=rank, world_size=world_size, seed=seed)

    def ids(self, batch: Any) -> list[int]:
        return numbers([batch])

    def noise(self, batch: Any) -> list[float]:
        return [float(text.split()[1]) for text in batch.text]

    def content(self, batch: Any) -> list[str]:
        return texts(batch)


class TestEnergonThatRepeats(TestEnergon):
    length = None
    called: ClassVar[dict[str, str]] = dict.fromkeys(("world_size", "num_workers"), "workers of all ranks")


def test_stock_repeats_samples_in_a_chain_of_resumes(folder: Path) -> None:
    """Counts of workers that have handed out nothing since are wrong after `restore_state_rank`: upstream 7.4."""
    made = lambda: make(num_workers=2, repeat=True, folder=folder)  # noqa: E731
    whole = made()
    expected = numbers(itertools.islice(whole, 8))
    whole._iterator._shutdown_workers()
    state, seen = None, []
    for _ in range(8):
        stock = made()
        stock.restore_state_rank(state)
        seen += numbers(itertools.islice(stock, 1))
        state = stock.save_state_rank()
        stock._iterator._shutdown_workers()
    assert seen != expected


def test_stock_takes_no_state_after_a_batch_in_process_and_we_do(folder: Path) -> None:
    made = lambda: make(repeat=True, folder=folder)  # noqa: E731
    stock = made()
    state = stock.save_state_rank()
    next(iter(stock))
    stock.restore_state_rank(state)
    with pytest.raises(AssertionError):
        next(iter(stock))
    ours = resumable(made)
    state = stored(ours.state_dict())
    expected = taken(ours, 3)
    ours.load_state_dict(state)
    assert taken(ours, 3) == expected


def test_a_position_some_batches_ago_is_known(folder: Path) -> None:
    made = lambda: make(num_workers=2, repeat=True, folder=folder)  # noqa: E731
    loader = resumable(made)
    loader.remember(4)
    batches = iter(loader)
    expected = [texts(next(batches)) for _ in range(9)]
    state = stored(loader.state_dict(behind=4))
    end(loader)
    again = resumable(made, state, seed=5)
    assert taken(again, 4) == expected[5:]
    end(again)


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_that_is_left_leads_to_the_same_next_one_after_a_resume(
    num_workers: int, repeat: bool, folder: Path
) -> None:
    made = lambda: make(num_workers=num_workers, repeat=repeat, folder=folder)  # noqa: E731
    loader = resumable(made)
    taken(loader, 2)
    batches = iter(loader)
    expected = [texts(next(batches)) for _ in range(3)]
    states = [stored(loader.state_dict(behind)) for behind in (2, 1)]
    end(loader)
    loader = resumable(made)
    taken(loader, 2)
    batches = iter(loader)
    next(batches)
    states.insert(0, stored(loader.state_dict(behind=1)))
    end(loader)
    for position, state in enumerate(states):
        again = resumable(made, state, seed=position + 5)
        assert taken(again, 3 - position) == expected[position:]
        end(again)


TOPOLOGIES = [((2, 2), (4, 1)), ((1, 2), (2, 1)), ((4, 1), (2, 2))]


@pytest.mark.parametrize(("before", "after"), TOPOLOGIES)
def test_ranks_become_workers_and_workers_ranks(before: Any, after: Any, folder: Path) -> None:
    def together(world_size: int, num_workers: int, steps: int, state: Any) -> tuple[list[int], Any]:
        seen: list[int] = []
        states = []
        for rank in range(world_size):
            loader = resumable(
                lambda rank=rank: make(rank, world_size, num_workers, repeat=True, folder=folder),  # type: ignore[misc]
                state,
                rank=rank,
                world_size=world_size,
            )
            seen += numbers(itertools.islice(loader, steps))
            states.append(stored(loader.state_dict()))
            end(loader)
        return seen, dict(merged(states))

    # every worker hands out two batches in all, now of this rank and now of that
    expected, _ = together(*before, 2 * before[1], None)
    first, state = together(*before, before[1], None)
    second, _ = together(*after, after[1], state)
    assert sorted(first + second) == sorted(expected)


def test_what_is_not_as_many_workers_is_refused_and_with_strict_false_starts_again(folder: Path) -> None:
    loader = resumable(lambda: make(1, 2, 1, repeat=True, folder=folder), rank=1, world_size=2)
    taken(loader, 2)
    state = stored(loader.state_dict())
    end(loader)
    for options, field in [
        ({"num_workers": 1}, "workers of all ranks"),
        ({"num_workers": 2, "batch_size": 4}, "batch_size"),
        ({}, "workers of all ranks"),
    ]:
        other = make_resumable(make(repeat=True, folder=folder, **options))
        with pytest.raises(CheckpointMismatchError, match=f"not the same {field}(.|\n)*strict=False"):
            other.load_state_dict(state)
    other = make_resumable(make(num_workers=1, repeat=True, folder=folder), strict=False)
    with pytest.warns(UnsafeResumeWarning, match="buffers are filled anew"):
        other.load_state_dict(state)
    fresh = make_resumable(make(num_workers=1, repeat=True, folder=folder))
    # two batches of each of two ranks are four of one
    assert numbers(itertools.islice(other, 4)) == numbers(itertools.islice(fresh, 8))[20:]
    end(other)
    end(fresh)


def test_other_data_is_refused_and_the_same_elsewhere_is_not(folder: Path, tmp_path: Path) -> None:
    state = resumable(lambda: make(folder=folder)).state_dict()
    for name, length in [("same", LENGTH), ("more", LENGTH + 8)]:
        (tmp_path / name).mkdir()
        write(tmp_path / name, length)
    resumable(lambda: make(folder=tmp_path / "same"), state)
    with pytest.raises(CheckpointMismatchError, match="not the same dataset"):
        resumable(lambda: make(folder=tmp_path / "more"), state)
    with pytest.raises(CheckpointMismatchError, match="not the same dataset"):
        resumable(lambda: make(folder=folder, shuffle_buffer_size=7), state)


def test_a_state_holds_nothing_but_plain_values_and_energons_own(folder: Path) -> None:
    loader = make(num_workers=1, folder=folder)
    taken(loader, 2)
    state = loader.save_state_rank()
    assert digest(plain(rebuilt(stored(plain(state))))) == digest(plain(state))
    loader._iterator._shutdown_workers()
    assert type(rebuilt(plain(state))) is type(state)
    with pytest.raises(TypeError, match="names os:system, which is no state of Energon's"):
        rebuilt({"type of Energon's state": "os:system", "items": []})
    with pytest.raises(TypeError, match=r"names megatron\.energon\.epathlib:EPath"):
        rebuilt({"type of Energon's state": "megatron.energon.epathlib:EPath", "items": []})
    with pytest.raises(TypeError, match=r"Path.*Only plain values"):
        plain(folder)
