"""Saves in the background: what they hold, what becomes of their errors, and that they end with the run."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_resume import (
    CheckpointManager,
    CheckpointSaveError,
    RankLostError,
    ResumeCallback,
    ResumeWarning,
    list_checkpoints,
)
from lightning_resume.checkpoint import filesystem, staging
from lightning_resume.checkpoint.reader import CheckpointReader
from tests.harness import ROOT, Zygote, zygote
from tests.runs import local
from tests.toy_fabric import Toy, assert_equal, fabric, launch, strategy
from tests.toy_trainer import Quiet, assert_same, fit

WHERE = ("thread", "process")
STAGING = ("now", "deferred")


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


@contextlib.contextmanager
def slow_copies(seconds: float = 0.2) -> Iterator[None]:
    """Inside, a deferred copy begins late: what does not wait for it is too early."""
    finish = staging.Snapshot.finish

    def late(snapshot: Any) -> None:
        time.sleep(seconds)
        finish(snapshot)

    staging.Snapshot.finish = late  # type: ignore[method-assign]
    try:
        yield
    finally:
        staging.Snapshot.finish = finish  # type: ignore[method-assign]


def background_fabric(name: str = "single", **options: Any) -> Any:
    return fabric(name, strategy=strategy(name, **options))


def check_values(folder: Path, *, name: str, where: str) -> None:
    """A save holds the values of its step, although everything changes right after."""
    for when in STAGING:
        run = Toy(background_fabric(name, async_save=where, staging=when))
        with slow_copies():
            for number in range(2):  # with new memory, and with memory that is used again
                run.train(2)
                saved, others = run.tensors(), run.others()
                run.fabric.save(folder / f"{when}{number}", run.state)
                if when == "now":
                    change_all(run)
                run.train(2)
                run.fabric.strategy.wait()
                again = Toy(fabric(name), seed=2)
                again.fabric.load(folder / f"{when}{number}", again.state)
                assert_equal(again.tensors(), saved, f"{when} {number}")
                assert again.others() == others
        run.fabric.strategy.close()


def change_all(run: Toy) -> None:
    with torch.no_grad():
        for tensor in local([*run.model.module.parameters(), *run.model.module.buffers()]):
            tensor.fill_(7)
        for state in run.optimizer.optimizer.state.values():
            for tensor in local(state.values()):
                tensor.fill_(7)


@pytest.mark.parametrize("where", WHERE)
def test_a_save_holds_the_values_of_its_step_on_a_single_device(where: str, tmp_path: Path) -> None:
    check_values(tmp_path, name="single", where=where)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["ddp", "fsdp", "mp"])
def test_a_save_holds_the_values_of_its_step_on_every_rank(
    name: str, where: str, ranks: Zygote, tmp_path: Path
) -> None:
    launch(ranks, check_values, tmp_path, name=name, where=where)


@pytest.mark.parametrize("when", STAGING)
@pytest.mark.parametrize("where", WHERE)
def test_a_trainer_saves_in_the_background_what_it_saves_without(where: str, when: str, tmp_path: Path) -> None:
    whole = fit(tmp_path, resume=ResumeCallback(tmp_path / "sync", every_n_train_steps=1, keep=None))
    how: dict[str, Any] = {"async_save": where, "staging": when, "keep": None}
    with slow_copies(0.05):
        run = fit(tmp_path, resume=ResumeCallback(tmp_path / "async", every_n_train_steps=1, **how))
    assert_same(run, whole)
    paths = [Path(info.path) for info in list_checkpoints(tmp_path / "sync")]
    assert [path.name for path in paths] == [Path(i.path).name for i in list_checkpoints(tmp_path / "async")]
    for path in paths:
        assert_alike(content(tmp_path / "async" / path.name), content(path), path.name)


def content(path: Path) -> dict[str, Any]:
    reader = CheckpointReader(path)
    reader.verify()
    return {**reader.read(), "leaves": {name: bytes(reader.leaf(name)) for name in reader.leaf_names()}}


def assert_alike(one: Any, other: Any, what: str) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other), what
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), what
        for key, value in one.items():
            assert_alike(value, other[key], f"{what}: {key}")
    else:
        assert one == other, what


# --- the copy ---


def trained(optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> dict[str, Any]:
    net = nn.Linear(4, 4)
    state = {"net": net, "optimizer": optimizer(net.parameters(), lr=0.1, **options)}
    step(state)
    return state


def step(state: dict[str, Any]) -> None:
    def closure() -> Tensor:
        state["optimizer"].zero_grad()
        loss: Tensor = state["net"](torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    state["optimizer"].step(closure)


def test_forward_and_backward_in_a_closure_do_not_wait_for_the_copy(tmp_path: Path) -> None:
    state, seen = trained(), []
    with CheckpointManager(tmp_path, async_save=True, staging="deferred") as manager, slow_copies():
        manager.save(state, step=1)
        state["net"].register_forward_hook(lambda *_: seen.append(time.monotonic()))
        step(state)
        assert time.monotonic() - seen[0] > 0.1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.LBFGS, type("Own", (torch.optim.SGD,), {})])
def test_no_optimizer_steps_while_its_parameters_are_copied(optimizer: Any, tmp_path: Path) -> None:
    state = trained(optimizer)
    saved = state["net"].weight.detach().clone()
    with CheckpointManager(tmp_path, async_save=True, staging="deferred") as manager, slow_copies():
        manager.save(state, step=1)
        step(state)
    assert not torch.equal(state["net"].weight, saved)
    assert_alike(content(tmp_path / "step-00000001")["net"]["weight"], saved, "weight")


@pytest.mark.parametrize("change", [lambda p: p.detach().clamp_(-0.1, 0.1), lambda p: p.data.copy_(torch.rand(4, 4))])
def test_a_parameter_that_changes_outside_of_the_step_fails_the_save_and_is_named(change: Any, tmp_path: Path) -> None:
    state = trained()
    with CheckpointManager(tmp_path, async_save=True, staging="deferred") as manager, slow_copies():
        manager.save(state, step=1)
        change(state["net"].weight)
        with pytest.raises(CheckpointSaveError, match=r"net\.weight changed .* staging='now'"):
            manager.wait()
        assert manager.list() == []
        step(state)
        manager.save(state, step=2)
    assert [info.step for info in list_checkpoints(tmp_path)] == [2]


def test_parameters_of_no_optimizer_are_copied_at_once(tmp_path: Path) -> None:
    state = trained() | {"other": nn.Linear(3, 3)}
    saved = state["other"].weight.detach().clone()
    with CheckpointManager(tmp_path, async_save=True, staging="deferred") as manager, slow_copies():
        manager.save(state, step=1)
        nn.init.zeros_(state["other"].weight)
    assert_alike(content(tmp_path / "step-00000001")["other"]["weight"], saved, "weight")


def test_what_would_not_be_seen_to_change_is_copied_at_once(tmp_path: Path) -> None:
    """Weights with gaps or in another order than in a file, and tensors of which torch counts no changes."""
    net: Any = nn.Sequential(nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last))
    with torch.inference_mode():
        net.inference = nn.Parameter(torch.arange(100.0), requires_grad=False)
    state = {"net": net, "optimizer": torch.optim.SGD(net.parameters())}
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    with CheckpointManager(tmp_path, async_save=True, staging="deferred") as manager, slow_copies():
        manager.save(state, step=1)
        net[0].weight.data.clamp_(-0.01, 0.01)
        with torch.inference_mode():
            net.inference[10:-10].add_(1)
    assert_alike(content(tmp_path / "step-00000001")["net"], expected, "net")


def test_a_key_without_a_name_is_not_taken_for_another(tmp_path: Path) -> None:
    def state(value: float) -> dict[str, Any]:
        inner = nn.Sequential()
        inner.add_module("a", nn.Linear(3, 3))
        modules = {"": inner, "a": nn.Linear(3, 3)}
        for number, module in enumerate(modules.values()):
            nn.init.constant_(next(module.parameters()), value + number)
        return modules

    with CheckpointManager(tmp_path, async_save=True) as manager:
        manager.save(state(1.0), step=1)
    fresh = state(5.0)
    CheckpointManager(tmp_path).load(fresh)
    assert fresh[""].a.weight[0, 0] == 1
    assert fresh["a"].weight[0, 0] == 2


def test_tensors_of_every_layout_are_copied(tmp_path: Path) -> None:
    net: Any = nn.Sequential(
        nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.Linear(4, 4, dtype=torch.bfloat16)
    )
    net.empty, net.complex = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    net.scalar = nn.Parameter(torch.tensor(2.0))
    net.register_buffer("transposed", torch.rand(2, 3).T)
    state = {"net": net, "optimizer": torch.optim.SGD(net.parameters())}
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    with CheckpointManager(tmp_path, async_save="process", staging="deferred") as manager, slow_copies():
        manager.save(state, step=1)
    assert_alike(content(tmp_path / "step-00000001")["net"], expected, "net")


def test_what_is_no_tensor_is_saved_as_it_was(tmp_path: Path) -> None:
    state, mine = trained(), {"list": [1, 2], "tensor": torch.zeros(3)}
    with CheckpointManager(tmp_path, async_save=True, staging="deferred") as manager, slow_copies():
        manager.save(state, step=1, user_content=mine)
        mine["list"].append(3)
        mine["tensor"].fill_(1)
        state["optimizer"].param_groups[0]["lr"] = 5.0
        loaded = manager.load(state)
    assert loaded["list"] == [1, 2]
    assert loaded["tensor"].tolist() == [0, 0, 0]
    assert state["optimizer"].param_groups[0]["lr"] == 0.1


def test_new_state_of_an_optimizer_is_saved_too(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    state = {"net": net, "optimizer": torch.optim.Adam(net.parameters())}
    with CheckpointManager(tmp_path, async_save="process", keep=None) as manager:
        manager.save(state, step=0)
        step(state)
        manager.save(state, step=1)
    assert "exp_avg" in content(tmp_path / "step-00000001")["optimizer"]["state"]["weight"]


# --- the order of saves ---


def test_a_load_right_after_a_save_to_the_same_path_loads_what_was_saved(tmp_path: Path) -> None:
    run = Toy(background_fabric(async_save=True))
    for number in (1, 2):
        run.state["own"] = number
        run.fabric.save(tmp_path / "c", run.state)
    run.state["own"] = 3
    run.fabric.load(tmp_path / "c", run.state)
    assert run.state["own"] == 2


def test_a_save_that_is_due_while_one_is_written_waits_for_it(tmp_path: Path) -> None:
    state = trained()
    with CheckpointManager(tmp_path, async_save=True, keep=None) as manager, slow_writes():
        for number in (1, 2, 3):
            step(state)
            manager.save(state, step=number)
    assert [info.step for info in list_checkpoints(tmp_path)] == [3, 2, 1]


def test_a_save_that_is_due_while_one_is_written_is_skipped_if_so_asked(tmp_path: Path) -> None:
    state = trained()
    with CheckpointManager(tmp_path, async_save=True, when_busy="skip") as manager, slow_writes():
        manager.save(state, step=1)
        with pytest.warns(ResumeWarning, match="step-00000002 is not saved: .*step-00000001 is still being written"):
            assert manager.save(state, step=2) is None
        assert manager.wait().step == 1  # type: ignore[union-attr]
        step(state)
        manager.save(state, step=3)
    assert [info.step for info in list_checkpoints(tmp_path)] == [3, 1]


@pytest.mark.filterwarnings("ignore:.*is not saved:lightning_resume.ResumeWarning")
def test_the_last_step_of_a_fit_is_saved_although_others_are_skipped(tmp_path: Path) -> None:
    how: dict[str, Any] = {"async_save": True, "when_busy": "skip", "keep": None}
    with slow_writes():
        fit(tmp_path, resume=ResumeCallback(tmp_path / "r", every_n_train_steps=1, **how))
    steps = [info.step for info in list_checkpoints(tmp_path / "r")]
    assert steps[0] == 8
    assert len(steps) < 8


def test_older_checkpoints_are_deleted_only_once_the_newer_one_is_durable(tmp_path: Path) -> None:
    state = trained()
    with CheckpointManager(tmp_path, async_save=True, keep=1) as manager:
        saved(manager, state, 1)
        step(state)
        with slow_writes():
            manager.save(state, step=2)
            assert [info.step for info in manager.list()] == [1]
    assert [info.step for info in list_checkpoints(tmp_path)] == [2]


@contextlib.contextmanager
def slow_writes(seconds: float = 0.1) -> Iterator[None]:
    """Inside, each file takes its time."""
    fsync = os.fsync

    def late(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    os.fsync = late
    try:
        yield
    finally:
        os.fsync = fsync


# --- errors ---


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Inside, no file can be written."""
    write = filesystem.LocalFile.write

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    filesystem.LocalFile.write = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        filesystem.LocalFile.write = write  # type: ignore[method-assign]


