"""Ranks that do not agree on their data: found out before a sample is lost, and what can be settled is."""

from __future__ import annotations

import collections
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_resume import (
    ElasticSampler,
    OutOfStepError,
    RankLostError,
    ResumableDataLoader,
    ResumableDDPStrategy,
    ShardedDataset,
    dispatched,
    make_resumable,
)
from lightning_resume._distributed import RemoteError
from lightning_resume.data.sharded import files, peers
from lightning_resume.data.transport import Channel
from tests import runs, streams
from tests.harness import Launch, zygote
from tests.toy_data import Noisy
from tests.toy_shards import TOTAL, write_parquet

SHARDS = (7, 1, 11, 20, 4)
LENGTHS = {"parquet": TOTAL, "jsonl": sum(SHARDS)}


@pytest.fixture(scope="module", autouse=True)
def _zygote_lives_on() -> None:
    zygote()  # started here, it is not taken for something that a test left behind


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "data" / "parquet")
    streams.write(tmp_path / "data" / "jsonl", "jsonl", SHARDS)
    return tmp_path / "data"


def launch(check: Callable[..., None], data: Path, *, seconds: float = 60, world_size: int = 2) -> None:
    arguments = {"name": check.__name__, "data": str(data), "seconds": seconds}
    function = "tests.test_rank_agreement:start"
    zygote().run(
        Launch(function=function, arguments=arguments, world_size=world_size, folder=data / "out", seconds=100)
    )


def start(*, folder: Path, name: str, data: str, seconds: float) -> None:
    assert folder.is_dir()
    if not name.startswith("through_fabric"):
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    globals()[name](Path(data))
    runs.end_processes()


def make(data: Path, format: str, **options: Any) -> Any:
    settings = {"batch_size": 3, "shuffle": True, "output": "python", "window": 2, **options}
    return ShardedDataset.create_dataloader(data / format, format=format, **settings)[0]


def ids(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch["id"]]


def gathered(value: Any) -> list[Any]:
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def assert_once(mine: list[int], length: int) -> None:
    """Whether the ranks together have seen each of ``length`` samples once."""
    seen = collections.Counter(number for of_rank in gathered(mine) for number in of_rank)
    assert seen == dict.fromkeys(range(length), 1)


def in_step(batches: Any) -> Any:
    for batch in batches:
        dist.all_reduce(torch.ones(1))  # as training does: ranks that take other numbers of batches would hang
        yield batch


# -- what need not be the same


def check_workers(data: Path) -> None:
    rank = dist.get_rank()
    for format, options in (("parquet", {}), ("jsonl", {}), ("jsonl", {"lanes": 4})):
        loader = make(data, format, num_workers=[0, 2][rank], **options)
        assert_once(ids(in_step(loader)), LENGTHS[format])
        taken = [batch for _, batch in zip(range(4), in_step(loader), strict=False)]
        states = gathered(loader.state_dict())
        again = make(data, format, num_workers=[2, 1][rank], **options)
        again.load_state_dict(states if format == "jsonl" else states[0])
        assert_once(ids(taken) + ids(in_step(again)), LENGTHS[format])
        assert_once(ids(in_step(again)), LENGTHS[format])


def test_ranks_with_other_numbers_of_workers_see_every_sample_once(data: Path) -> None:
    launch(check_workers, data)


def check_unbegun(data: Path) -> None:
    rank = dist.get_rank()
    states = gathered(make(data, "jsonl", num_workers=[2, 0][rank]).state_dict())
    again = make(data, "jsonl", num_workers=1)
    again.load_state_dict(states)
    assert_once(ids(in_step(again)), LENGTHS["jsonl"])


def test_a_stream_saved_before_its_first_batch_goes_on_with_other_workers(data: Path) -> None:
    launch(check_unbegun, data)


def check_seeds(_data: Path) -> None:
    torch.manual_seed(100 + dist.get_rank())
    loader = ResumableDataLoader(Noisy(40), batch_size=4, shuffle=True)
    for _ in range(2):
        assert_once([index for indices, _ in loader for index in indices.tolist()], 40)
    assert len(set(gathered(loader.state_dict()["order"]["seed"]))) == 1
    assert_once([index for batch in ElasticSampler(range(40), 4, seed=None) for index in batch], 40)


def test_without_a_seed_all_ranks_take_that_of_rank_0(data: Path) -> None:
    launch(check_seeds, data)


# -- what must be the same


