"""Storage that fails at any call: a save raises and the old checkpoint is whole, or it returns and the new one is."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_resume import CheckpointManager
from lightning_resume.checkpoint import remote, shards
from lightning_resume.checkpoint.commit import clean_leftovers, delete_checkpoint
from lightning_resume.checkpoint.layout import leftovers, list_checkpoints
from lightning_resume.checkpoint.manifest import read_manifest
from lightning_resume.checkpoint.paths import as_path
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointSaveError,
    FallBackWarning,
)
from tests.checkpoint_worker import save_file, save_small, value_at
from tests.faulty import CLIENT_TRIES, Fault, ObjectStore, Plan, failing, failing_disk, register

NAME = "step-00000001"
MESSAGES = "503|Read timeout|Input/output error|Permission denied|SlowDown"
NUMBER_OF_CALLS = 200  # more than any save here makes of one kind


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The faulty stores by their URLs; uploads of several parts, and of several files from one rank."""
    register()
    monkeypatch.setattr(remote, "PART_BYTES", 2048)
    monkeypatch.setattr(shards, "_LEAST_PART_BYTES", 512)
    ObjectStore.past.clear()
    yield
    ObjectStore.past.clear()


def value(path: Any) -> int | None:
    """The one number at ``path``; None where nothing is, or what an unfinished save left."""
    try:
        return value_at(path)
    except CheckpointIncompleteError:
        return None


def outcome_of(save: Callable[[], Any]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what could not be removed
        try:
            save()
        except (CheckpointSaveError, OSError):
            return "raised"
    return "returned"


def surplus(root: Any, folder: Path) -> list[str]:
    """What is there beside the checkpoint once leftovers are cleaned: nothing, where all of them were known."""
    clean_leftovers(root, name=NAME)
    assert leftovers(root, name=NAME) == []
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    if value(as_path(root) / NAME) is not None and not (folder / NAME).is_file():
        manifest = read_manifest(as_path(root) / NAME)
        own = NAME if manifest.folder is None else f"{NAME}/{manifest.folder}"
        files -= {f"{NAME}/manifest.json", *(f"{own}/{name}" for name in manifest.files)}
        return sorted(files)
    return sorted(files - {NAME})


def plans(kind: str, fault: Fault, *, times: int = 1) -> Iterator[Plan]:
    """A plan for each call of a kind, until a save makes no more."""
    for first in range(NUMBER_OF_CALLS):
        plan = Plan(kind=kind, fault=fault, first=first, times=times)
        yield plan
        if not plan.was_reached:
            return
    raise AssertionError(f"there is no end of calls of {kind}")


# --- saving to a store ---

ASKING = (Fault.REFUSED, Fault.TIMEOUT)
WRITING = (Fault.REFUSED, Fault.FULL, Fault.REPLY_LOST, Fault.LOST, Fault.CUT)
CALLS: dict[str, tuple[Fault, ...]] = {
    "part": WRITING,
    "complete": WRITING,
    "put": WRITING,
    "rename": (Fault.REFUSED, Fault.FULL, Fault.REPLY_LOST),
    "makedirs": (Fault.REFUSED, Fault.FULL),
    "read": (*ASKING, Fault.CUT),
    "info": ASKING,
    "list": ASKING,
    "delete": (Fault.REFUSED, Fault.TIMEOUT, Fault.REPLY_LOST, Fault.LOST),
}
SITUATIONS = {"fresh": 0, "over the first": 1, "over one that replaced another": 2}


@pytest.mark.parametrize(
    ("store", "situation"), [*(("objstore", s) for s in SITUATIONS), ("fileserver", "over the first")]
)
@pytest.mark.parametrize("kind", CALLS)
def test_a_store_that_fails_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, store: str, situation: str, kind: str
) -> None:
    before, folder = tmp_path / "before", tmp_path / "run"
    root, url = f"{store}://{folder}", f"{store}://{folder}/{NAME}"
    before.mkdir()
    for _ in range(SITUATIONS[situation]):
        save_small(f"{store}://{before}/{NAME}", 1)
    old = 1 if SITUATIONS[situation] else None
    wrong, tried = [], 0
    for fault in CALLS[kind]:
        for plan in plans(kind, fault):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(before, folder)
            with failing(plan):
                outcome = outcome_of(lambda: save_small(url, 2))
            allowed = {"returned": [2], "raised": [old]}[outcome]
            if kind == "read" and outcome == "raised":
                allowed = [old, 2]  # the manifest was put, and the store does not say whether
            found = value(url)
            more = surplus(root, folder) if found in allowed else []
            if found not in allowed or more:
                wrong.append(f"{fault.name} of {kind} {plan.first}: {outcome}, found {found} and {more}")
            tried += plan.was_reached
    assert wrong == []
    assert (
        tried
        or (store, kind) in {("objstore", "rename"), ("objstore", "makedirs"), ("fileserver", "complete")}
        or (situation == "fresh" and kind == "delete")
    )


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 6, 8, 10, 13, 20])
@pytest.mark.parametrize("saves", [0, 1, 2])
def test_a_store_that_tells_what_was_leaves_the_old_or_the_new(tmp_path: Path, saves: int, lag: int) -> None:
    url = f"objstore://{tmp_path}/{NAME}"
    for _ in range(saves):
        save_small(url, 1)
    with failing(lag=lag):
        outcome = outcome_of(lambda: save_small(url, 2))
    assert value(url) == (2 if outcome == "returned" else 1 if saves else None)
    save_small(url, 3)
    assert value(url) == 3