FULL = "step-00000002 failed(.|\n)*No space left(.|\n)*untouched"


def failed(manager: CheckpointManager, state: dict[str, Any]) -> None:
    """Saves step 1, and lets the save of step 2 fail."""
    saved(manager, state, 1)
    with full_disk():
        manager.save(state, step=2)
        end_of_threads()


def end_of_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "lightning-resume-save":
            thread.join()


@pytest.mark.parametrize("where", ["step", "save", "load", "wait", "close"])
def test_an_error_is_raised_at_whatever_comes_next(where: str, tmp_path: Path) -> None:
    state = trained()
    manager = CheckpointManager(tmp_path, async_save=True)
    failed(manager, state)
    calls = {"step": lambda: step(state), "save": lambda: manager.save(state, step=3)}
    calls |= {"load": lambda: manager.load(state), "wait": manager.wait, "close": manager.close}
    with pytest.raises(CheckpointSaveError, match=FULL):
        calls[where]()
    manager.close()
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]


def test_an_error_is_a_warning_if_so_asked_and_the_next_save_works(tmp_path: Path) -> None:
    state = trained()
    with CheckpointManager(tmp_path, async_save=True, on_save_error="warn", keep=None) as manager:
        failed(manager, state)
        with pytest.warns(ResumeWarning, match=FULL):
            step(state)
        manager.save(state, step=3)
    assert [info.step for info in list_checkpoints(tmp_path)] == [3, 1]


