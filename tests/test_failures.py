"""One rank fails, dies or hangs: the others are told at once, the older checkpoint is whole, and training may go on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_resume import CheckpointCorruptError, CheckpointManager, CheckpointSaveError, ResumeCallback
from lightning_resume.checkpoint import filesystem
from lightning_resume.checkpoint.commit import delete_checkpoint
from lightning_resume.checkpoint.layout import list_checkpoints, step_name
from lightning_resume.errors import FallBackWarning, ResumeWarning
from tests import failure_worker as worker
from tests.faulty import Fault, Plan, failing, register
from tests.harness import Launch, Zygote, zygote
from tests.toy_data import reseed
from tests.toy_fabric import Toy, assert_equal, fabric
from tests.toy_fabric import launch as launch_two
from tests.toy_trainer import Quiet, assert_same, fit

TOLD_SECONDS = 20.0  # measured: at most 0.2


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


def launch(ranks: Zygote, folder: Path, act: Callable[..., list[worker.Told]], **arguments: Any) -> list[worker.Told]:
    """What ``act`` returns in a process that has imported everything and has no threads, so that it may fork."""
    content = {"check": _write_down, "arguments": {"act": act, "options": arguments}}
    ranks.run(Launch(function="call", arguments=content, world_size=1, folder=folder, seconds=90))
    return list(json.loads((folder / "told.json").read_text()))


def _write_down(folder: Path, *, act: Callable[..., Any], options: dict[str, Any]) -> None:
    (folder / "told.json").write_text(json.dumps(act(folder, **options)))


# --- one rank fails, and lives ---


@pytest.mark.parametrize(
    ("failure", "world_size", "bad"),
    [*((f, 2, bad) for f in worker.FAILURES for bad in (0, 1)), *((f, 3, 1) for f in list(worker.FAILURES)[::3])],
)
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_the_older_checkpoint(
    ranks: Zygote, tmp_path: Path, failure: str, world_size: int, bad: int
) -> None:
    if failure == "no permission" and os.geteuid() != 0:
        pytest.skip("needs root, to become a user who may not write")
    told = launch(ranks, tmp_path, worker.save_while_one_fails, failure=failure, world_size=world_size, bad=bad)
    expected = worker.USERS_ERRORS.get(failure)  # raised as it is, where it can be sent
    assert all(one.get("error") == "CheckpointSaveError" or (expected and expected in one["text"]) for one in told), (
        told
    )
    assert [(one["then"], one["left"], one["next"]) for one in told] == [(1, [], 3)] * world_size
    assert max(one["seconds"] for one in told) < TOLD_SECONDS


def test_a_load_that_fails_on_one_rank_fails_on_all(ranks: Zygote, tmp_path: Path) -> None:
    told = launch(ranks, tmp_path, worker.load_while_one_fails, world_size=2, bad=1)
    assert [(one.get("error"), one.get("then")) for one in told] == [("ValueError", 1)] * 2, told


# --- one rank dies, or hangs ---


@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("death", worker.DEATHS)
def test_a_rank_that_is_killed_is_told_to_the_others_and_the_older_checkpoint_loads(
    ranks: Zygote, tmp_path: Path, death: str, world_size: int, victim: int
) -> None:
    *told, after = launch(
        ranks, tmp_path, worker.go_on_while_one_dies, death=death, world_size=world_size, victim=victim
    )
    if death == "in the commit" and victim != 0:  # which is rank 0's alone: nobody dies in it
        assert [one.get("error") for one in told] == [None] * (world_size - 1)
        assert after["then"] == 2
    else:
        lost = ("RankLostError", "RuntimeError") if death == "in a load" else ("CheckpointSaveError", "RankLostError")
        assert [(one["error"], one["cause"]) for one in told] == [lost] * (world_size - 1)
        assert after["then"] == 1
    assert (after["next"], after["left then"]) == (3, [])
    assert max(one["seconds"] for one in told) < TOLD_SECONDS


def test_a_rank_that_hangs_is_told_to_the_others_within_the_limit_of_the_group(ranks: Zygote, tmp_path: Path) -> None:
    options = {"death": "in a shard", "world_size": 2, "victim": 1, "hangs": True}
    told, after = launch(ranks, tmp_path, worker.go_on_while_one_dies, **options)
    assert (told["error"], told["cause"]) == ("CheckpointSaveError", "RankLostError")
    assert told["seconds"] < worker.ANSWERED + TOLD_SECONDS
    assert (after["then"], after["next"]) == (1, 3)


# --- one rank alone sees damage ---


@pytest.mark.parametrize("name", [".distcp", "meta.pt", ".index"])
@pytest.mark.parametrize("bad", [0, 1])
def test_damage_that_one_rank_sees_sends_all_back_but_not_from_a_checkpoint_that_was_named(
    ranks: Zygote, tmp_path: Path, name: str, bad: int
) -> None:
    told = launch(ranks, tmp_path, worker.load_while_one_sees_damage, name=name, world_size=2, bad=bad)
    assert [(one.get("returned"), one.get("named")) for one in told] == [(1, "CheckpointCorruptError")] * 2, told
    assert [one["warnings"] for one in told] == [["FallBackWarning"], []]


class Net(Quiet):
    """Logs what it may log on several ranks."""

    def log(self, *args: Any, **options: Any) -> None:
        super().log(*args, sync_dist=True, **options)


def check_a_trainer_falls_back_together(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    both = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    whole = fit(folder, module=Net, resume=ResumeCallback(folder / "run", every_n_train_steps=1, keep=None), **both)
    newest = list_checkpoints(folder / "run")[0]
    again = ResumeCallback(folder / "run", every_n_train_steps=1, keep=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with worker.damaged_eyes(newest, ".distcp") if rank == 1 else contextlib.nullcontext():
            assert_same(fit(folder, module=Net, seed=2, resume=again, **both), whole)
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, FallBackWarning)]
    assert len(texts) == (1 if rank == 0 else 0), texts
    with (
        worker.damaged_eyes(newest, ".distcp") if rank == 1 else contextlib.nullcontext(),
        pytest.raises(CheckpointCorruptError, match=newest.name),
    ):
        fit(folder, module=Net, seed=2, ckpt_path=newest, **both)


def test_damage_that_one_rank_sees_sends_all_ranks_of_a_trainer_back(ranks: Zygote, tmp_path: Path) -> None:
    launch_two(ranks, check_a_trainer_falls_back_together, tmp_path)


# --- training goes on ---


def test_a_run_goes_on_after_saves_that_failed_on_one_rank(ranks: Zygote, tmp_path: Path) -> None:
    told = launch(ranks, tmp_path, worker.save_with_warnings, world_size=2, bad=1)
    assert [one["saved"] for one in told] == [[True, False, False, True, True]] * 2
    assert [one["warnings"] for one in told] == [[[], ["ResumeWarning"], ["ResumeWarning"], [], []], [[]] * 5]
    assert [one["names"] for one in told] == [list(map(step_name, (1, 4, 5)))] * 2


@contextlib.contextmanager
def full_disk(*, from_step: int, to_step: int, step: Callable[[], int]) -> Any:
    """The disk is full on this rank between two steps."""
    close = filesystem.LocalFile.close

    def fail(self: Any) -> None:
        if from_step <= step() < to_step:
            self.discard()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        close(self)

    filesystem.LocalFile.close = fail  # type: ignore[method-assign]
    try:
        yield
    finally:
        filesystem.LocalFile.close = close  # type: ignore[method-assign]


def check_a_trainer_goes_on(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    both = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    whole = fit(folder, module=Net, resume=ResumeCallback(folder / "whole", every_n_train_steps=1), **both)
    callback = ResumeCallback(folder / "run", every_n_train_steps=1, keep=None, on_save_error="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        full = full_disk(from_step=2, to_step=4, step=lambda: callback.trainer.global_step)
        with full if rank == 1 else contextlib.nullcontext():
            assert_same(fit(folder, module=Net, resume=callback, **both), whole)
    texts = [str(warning.message) for warning in caught if "Training goes on" in str(warning.message)]
    assert len(texts) == (2 if rank == 0 else 0), texts
    if rank == 0:  # the other rank's run waits for this one's to find its checkpoint
        steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "run")]
        assert steps == [4, 1]
        delete_checkpoint(folder / "run" / step_name(4))
    again = ResumeCallback(folder / "run", every_n_train_steps=1)
    assert_same(fit(folder, module=Net, seed=2, resume=again, **both), whole)


def test_a_trainer_goes_on_after_saves_that_failed_and_is_the_same_run(ranks: Zygote, tmp_path: Path) -> None:
    launch_two(ranks, check_a_trainer_goes_on, tmp_path)


def check_a_fabric_goes_on(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    whole = Toy(fabric("ddp"))
    whole.train(5)
    reseed(0)
    toy = Toy(fabric("ddp"))
    manager = CheckpointManager(folder / "run", fabric=toy.fabric, keep=None, on_save_error="warn")
    saved = []
    for step in range(1, 6):
        toy.train(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            full = full_disk(from_step=2, to_step=4, step=lambda step=step: step)
            with full if rank == 1 else contextlib.nullcontext():
                saved.append(manager.save(toy.state, step=step) is not None)
        warned = [warning for warning in caught if issubclass(warning.category, ResumeWarning)]
        assert len(warned) == (1 if rank == 0 and step in (2, 3) else 0)
    assert saved == [True, False, False, True, True]
    assert_equal(toy.tensors(), whole.tensors())


def test_a_fabric_goes_on_after_saves_that_failed_and_is_the_same_run(ranks: Zygote, tmp_path: Path) -> None:
    launch_two(ranks, check_a_fabric_goes_on, tmp_path)


def test_a_run_whose_checkpoints_cannot_be_tidied_still_has_saved(tmp_path: Path) -> None:
    register()
    with CheckpointManager(f"objstore://{tmp_path}/run", keep=1) as manager:
        manager.save({"n": 1}, step=1)
        manager._folder.close()  # waits for what is deleted on another thread, whose requests are counted too
        with failing(Plan()) as plan:
            manager.save({"n": 2}, step=2)
            manager._folder.close()
        calls = plan.counts["list"]
        silent = Plan(kind="list", fault=Fault.REFUSED, first=calls - 1, times=100)
        with failing(silent), pytest.warns(UserWarning, match=r"could not be (removed|looked through|deleted)"):
            saved = [manager.save({"n": 3}, step=3), manager._folder.close()]
        assert saved[0] is not None
        assert manager.list()[0].step == 3


# --- the other ways to save and load ---


class FailingCallback(Callback):
    """Its state cannot be told on rank 1."""

    def state_dict(self) -> dict[str, Any]:
        return worker.Counter(fails="save" if os.environ["RANK"] == "1" else "").state_dict()


def check_a_trainer_is_told(folder: Path) -> None:
    both = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    with pytest.raises(Exception, match="the state cannot be told"):
        fit(folder, module=Net, resume=ResumeCallback(folder / "run"), callbacks=[FailingCallback()], **both)


def check_a_fabric_is_told(folder: Path, *, form: str) -> None:
    toy = Toy(fabric("ddp", form))
    toy.fabric.save(folder / "c", {"model": toy.model, "extra": worker.Counter()})
    fails = toy.fabric.global_rank == 1
    for extra, text in [
        (worker.Counter(fails="save" if fails else ""), "the state cannot be told"),
        (worker.Raises(lambda: ValueError("cannot be saved")) if fails else 0, "cannot be saved"),
    ]:
        with pytest.raises(Exception, match=text):
            toy.fabric.save(folder / "c", {"model": toy.model, "extra": extra})
    extra = worker.Counter(fails="load" if fails else "")
    with pytest.raises(Exception, match="the state cannot be taken"):
        toy.fabric.load(folder / "c", {"model": toy.model, "extra": extra})
    toy.fabric.load(folder / "c", {"model": toy.model, "extra": worker.Counter()})


def check_load_raw_is_told(folder: Path, *, form: str) -> None:
    toy = Toy(fabric("ddp", form))
    toy.fabric.save(folder / "c", {"model": toy.model})
    eyes = worker.damaged_eyes(folder / "c", ".index") if form == "folder" else worker.closed_eyes(folder / "c")
    with (
        eyes if toy.fabric.global_rank == 1 else contextlib.nullcontext(),
        pytest.raises((CheckpointCorruptError, OSError), match=r"damaged|Input/output"),
    ):
        toy.fabric.load_raw(folder / "c", toy.model)
    toy.fabric.load_raw(folder / "c", toy.model)


def test_an_error_of_one_rank_of_a_trainer_is_raised_on_all(ranks: Zygote, tmp_path: Path) -> None:
    launch_two(ranks, check_a_trainer_is_told, tmp_path)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_an_error_of_one_rank_of_a_fabric_is_raised_on_all(ranks: Zygote, tmp_path: Path, form: str) -> None:
    launch_two(ranks, check_a_fabric_is_told, tmp_path, form=form)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_an_error_of_one_rank_in_load_raw_is_raised_on_all(ranks: Zygote, tmp_path: Path, form: str) -> None:
    launch_two(ranks, check_load_raw_is_told, tmp_path, form=form)


def check_a_filter_that_fails(folder: Path, *, name: str) -> None:
    toy = Toy(fabric(name))
    toy.train(1)

    def refuse(key: str, _: Any) -> bool:
        raise LookupError(key)

    chosen = {"model": refuse} if toy.fabric.global_rank == 1 else {"model": lambda *_: True}
    with pytest.raises(CheckpointSaveError, match="LookupError"):
        toy.fabric.save(folder / "c", toy.state, filter=chosen)
    toy.fabric.save(folder / "c", toy.state)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "mp"])
def test_a_filter_that_fails_on_one_rank_fails_the_save_on_all(ranks: Zygote, tmp_path: Path, name: str) -> None:
    launch_two(ranks, check_a_filter_that_fails, tmp_path, name=name)