@pytest.mark.parametrize("kind", CALLS)
def test_a_store_that_throttles_is_asked_again(tmp_path: Path, kind: str) -> None:
    url = f"objstore://{tmp_path}/{NAME}"
    save_small(url, 1)
    with failing(Plan(kind=kind, fault=Fault.THROTTLED, times=CLIENT_TRIES - 1)):
        save_small(url, 2)
    assert value(url) == 2


@pytest.mark.parametrize("store", ["objstore", "fileserver"])
@pytest.mark.parametrize("kind", ["list", "info", "read", "put", "rename", "delete"])
def test_a_delete_that_fails_at_any_call_leaves_the_whole_or_nothing(tmp_path: Path, store: str, kind: str) -> None:
    folder = tmp_path / "run"
    url = f"{store}://{folder}/{NAME}"
    for fault in (Fault.REFUSED, Fault.TIMEOUT):
        for plan in plans(kind, fault):
            shutil.rmtree(folder, ignore_errors=True)
            save_small(url, 1)
            with failing(plan):
                outcome = outcome_of(lambda: delete_checkpoint(url))
            assert value(url) in ([None] if outcome == "returned" else [None, 1])
            assert surplus(f"{store}://{folder}", folder) == []


# --- saving to a disk ---

DISK_CALLS = ("open", "write", "fsync", "mkdir", "rename", "exchange", "unlink", "rmdir", "listdir")
DISK_SITUATIONS: dict[str, tuple[Any, Any, bool]] = {
    "fresh": (None, save_small, True),
    "over a checkpoint": (save_small, save_small, True),
    "over a checkpoint, two renames": (save_small, save_small, False),
    "over a file": (save_file, save_small, True),
    "a file": (None, save_file, True),
    "a file over a file": (save_file, save_file, True),
    "a file over a checkpoint": (save_small, save_file, True),
    "a file over a checkpoint, two renames": (save_small, save_file, False),
}


@pytest.mark.parametrize(
    ("situation", "lasting"), [*((s, False) for s in DISK_SITUATIONS), *((s, True) for s in list(DISK_SITUATIONS)[:3])]
)
def test_a_disk_that_fails_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, situation: str, lasting: bool) -> None:
    prepare, save, can_exchange = DISK_SITUATIONS[situation]
    before, folder = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    if prepare is not None:
        prepare(before / NAME, 1)
    wrong = []
    for kind in DISK_CALLS:
        for fault in (Fault.FULL, Fault.BROKEN, *((Fault.LOST, Fault.CUT) if kind == "write" else ())):
            for plan in plans(kind, fault, times=1000 if lasting else 1):
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(before, folder)
                with failing_disk(plan, can_exchange=can_exchange):
                    outcome = outcome_of(lambda: save(folder / NAME, 2))
                allowed = {"returned": [2], "raised": [None if prepare is None else 1]}[outcome]
                if (situation, kind, outcome) == ("a file over a file", "fsync", "raised"):
                    allowed = [1, 2]  # a rename over a file cannot be taken back when the last fsync fails
                found = value(folder / NAME)
                if found not in allowed:
                    wrong.append(f"{fault.name} of {kind} {plan.first}: {outcome}, found {found}")
                save(folder / NAME, 3)
                clean_leftovers(folder, name=NAME)
                if value(folder / NAME) != 3 or os.listdir(folder) != [NAME]:
                    wrong.append(f"{fault.name} of {kind} {plan.first}: the next save left {os.listdir(folder)}")
    assert wrong == []


def test_short_writes_are_gone_on_with(tmp_path: Path) -> None:
    with failing_disk(Plan(kind="write", fault=Fault.LOST, times=1000)) as plan:
        save_small(tmp_path / NAME, 1)
    assert plan.counts["write"] > 20
    CheckpointReader(tmp_path / NAME).verify()
    assert value(tmp_path / NAME) == 1