def test_a_trainer_raises_the_error_at_the_next_step(tmp_path: Path) -> None:
    class Full(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            end_of_threads()
            if trainer.global_step == 2:
                full.enter_context(full_disk())

    callback = ResumeCallback(tmp_path / "r", every_n_train_steps=1, async_save=True)
    full = contextlib.ExitStack()
    with full, pytest.raises(CheckpointSaveError, match="step-00000003 failed"):
        fit(tmp_path, resume=callback, callbacks=[Full()])
    assert callback.trainer.global_step == 3
    assert [info.step for info in list_checkpoints(tmp_path / "r")] == [2, 1]


def test_a_trainer_that_is_told_to_warn_saves_its_last_step_again(tmp_path: Path) -> None:
    class FullAtTheEnd(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 7:
                full.enter_context(full_disk())

        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            end_of_threads()

        def on_train_end(self, trainer: Any, *_: Any) -> None:
            end_of_threads()
            full.close()

    how: dict[str, Any] = {"async_save": True, "on_save_error": "warn"}
    full = contextlib.ExitStack()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, resume=ResumeCallback(tmp_path / "r", every_n_epochs=1, **how), callbacks=[FullAtTheEnd()])
    told = [str(one.message) for one in caught if issubclass(one.category, ResumeWarning)]
    assert len(told) == 1
    assert "step-00000008 failed" in told[0]
    assert "Training goes on without it" in told[0]
    assert [info.step for info in list_checkpoints(tmp_path / "r")] == [8, 4]


def check_same_step(folder: Path) -> None:
    """An error of one rank is raised on all ranks at the same step."""
    run = Toy(background_fabric("ddp", async_save=True))
    run.train(1)
    with full_disk() if run.fabric.global_rank else contextlib.nullcontext():
        run.fabric.save(folder / "c", run.state)
        steps: list[int] = []
        with pytest.raises(CheckpointSaveError, match=r"rank 1: OSError.*No space left"):
            train_slowly(run, steps)
    told: list[Any] = [None, None]
    dist.all_gather_object(told, steps)
    assert told[0] == told[1]
    run.optimizer.step()
    run.fabric.save(folder / "c", run.state)
    run.fabric.strategy.close()
    CheckpointReader(folder / "c").verify()


def train_slowly(run: Toy, steps: list[int]) -> None:
    """Trains, the ranks not quite at the same time, and counts in ``steps``."""
    for number in range(1000):
        time.sleep(0.01 * run.fabric.global_rank)
        run.train(1)
        steps.append(number)


def test_an_error_of_one_rank_is_raised_on_all_at_the_same_step(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_same_step, tmp_path)


def check_destroyed_group(folder: Path) -> None:
    """Ranks that have lost their group no longer know who is rank 0: nothing may be committed."""
    run = Toy(background_fabric("ddp", async_save=True))
    run.train(1)
    run.fabric.save(folder / "c", run.state)
    run.fabric.strategy.wait()
    run.train(1)
    with slow_writes():
        run.fabric.save(folder / "c", run.state)
        dist.destroy_process_group()
        with pytest.raises(RankLostError, match="Call wait"):
            run.fabric.strategy.close()
    reader = CheckpointReader(folder / "c")
    reader.verify()
    assert reader.manifest is not None
    assert reader.manifest.step == 1


def test_a_process_group_that_is_destroyed_too_early_fails_the_save(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_destroyed_group, tmp_path)


def test_a_writer_process_that_is_killed_is_named_and_the_next_save_works(tmp_path: Path) -> None:
    state = trained()
    with CheckpointManager(tmp_path, async_save="process", keep=None) as manager:
        saved(manager, state, 1)
        os.kill(writer_of(manager), signal.SIGKILL)
        manager.save(state, step=2)
        with pytest.raises(CheckpointSaveError, match=r"the process \d+ that writes checkpoints ended with .*SIGKILL"):
            manager.wait()
        step(state)
        manager.save(state, step=3)
    assert [info.step for info in list_checkpoints(tmp_path)] == [3, 1]


def test_an_error_of_the_writer_process_is_raised_as_it_is(tmp_path: Path) -> None:
    state = trained()
    with CheckpointManager(tmp_path, async_save="process") as manager:
        saved(manager, state, 1)
        limit_files_of(manager, 100)
        manager.save(state, step=2)
        with pytest.raises(CheckpointSaveError, match=r"step-00000002 failed: .*File too large.* Free some space"):
            manager.wait()


def limit_files_of(manager: CheckpointManager, bytes: int) -> None:
    resource.prlimit(writer_of(manager), resource.RLIMIT_FSIZE, (bytes, bytes))


def writer_of(manager: CheckpointManager) -> int:
    """The id of the writer process."""
    pid = manager._background._process.pid  # type: ignore[union-attr]
    assert pid is not None
    return int(pid)


def saved(manager: CheckpointManager, state: dict[str, Any], number: int) -> None:
    """Takes a step, saves it, and waits until it is durable."""
    step(state)
    manager.save(state, step=number)
    manager.wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"async_save": "fork"}, r"async_save is 'fork'; pass one of \['thread', 'process'\] or a bool"),
        ({"async_save": True, "when_busy": "queue"}, "when_busy is 'queue'"),
        ({"staging": "later"}, "staging is 'later'"),
    ],
)
def test_other_words_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    makers = (
        lambda: CheckpointManager(tmp_path, **options),
        lambda: ResumeCallback(tmp_path, **options),
        lambda: strategy("single", **options),
    )
    for make in makers:
        with pytest.raises(ValueError, match=message):
            make()


