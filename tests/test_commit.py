"""The commit: whatever happens while a checkpoint is saved or deleted, its path holds the old or the new one, whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_resume.checkpoint import commit, filesystem, layout, shards
from lightning_resume.checkpoint.layout import Kind, classify
from lightning_resume.checkpoint.manifest import read_manifest
from lightning_resume.checkpoint.writer import write_checkpoint
from lightning_resume.errors import CheckpointIncompleteError, CheckpointSaveError
from tests.checkpoint_worker import SECONDS, save_file, save_small, value_at


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What went wrong when each scenario was killed before each of its file operations."""
    command = [sys.executable, "-m", "tests.checkpoint_worker", str(tmp_path_factory.mktemp("deaths"))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


@pytest.fixture
def files_of_at_most_10_kb() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may write anywhere, so these tests give up being root for a while."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user who may not write")
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every fsync and rename, with the path it was done to."""
    seen: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(source: Any, target: Any) -> None:
        seen.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    return seen


def big_save(path: Path) -> None:
    write_checkpoint(path, state={"w": torch.zeros(100_000)}, leaves={}, meta=None)


# --- crashes ---


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_save_killed_at_any_operation_leaves_the_old_or_the_new(deaths: dict[str, list[str]], way: str) -> None:
    assert deaths[f"an overwriting save, {way}"] == []
    assert deaths[f"a save over a file, {way}"] == []


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_single_file_killed_at_any_operation_leaves_the_old_or_the_new(
    deaths: dict[str, list[str]], way: str
) -> None:
    assert deaths[f"a file over a save, {way}"] == []
    assert deaths[f"a file over a file, {way}"] == []


def test_a_fresh_save_killed_at_any_operation_leaves_nothing_or_the_whole(deaths: dict[str, list[str]]) -> None:
    assert deaths["a fresh save, exchange"] == []


def test_a_delete_killed_at_any_operation_leaves_the_whole_or_nothing(deaths: dict[str, list[str]]) -> None:
    assert deaths["a delete, exchange"] == []


def test_everything_is_durable_before_the_name_and_the_name_after(
    tmp_path: Path, operations: list[tuple[str, str]]
) -> None:
    save_small(tmp_path / "c", 1)
    staged = os.path.dirname(operations[0][1])
    data = ["__0_0.distcp", ".metadata", ".index", "meta.pt"]
    assert operations == [
        *[("fsync", f"{staged}/{name}") for name in data],
        ("fsync", staged),
        ("fsync", f"{staged}/manifest.json"),
        ("fsync", staged),
        ("rename", str(tmp_path / "c")),
        ("fsync", str(tmp_path)),
    ]


# --- failures ---


@pytest.mark.usefixtures("files_of_at_most_10_kb")
def test_a_full_disk_leaves_the_older_checkpoint_and_names_the_path(tmp_path: Path) -> None:
    save_small(tmp_path / "c", 1)
    with pytest.raises(CheckpointSaveError, match=r"c failed: rank 0: OSError: .*File too large.*Free some space"):
        big_save(tmp_path / "c")
    assert value_at(tmp_path / "c") == 1
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.usefixtures("files_of_at_most_10_kb")
def test_a_single_file_on_a_full_disk_leaves_the_older_file(tmp_path: Path) -> None:
    save_file(tmp_path / "c", 1)
    with pytest.raises(OSError, match="File too large"):
        commit.commit_file(tmp_path / "c", lambda file: filesystem.torch_save(torch.zeros(100_000), file))
    assert value_at(tmp_path / "c") == 1
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("failing", range(1, 8))
def test_a_failing_fsync_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, code: int
) -> None:
    save_small(tmp_path / "c", 1)
    fsync, calls = os.fsync, iter(range(1, 100))

    def fail_once(descriptor: int) -> None:
        if next(calls) == failing:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(CheckpointSaveError, match=str(tmp_path / "c")) as caught:
        save_small(tmp_path / "c", 2)
    assert isinstance(caught.value.__cause__, OSError)
    assert value_at(tmp_path / "c") == 1
    assert os.listdir(tmp_path) == ["c"]


def test_a_folder_that_may_not_be_written_is_named_and_untouched(tmp_path: Path, request: Any) -> None:
    save_small(tmp_path / "c", 1)
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest-" in str(folder):  # below pytest's own
            folder.chmod(0o755)
    request.getfixturevalue("as_nobody")
    with pytest.raises(CheckpointSaveError, match=r"c failed: .*PermissionError.*folder writable") as caught:
        save_small(tmp_path / "c", 2)
    assert isinstance(caught.value.__cause__, PermissionError)
    assert value_at(tmp_path / "c") == 1


def test_an_item_that_the_writer_lost_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan = shards._write_plan

    def lose_one(*args: Any) -> Any:
        files = write_plan(*args)
        files[-1].indexes.pop()
        files[-1].items.pop()
        return files

    monkeypatch.setattr(shards, "_write_plan", lose_one)
    with pytest.raises(CheckpointSaveError, match=r"1 of 3 planned items were not written: resume.x"):
        save_small(tmp_path / "c", 1)
    assert os.listdir(tmp_path) == []


# --- overwriting and leftovers ---


def test_overwriting_leaves_no_stale_file(tmp_path: Path) -> None:
    save_small(tmp_path / "c", 1)
    (tmp_path / "c" / "__1_0.distcp").touch()
    save_small(tmp_path / "c", 2)
    assert sorted(os.listdir(tmp_path / "c")) == [".index", ".metadata", "__0_0.distcp", "manifest.json", "meta.pt"]


def test_the_sequence_goes_up_with_every_save_beside_it(tmp_path: Path) -> None:
    for value, name in enumerate(["a", "b", "a"]):
        save_small(tmp_path / name, value)
    assert (read_manifest(tmp_path / "a").sequence, read_manifest(tmp_path / "b").sequence) == (2, 1)


def test_a_link_is_replaced_and_what_it_led_to_is_kept(tmp_path: Path) -> None:
    save_small(tmp_path / "c", 1)
    (tmp_path / "last").symlink_to("c")
    save_small(tmp_path / "last", 2)
    assert (value_at(tmp_path / "c"), value_at(tmp_path / "last")) == (1, 2)
    assert not (tmp_path / "last").is_symlink()


def test_the_next_save_removes_leftovers_of_the_run_and_nothing_else(tmp_path: Path) -> None:
    ours = [".step-00000001.tmp-0123456789abcdef", ".c.tmp-0123456789abcdef", ".step-00000002.old-0123456789abcdef"]
    others = [".other.tmp-0123456789abcdef", ".step-00000001.tmp-1", "step-00000002", "notes"]
    for name in ours + others:
        (tmp_path / name).mkdir()
    save_small(tmp_path / "c", 1)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "c"])


def test_an_older_checkpoint_without_its_name_is_found_and_is_no_leftover(tmp_path: Path) -> None:
    save_small(tmp_path / "step-00000001", 1)
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.old-0123456789abcdef")
    assert layout.leftovers(tmp_path) == []
    assert layout.list_checkpoints(tmp_path) == [tmp_path / "step-00000001"]
    assert value_at(tmp_path / "step-00000001") == 1


def test_a_folder_that_was_being_written_is_incomplete(tmp_path: Path) -> None:
    save_small(tmp_path / "c", 1)
    staged = (tmp_path / "c").rename(tmp_path / ".c.tmp-0123456789abcdef")
    assert classify(staged) is Kind.INCOMPLETE
    with pytest.raises(CheckpointIncompleteError, match="unfinished"):
        value_at(staged)


def test_deleting_removes_folders_and_files(tmp_path: Path) -> None:
    save_small(tmp_path / "c", 1)
    save_file(tmp_path / "f", 1)
    commit.delete_checkpoint(tmp_path / "c")
    commit.delete_checkpoint(tmp_path / "f")
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        commit.delete_checkpoint(tmp_path / "c")


def test_exchange_says_so_where_the_filesystem_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_renameat2", lambda: None)
    assert not filesystem.exchange(tmp_path / "a", tmp_path / "b")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        filesystem.exchange(tmp_path / "a", tmp_path / "b")


class Interrupts:
    """What Ctrl-C while this is pickled looks like."""

    def __reduce__(self) -> str:
        raise KeyboardInterrupt


def test_an_interrupt_stays_an_interrupt_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "c", state={"x": Interrupts()}, leaves={}, meta=None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [lambda path: save_small(path, 2), lambda path: save_file(path, 2)])
def test_a_folder_that_holds_other_things_is_not_replaced(tmp_path: Path, make: Any) -> None:
    save_small(tmp_path / "run" / "step-00000001", 1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for name in ("run", "notes"):
        with pytest.raises((CheckpointSaveError, FileExistsError), match="holds other things"):
            make(tmp_path / name)
    assert value_at(tmp_path / "run" / "step-00000001") == 1
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    assert value_at(tmp_path / "empty") == 2