@pytest.mark.parametrize("kept", [0.0, 0.5])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".index", "meta.pt", "manifest.json"])
def test_a_disk_that_only_says_it_is_flushed_costs_a_checkpoint_and_no_more(
    tmp_path: Path, name: str, kept: float
) -> None:
    manager = CheckpointManager(tmp_path, max_attempts=None)
    manager.save({"n": 1}, step=1)
    with failing_disk(Plan(kind="fsync", fault=Fault.LOST, times=1000)):
        manager.save({"n": 2}, step=2)
    manager.close()
    lost = tmp_path / "step-00000002" / name
    os.truncate(lost, int(kept * lost.stat().st_size))  # the power fails
    with pytest.raises(CheckpointCorruptError):
        CheckpointReader(tmp_path / "step-00000002").verify()
    state = {"n": 0}
    with pytest.warns(FallBackWarning, match="step-00000002"):
        manager.load(state)
    assert state == {"n": 1}


# --- reading ---


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run folder with two checkpoints."""
    root = f"objstore://{tmp_path}/run"
    with CheckpointManager(root) as manager:
        for n in (1, 2):
            manager.save({"w": torch.full((50,), float(n)), "n": n}, step=n)
    return root


def is_of(name: str) -> Callable[[str], bool]:
    return lambda path: path.endswith(name) and "step-00000002" in path


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.TIMEOUT, Fault.BROKEN, Fault.DENIED, Fault.THROTTLED])
@pytest.mark.parametrize("kind", ["read", "info"])
@pytest.mark.parametrize("name", ["manifest.json", ".distcp", ".index", "meta.pt"])
def test_a_store_that_does_not_answer_is_no_damage_and_sends_no_run_back(
    run: str, name: str, kind: str, fault: Fault
) -> None:
    state = {"n": 0}
    with (
        failing(Plan(kind=kind, fault=fault, times=1000, wanted=is_of(name))),
        pytest.raises(OSError, match=MESSAGES) as caught,
    ):
        CheckpointManager(run, max_attempts=None).load(state)
    assert not isinstance(caught.value, CheckpointCorruptError)
    assert state == {"n": 0}
    CheckpointManager(run, max_attempts=None).load(state)
    assert state == {"n": 2}


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.TIMEOUT, Fault.BROKEN])
def test_a_listing_that_fails_starts_no_fresh_run(run: str, fault: Fault) -> None:
    with failing(Plan(kind="list", fault=fault, times=1000)), pytest.raises(OSError, match=MESSAGES):
        CheckpointManager(run).load({"n": 0})


@pytest.mark.parametrize("name", ["manifest.json", ".distcp", ".index", "meta.pt"])
def test_a_read_that_is_cut_short_is_damage_and_sends_a_run_back(run: str, name: str) -> None:
    state, cut = {"n": 0}, Plan(kind="read", fault=Fault.CUT, times=1000, wanted=is_of(name))
    with failing(cut), pytest.warns(FallBackWarning, match="step-00000002"):
        CheckpointManager(run, max_attempts=None).load(state)
    assert state == {"n": 1}
    with failing(cut), pytest.raises(CheckpointCorruptError, match="step-00000002"):
        CheckpointManager(run).load(state, path=f"{run}/step-00000002")


def test_a_save_that_cannot_ask_which_is_the_newest_raises_and_takes_no_place(run: str) -> None:
    silent = Plan(kind="read", fault=Fault.REFUSED, times=1000, wanted=is_of("manifest.json"))
    with failing(silent), pytest.raises(CheckpointSaveError, match="503"):
        save_small(f"{run}/step-00000003", 3)
    save_small(f"{run}/step-00000003", 3)
    assert [path.name for path in list_checkpoints(run)] == [f"step-0000000{n}" for n in (3, 2, 1)]


# --- the manager ---


@pytest.mark.parametrize("kind", ["part", "put", "read", "info", "list", "delete"])
def test_a_manager_whose_store_fails_at_any_call_has_the_older_or_the_newer(tmp_path: Path, kind: str) -> None:
    before, folder = tmp_path / "before", tmp_path / "run"
    with CheckpointManager(f"objstore://{before}", keep=1) as manager:
        manager.save({"n": 1}, step=1)
    for plan in plans(kind, Fault.REFUSED):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        with CheckpointManager(f"objstore://{folder}", keep=1, on_save_error="warn") as manager:
            with failing(plan), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                saved = manager.save({"n": 2}, step=2)
                manager.close()
            state = {"n": 0}
            manager.load(state)
            assert state["n"] in ((2,) if saved else (1, 2)), f"call {plan.first}"
            manager.save({"n": 3}, step=3)
            manager.prune()
            assert [info.step for info in manager.list()] == [3]
            assert leftovers(f"objstore://{folder}") == []


def test_the_errors_of_a_disk_keep_their_numbers(tmp_path: Path) -> None:
    with failing_disk(Plan(kind="write", fault=Fault.FULL)), pytest.raises(CheckpointSaveError, match="Free some") as e:
        save_small(tmp_path / NAME, 1)
    assert isinstance(e.value.__cause__, OSError)
    assert e.value.__cause__.errno == errno.ENOSPC
