"""Megatron-Energon's three scenarios, as its users write them, with loaders of ours; and calls that are out of step."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lightning_resume import CheckpointMismatchError, CheckpointSaveError, OutOfStepError, RankLostError, make_resumable
from lightning_resume.data.handshake import _PREFIX
from tests import runs
from tests.harness import Launch, Zygote, zygote
from tests.toy_data import LENGTH, Noisy, Plain, Stateful, plain, reseed

LIMIT = 1.0
BATCH = 2
KINDS = ("shuffled", "iterable", "stateful")


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


def call(*, folder: Path, check: Callable[..., None], arguments: dict[str, Any]) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
    check(folder, rank=dist.get_rank(), world_size=dist.get_world_size(), **arguments)
    if dist.is_initialized():
        runs.end_processes()


runs.call_with_group = call  # type: ignore[attr-defined]  # unpickling `check` in the zygote imports this module


def launch(ranks: Zygote, check: Callable[..., None], folder: Path, *, world_size: int = 2, **arguments: Any) -> None:
    content = {"check": check, "arguments": arguments}
    ranks.run(Launch(function="call_with_group", arguments=content, world_size=world_size, folder=folder, seconds=60))


def my_loader(kind: str = "shuffled", *, rank: int = 0, world_size: int = 1, seed: int = 3, **options: Any) -> Any:
    """Each rank's own loader, as a run would make it anew."""
    reseed(int.from_bytes(os.urandom(4), "little"))  # what is restored must not depend on it
    dataset = {"shuffled": Noisy, "iterable": Plain, "stateful": Stateful}[kind]()
    sampler = DistributedSampler(dataset, world_size, rank, seed=seed) if kind == "shuffled" else None
    loader = DataLoader(dataset, BATCH, sampler=sampler, **options)
    return make_resumable(loader, rank=rank, world_size=world_size, seed=seed + (0 if kind == "shuffled" else rank))


def take(loader: Any, count: int) -> list[Any]:
    return [plain(batch) for _, batch in zip(range(count), loader)]  # noqa: B905  # as Energon's users write it


# -- without a process group


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_saves_and_restores_its_own_state(kind: str, tmp_path: Path) -> None:
    loader = my_loader(kind)
    take(loader, 2)
    torch.save(loader.save_state_rank(), tmp_path / "rank0.pth")
    expected = take(loader, 9)  # begins the next epoch: it was broken out of
    again = my_loader(kind)
    again.restore_state_rank(torch.load(tmp_path / "rank0.pth"))
    rest = take(again, 9)
    assert len(rest) == 5
    assert take(again, 9) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("src_rank", [0, None])
def test_the_global_state_works_without_a_process_group(kind: str, src_rank: int | None, tmp_path: Path) -> None:
    loader = my_loader(kind)
    batches = iter(loader)
    next(batches)
    torch.save(loader.save_state_global(dst_rank=0), tmp_path / "state.pth")
    again = my_loader(kind)
    again.restore_state_global(torch.load(tmp_path / "state.pth"), src_rank=src_rank)
    assert list(map(plain, again)) == list(map(plain, batches))


def test_a_rank_that_does_not_exist_is_refused() -> None:
    loader = my_loader()
    with pytest.raises(ValueError, match="dst_rank is 1, but the ranks are 0 to 0"):
        loader.save_state_global(dst_rank=1)
    with pytest.raises(ValueError, match="src_rank is -1"):
        loader.restore_state_global(None, src_rank=-1)


def test_the_state_of_one_rank_and_those_of_all_are_told_apart() -> None:
    loader = my_loader()
    with pytest.raises(ValueError, match=r"given the states of all ranks.*is for restore_state_global"):
        loader.restore_state_rank(loader.save_state_global())
    with pytest.raises(ValueError, match="given the state of one rank"):
        loader.restore_state_global(loader.save_state_rank())
    with pytest.raises(ValueError, match="given None"):
        loader.restore_state_global(None)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    loader, other = my_loader(), my_loader("stateful")
    take(other, 1)
    with pytest.raises(CheckpointMismatchError, match="order"):
        loader.restore_state_global(other.save_state_global())
    with pytest.raises(CheckpointMismatchError, match="order"):
        loader.restore_state_rank(other.save_state_rank())
    assert take(loader, 9) == take(my_loader(), 9)


def test_batches_since_the_last_optimizer_step_are_not_counted() -> None:
    loader = my_loader()
    loader.watch_steps(lambda: None)
    batches = iter(loader)
    next(batches)
    loader.mark_stepped()
    expected = [plain(next(batches)), plain(next(batches))]
    again = my_loader()
    again.restore_state_rank(loader.save_state_rank())
    assert take(again, 2) == expected