def differing(rank: int, data: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    """What makes and reads loaders that differ, with what is said of them."""
    other = [3, 5][rank]
    lazily = lambda **options: lambda: next(iter(make(data, "jsonl", **options)))  # noqa: E731
    return {
        "batch size": (lambda: make(data, "parquet", batch_size=other), "parquet.*not the same batch_size"),
        "seed": (lambda: make(data, "parquet", seed=other), "not the same seed"),
        "window": (lambda: make(data, "parquet", window=other), "not the same window"),
        "stream's batch size": (lazily(batch_size=other), "jsonl.*not the same batch_size"),
        "stream's seed": (lazily(seed=other), "not the same seed"),
        "stream's lanes": (lazily(lanes=other), "not the same lanes"),
        "loader": (
            lambda: ResumableDataLoader(Noisy(40), other),
            "the setup of the sequential loader: not the same batch_size",
        ),
        "dataset": (lambda: ResumableDataLoader(Noisy(10 * other), 3), "not the same length of the dataset"),
        "sampler": (lambda: ElasticSampler(range(40), 3, seed=other), r"ElasticSampler\(\): not the same seed"),
        "seed given on one": (
            lambda: ElasticSampler(range(40), 3, seed=[3, None][rank]),
            r"ElasticSampler\(\): not the same seed",
        ),
    }


def check_differences(data: Path) -> None:
    rank = dist.get_rank()
    for name, (act, says) in differing(rank, data).items():
        with pytest.raises(OutOfStepError, match=says) as caught:
            act()
        assert len(set(gathered(str(caught.value)))) == 1, name
        values = "\n  rank 0: 3.*\n  rank 1: none" if name == "seed given on one" else r"\n  rank 0: 30?\n  rank 1: 50?"
        caught.match(f"not the same .*:{values}")
        caught.match("samples would repeat or be lost. Give all ranks the same data and arguments")


def test_what_differs_is_named_on_every_rank_with_its_values(data: Path) -> None:
    launch(check_differences, data)


def check_positions(data: Path) -> None:
    loader = make(data, "jsonl")
    batches = iter(loader)
    next(batches), next(batches)
    states = gathered(loader.state_dict())
    again = make(data, "jsonl")
    if dist.get_rank() == 1:
        again.load_state_dict(states)
    with pytest.raises(OutOfStepError, match=r"not the same batches taken of it:\n  rank 0: 0\n  rank 1: 2"):
        next(iter(again))


def test_a_stream_that_one_rank_did_not_restore_is_refused(data: Path) -> None:
    launch(check_positions, data)


def check_earlier_states(data: Path) -> None:
    loader = make(data, "jsonl")
    taken = [batch for _, batch in zip(range(2), in_step(loader), strict=False)]
    states = [
        {name: part for name, part in state.items() if name != "batches"} for state in gathered(loader.state_dict())
    ]
    again = make(data, "jsonl")
    again.load_state_dict(states)
    assert_once(ids(taken) + ids(in_step(again)), LENGTHS["jsonl"])
    assert_once(ids(in_step(again)), LENGTHS["jsonl"])


def test_a_stream_goes_on_from_states_that_do_not_count_batches(data: Path) -> None:
    launch(check_earlier_states, data)


# -- files


def list_late(*late: str) -> None:
    """Has this process's storage leave files out of its lists, as object stores do with new ones for a while."""
    whole = files._found

    def found(*arguments: Any) -> Any:
        base, listed = whole(*arguments)
        return base, [(name, size) for name, size in listed if not name.endswith(late)]

    files._found = found


def check_listing(data: Path) -> None:
    if dist.get_rank() == 1:
        list_late("-002.parquet", "-2.jsonl")
    for format, length in LENGTHS.items():
        assert_once(ids(in_step(make(data, format, num_workers=1))), length)


def test_the_files_are_those_that_rank_0_lists(data: Path) -> None:
    launch(check_listing, data)


def check_growth(data: Path) -> None:
    old = {format: make(data, format) for format in LENGTHS}
    taken = {format: next(iter(loader)) for format, loader in old.items()}
    states = {format: gathered(loader.state_dict()) for format, loader in old.items()}
    if dist.get_rank() == 0:
        write_parquet(data / "parquet", (9,), first=TOTAL, name="what came later")
        streams.write(data / "jsonl", "jsonl", (9,), first=sum(SHARDS), begin=9)
    else:
        list_late("later-000.parquet", "-9.jsonl")
    dist.barrier()
    for format, length in LENGTHS.items():
        loader = make(data, format, append_files=True)
        loader.load_state_dict(states[format] if format == "jsonl" else states[format][0])
        assert_once(taken[format]["id"] + ids(in_step(loader)), length)
        assert_once(ids(in_step(loader)), length + 9)


def test_files_that_rank_0_lists_are_appended_on_all_ranks(data: Path) -> None:
    launch(check_growth, data)


def check_missing_files(data: Path) -> None:
    rank = dist.get_rank()
    if rank == 0:
        streams.write(data / "0", "jsonl", SHARDS)
        streams.write(data / "1", "jsonl", SHARDS[:-1])
        (data / "2").mkdir()
    dist.barrier()
    with pytest.raises(OutOfStepError, match=r"rank 1: 1 missing or of another size \(shard-4.jsonl\)"):
        ShardedDataset.create_dataloader(data / str(rank), format="jsonl")
    with pytest.raises((FileNotFoundError, RemoteError)[rank == 0], match="There are no files"):  # type: ignore[call-overload]
        ShardedDataset.create_dataloader(data / ("0", "2")[rank], format="jsonl")


def test_files_that_a_rank_does_not_have_are_named_on_all(data: Path) -> None:
    launch(check_missing_files, data)


# -- who waits for whom


def check_tail(data: Path) -> None:
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()

    def refuse(sample: Any) -> Any:
        if rank == 1:
            raise RuntimeError("of this rank alone")
        return sample

    loader, began = make(data, "jsonl", batch_size=50, transform=refuse), time.monotonic()
    with pytest.raises(RuntimeError, match=("Another rank failed while it read", "of this rank alone")[rank]):
        next(iter(loader))
    assert time.monotonic() - began < 10
    dist.barrier()  # rank 1 has not ended meanwhile, which would have told rank 0
    assert store.check(["nothing"]) is False


def test_an_error_in_the_tail_reaches_the_other_ranks_at_once(data: Path) -> None:
    launch(check_tail, data)


def check_lost(data: Path) -> None:
    store = dist.distributed_c10d._get_default_store()
    loader = make(data, "jsonl")
    if dist.get_rank() == 0:
        batches = iter(loader)
        with pytest.raises(RankLostError, match="waited 3 s for rank 1, which did not call it"):
            next(batches)
        store.set("gave up", "")
    else:
        store.wait(["gave up"], datetime.timedelta(seconds=60))
        with pytest.raises(RankLostError, match="waited 3 s for rank 1"):
            next(iter(loader))
    for group in (peers._gloo_group(), Channel()._group or dist.group.WORLD):
        assert group._get_backend(torch.device("cpu")).options._timeout == datetime.timedelta(seconds=3)


def test_a_stream_that_one_rank_reads_alone_says_so_after_the_time_of_the_group(data: Path) -> None:
    launch(check_lost, data, seconds=3)


class MakesLoaders(Dataset[int]):
    """A dataset that reads another in the worker process."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return sum(len(batch) for batch in ResumableDataLoader(range(8), 2, rank=0, world_size=1)) + len(
            ElasticSampler(range(8), 2)
        )


def check_alone(data: Path) -> None:
    rank = dist.get_rank()
    loader = ResumableDataLoader(Noisy(), 2)
    if rank == 0:
        next(iter(loader))  # to look at the shapes, on one rank
        list(ResumableDataLoader(Noisy(), 2, rank=0, world_size=1))
        list(ShardedDataset.create_dataloader(data / "parquet", rank=0, world_size=1)[0])
    assert_once(ids(dispatched(lambda: make(data, "parquet"))), TOTAL)
    list(dispatched(lambda: make(data, "jsonl")))
    if rank == 0:
        list(DataLoader(MakesLoaders(), num_workers=1))
    dist.barrier()


def test_what_one_rank_does_alone_waits_for_no_other(data: Path) -> None:
    launch(check_alone, data, seconds=20)


# -- make_resumable


def check_make_resumable(_data: Path) -> None:
    divided = DataLoader(Noisy(40), 4, sampler=DistributedSampler(Noisy(40)))
    assert_once([index for indices, _ in make_resumable(divided) for index in indices.tolist()], 40)
    with pytest.warns(UserWarning, match="Each of the 2 ranks sees all samples of this DataLoader"):
        whole = make_resumable(DataLoader(Noisy(40), 4, shuffle=True))
    assert sorted(index for indices, _ in whole for index in indices.tolist()) == list(range(40))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    make_resumable(DataLoader(Noisy(40), 4), rank=rank, world_size=world_size)  # without a warning


def test_make_resumable_takes_rank_and_world_size_of_the_sampler_or_says_that_nothing_is_divided(data: Path) -> None:
    launch(check_make_resumable, data)


# -- with a strategy


def through_fabric(data: Path) -> None:
    rank = int(os.environ["RANK"])
    if rank == 1:
        list_late("-002.parquet", "-2.jsonl")
    made = {format: make(data, format, num_workers=[0, 2][rank]) for format in LENGTHS}
    len(made["parquet"])  # which takes reading, and a plan of how it will be read
    other = make(data, "parquet", batch_size=[3, 5][rank])  # there is no process group yet
    torch.manual_seed(rank)
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy=ResumableDDPStrategy())
    fabric.launch()
    for format, loader in made.items():
        assert_once(ids(in_step(fabric.setup_dataloaders(loader))), LENGTHS[format])
    with pytest.raises(OutOfStepError, match=r"not the same batch_size:\n  rank 0: 3\n  rank 1: 5"):
        fabric.setup_dataloaders(other)
    with pytest.raises(OutOfStepError, match=r"not the same length of the dataset"):
        fabric.setup_dataloaders(DataLoader(Noisy(40 + rank), 4, shuffle=True))


def test_loaders_made_before_the_process_group_are_compared_when_a_strategy_gets_them(data: Path) -> None:
    launch(through_fabric, data)