def test_one_file_cannot_be_saved_in_the_background() -> None:
    with pytest.raises(ValueError, match="folders only"):
        strategy("single", "file", async_save=True)


# --- the end ---


SCRIPT = """
import sys, os, signal, time, torch
from lightning_resume import CheckpointManager
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job in the background would not have
fsync = os.fsync
os.fsync = lambda descriptor: (time.sleep(0.2), fsync(descriptor))
net = torch.nn.Linear(4, 4)
manager = CheckpointManager({folder!r}, async_save={where!r})
manager.save({{"net": net}}, step=1)
{end}
"""
ENDS = {
    "its end": "",
    "an error": "raise ValueError('mine')",
    "sys.exit": "sys.exit(3)",
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)",
}


@pytest.mark.parametrize(("end", "where"), [*((end, "thread") for end in ENDS), ("Ctrl-C", "process")])
def test_a_script_that_ends_while_it_saves_leaves_a_whole_checkpoint(end: str, where: str, tmp_path: Path) -> None:
    script = SCRIPT.format(folder=str(tmp_path / "r"), where=where, end=ENDS[end])
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode == 0) == (end == "its end"), ended.stderr
    assert [info.step for info in list_checkpoints(tmp_path / "r")] == [1]
    assert os.listdir(tmp_path / "r") == ["step-00000001"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_fit_that_ends_by_an_exception_waits_for_what_is_saved(error: Any, tmp_path: Path) -> None:
    class Raise(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                raise error

    with slow_writes(), pytest.raises((error, SystemExit)):
        fit(
            tmp_path,
            module=Quiet,
            resume=ResumeCallback(tmp_path / "r", every_n_train_steps=1, async_save=True),
            callbacks=[Raise()],
        )
    assert [info.step for info in list_checkpoints(tmp_path / "r")] == [2, 1]


@pytest.mark.filterwarnings("ignore:No weight has changed:lightning_resume.StaleCheckpointWarning")
@pytest.mark.parametrize("where", WHERE)
def test_500_saves_grow_neither_memory_nor_threads_nor_descriptors_nor_segments(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # only to be quicker
    state = trained(momentum=0.9)
    seen: list[tuple[float, int, int, int, int]] = []
    with CheckpointManager(tmp_path, async_save=where, keep=1) as manager:
        for number in range(1, 501):
            step(state)
            manager.save(state, step=number)
            if number in (100, 500):
                manager.prune()  # waits for what is saved and deleted
                seen.append(usage())
    before, after = seen
    assert after[0] < before[0] + 16, f"{before} {after}"
    assert after[1] < before[1] + 3, f"{before} {after}"
    assert all(now <= then for now, then in zip(after[2:], before[2:], strict=True)), f"{before} {after}"


def usage() -> tuple[float, int, int, int, int]:
    """Resident MiB, threads, Python's threads, descriptors, mappings of shared memory.

    The system may still count a thread that has been joined: Python's part of it ends before the thread does.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads, descriptors = (len(os.listdir(folder)) for folder in ("/proc/self/task", "/proc/self/fd"))
    shared = Path("/proc/self/maps").read_text().count("memfd:lightning-resume")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, threads, threading.active_count(), descriptors, shared