# -- with one


def check_scenarios(folder: Path, *, rank: int, world_size: int) -> None:
    for kind in KINDS:
        loader = my_loader(kind, rank=rank, world_size=world_size)
        batches = iter(loader)
        next(batches)
        torch.save(loader.save_state_rank(), folder / f"{kind}-rank{rank}.pth")
        for dst in range(world_size):
            state = loader.save_state_global(dst_rank=dst)
            assert (state is None) == (rank != dst)
            if rank == dst:
                torch.save(state, folder / f"{kind}-on{dst}.pth")
        dist.barrier()
        expected = list(map(plain, batches))
        assert expected

        again = my_loader(kind, rank=rank, world_size=world_size)
        again.restore_state_rank(torch.load(folder / f"{kind}-rank{rank}.pth"))
        assert list(map(plain, again)) == expected

        for src in range(world_size):
            again = my_loader(kind, rank=rank, world_size=world_size)
            state = torch.load(folder / f"{kind}-on0.pth") if rank == src else None
            again.restore_state_global(state, src_rank=src)
            assert list(map(plain, again)) == expected

        again = my_loader(kind, rank=rank, world_size=world_size)
        again.restore_state_global(torch.load(folder / f"{kind}-on{world_size - 1}.pth"), src_rank=None)
        assert list(map(plain, again)) == expected
    _check_no_keys_are_left()


def _check_no_keys_are_left() -> None:
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    names = ("0", "1", "2", "verdict", "read")
    assert not any(store.check([f"{_PREFIX}/{number}/{name}"]) for number in range(40) for name in names)


def test_the_scenarios_run_as_energons_users_write_them(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_scenarios, tmp_path, world_size=3)
    launch(ranks, check_another_world_size, tmp_path, world_size=2)


def check_another_world_size(folder: Path, *, rank: int, world_size: int) -> None:
    """An elastic loader goes on from what 3 ranks saved; one that reads for itself is refused."""
    loader = my_loader(rank=rank, world_size=world_size)
    for src in (0, None):
        loader.restore_state_global(torch.load(folder / "shuffled-on1.pth") if rank == 0 or src is None else None, src)
        mine = [index for indices, _ in map(plain, loader) for index in indices]
        seen: list[Any] = [None] * world_size
        dist.all_gather_object(seen, mine)
        left = [index for of_rank in seen for index in of_rank]
        assert len(set(left)) == len(left) == LENGTH - 3 * BATCH
    loader.restore_state_rank(torch.load(folder / f"shuffled-rank{2 - rank}.pth"))
    assert [index for indices, _ in map(plain, loader) for index in indices] == mine

    both = "not the same world_size.\n  saved:   3\n  current: 2"
    for kind in ("iterable", "stateful"):
        own = my_loader(kind, rank=rank, world_size=world_size)
        with pytest.raises(CheckpointMismatchError, match=both):
            own.restore_state_global(torch.load(folder / f"{kind}-on1.pth") if rank == 1 else None, src_rank=1)
        with pytest.raises(CheckpointMismatchError, match=both):
            own.restore_state_rank(torch.load(folder / f"{kind}-rank{rank}.pth"))
        with pytest.raises(
            CheckpointMismatchError, match=f"not the same rank.\n  saved:   {1 - rank}\n  current: {rank}"
        ):
            own.restore_state_rank(_of_other_rank(own))
        assert take(own, 1) == take(my_loader(kind, rank=rank, world_size=world_size), 1)


def _of_other_rank(loader: Any) -> Any:
    states: list[Any] = [None, None]
    dist.all_gather_object(states, loader.save_state_rank())
    return states[1 - dist.get_rank()]


def check_lanes(_folder: Path, *, rank: int, world_size: int) -> None:
    """A loader whose ranks hold lanes of one order is given all lanes."""
    loader = my_loader("stateful", rank=rank, world_size=world_size)
    own = loader.save_state_rank

    loader.save_state_rank = lambda: {**own(), "lanes": {f"lane{rank}": rank}}
    state = loader.save_state_global()
    given: list[Any] = []
    loader.check = loader.load_state_dict = given.append
    loader.restore_state_global(state)
    assert [state["lanes"] for state in given] == [{f"lane{of}": of for of in range(world_size)}] * 2


def check_out_of_step(_folder: Path, *, rank: int, world_size: int) -> None:
    loader = my_loader(rank=rank, world_size=world_size)
    state = loader.save_state_rank()

    # another call on one rank
    with pytest.raises(OutOfStepError) as caught:
        loader.save_state_global() if rank != 1 else loader.restore_state_global(None)
    assert "ranks 0, 2: save_state_global(dst_rank=0) of the shuffled loader" in str(caught.value)
    assert "rank 1: restore_state_global(src_rank=0) of the shuffled loader" in str(caught.value)

    # other arguments, and a rank that is none
    with pytest.raises(OutOfStepError, match=re.escape("rank 2: save_state_global(dst_rank=2)")):
        loader.save_state_global(dst_rank=rank)
    with pytest.raises(OutOfStepError, match="dst_rank=7"):
        loader.save_state_global(dst_rank=7 if rank == 0 else 0)

    # another loader
    with pytest.raises(OutOfStepError, match=r"rank 2: .* of the iterable Plain loader"):
        (my_loader("iterable") if rank == 2 else loader).save_state_global()

    # loaders at different positions
    if rank == 2:
        next(iter(loader))
    with pytest.raises(CheckpointSaveError, match=r"rank 1: seed 3, epoch 0, batches 0.*\n.*rank 2: .* batches 1"):
        loader.save_state_global()

    # the rank that has the state has none, or a wrong one
    for wrong in (None, {"ranks": "of something else"}, state):
        with pytest.raises(ValueError, match=r"restore_state_global was given (None|the state of one rank)"):
            loader.restore_state_global(wrong, src_rank=1)

    # one rank cannot take it
    other = my_loader(**({"drop_last": True} if rank == 1 else {}))  # rank 0 of 1: such loaders are not compared
    with pytest.raises(CheckpointMismatchError, match="tail"):
        other.restore_state_global({"ranks": [state], "world_size": world_size})
    assert other.state_dict()["order"]["batches"] == 0

    # after all of which they are still in step
    again = my_loader(rank=rank, world_size=world_size)
    assert (again.save_state_global() is None) == (rank != 0)
    _check_no_keys_are_left()


def test_calls_out_of_step_are_named_on_every_rank(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_out_of_step, tmp_path / "out of step", world_size=3)
    launch(ranks, check_lanes, tmp_path / "lanes")


def check_late(_folder: Path, *, rank: int, world_size: int, late: int) -> None:
    """A rank that comes too late finds that the others have gone on, and is in step again."""
    loader = my_loader(rank=rank, world_size=world_size)
    store = dist.distributed_c10d._get_default_store()
    if rank == late:
        store.wait(["gave up"])
    with pytest.raises(RankLostError) as caught:
        loader.save_state_global(timeout=LIMIT)
    if rank != late:
        store.add("gave up" if store.add("counted", 1) == world_size - 1 else "unused", 1)
    assert f"called save_state_global(dst_rank=0) of the shuffled loader and waited 1 s for rank {late}" in str(
        caught.value
    )
    assert (loader.save_state_global(dst_rank=1) is None) == (rank != 1)
    _check_no_keys_are_left()


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_does_not_call_is_named(late: int, ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_late, tmp_path, world_size=3, late=late)


def check_training_instead(folder: Path, *, rank: int, world_size: int) -> None:
    loader = my_loader(rank=rank, world_size=world_size)
    model = DistributedDataParallel(nn.Linear(1, 1))
    if rank == 0:
        with pytest.raises(RankLostError, match="waited 1 s for rank 1, which did not call it"):
            loader.save_state_global(timeout=LIMIT)
    else:
        with pytest.raises(RuntimeError):  # gloo's own: rank 0 has ended
            model(torch.ones(1, 1)).sum().backward()
    (folder / f"found out by {rank}").touch()
    os._exit(0)  # the group cannot be ended together any more


def test_a_rank_that_trains_instead_is_named(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_training_instead, tmp_path)
    assert len(list(tmp_path.glob("found out by *"))) == 2


def check_dead_rank(folder: Path, *, rank: int, world_size: int, dead: int) -> None:
    loader = my_loader(rank=rank, world_size=world_size)
    loader.save_state_global()
    if rank == dead:
        os._exit(0)
    with pytest.raises(RankLostError, match=f"waited 1 s for rank {dead}, which did not call it. Either it has ended"):
        loader.save_state_global(timeout=LIMIT)
    (folder / f"found out by {rank}").touch()
    os._exit(0)  # the group cannot be ended together any more


@pytest.mark.parametrize("dead", [0, 2])
def test_a_rank_that_has_ended_is_named(dead: int, ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_dead_rank, tmp_path, world_size=3, dead=dead)
    assert len(list(tmp_path.glob("found out by *"))) == 2
