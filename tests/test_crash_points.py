"""Crash points: whatever a crash at any operation leaves of what was not yet fsynced, a load gives the old or the new.

``python -m tests.crash_model --large`` tries more; see there for how it is done and what is not modelled.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tests.crash_model import (
    SABOTAGES,
    SCENARIOS,
    TWO_RANKS,
    Crash,
    Disk,
    Operation,
    Recording,
    Report,
    Scenario,
    Setting,
    explore,
    record,
)

SETTING = Setting(limit=16, next_saves=3)
LESS = Setting(limit=2, next_saves=0)  # still every change lost and every one alone
SABOTAGED = {
    "no folder is fsynced": "a fresh save",
    "the run folder is not fsynced": "a delete",
    "the staged folder is not fsynced": "a fresh save",
    "meta.pt is not fsynced": "a save over a save, exchange",
    "the shards are not fsynced": "a save over a save, two renames",
    "the older one is removed first": "a save over a save, exchange",
    "it is written in place": "a file over a file",
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Recording]:
    """What every scenario asked of the disk; of the sabotaged ones, too, by the name of the sabotage."""
    scenarios = SCENARIOS | {
        sabotage: dataclasses.replace(SCENARIOS[name], sabotage=sabotage) for sabotage, name in SABOTAGED.items()
    }
    return record_all(scenarios, tmp_path_factory)


def record_all(scenarios: Mapping[str, Scenario], factory: pytest.TempPathFactory) -> Mapping[str, Recording]:
    if not can_trace():
        needed = "needs strace, and to be allowed to trace: apt-get install strace"
        pytest.fail(needed) if os.environ.get("CI") else pytest.skip(needed)
    folder = factory.mktemp("crashes") / "recorded"
    return dict(zip(scenarios, record(list(scenarios.values()), folder), strict=True))


def can_trace() -> bool:
    return bool(shutil.which("strace")) and not subprocess.run(["strace", "true"], capture_output=True).returncode


def report_of(recording: Recording, folder: Path, setting: Setting = SETTING) -> Report:
    return explore(recording, folder, setting)[0]


# --- our own code ---


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_crash_at_any_point_leaves_the_old_or_the_new(
    recordings: Mapping[str, Recording], tmp_path: Path, name: str
) -> None:
    report = report_of(recordings[name], tmp_path)
    assert report.violations == []
    assert report.states > report.operations >= 3


@pytest.mark.slow
def test_a_crash_of_two_ranks_at_any_point_leaves_the_old_or_the_new(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    recordings = record_all(TWO_RANKS, tmp_path_factory)
    fewer = Setting(limit=6, next_saves=1)
    assert [report_of(recording, tmp_path, fewer).violations for recording in recordings.values()] == [[], []]


# --- the model finds what is wrong ---


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_the_model_finds_that(recordings: Mapping[str, Recording], tmp_path: Path, sabotage: str) -> None:
    assert report_of(recordings[sabotage], tmp_path, LESS).violations


@pytest.mark.parametrize("name", ["a fresh save", "a save over a save, exchange", "a save over a save, two renames"])
def test_the_model_finds_that_any_one_path_is_not_fsynced(
    recordings: Mapping[str, Recording], tmp_path: Path, name: str
) -> None:
    recording = recordings[name]
    begun = [operation.call for operation in recording.operations].index("begin")
    synced = {operation.path for operation in recording.operations[begun:] if operation.call == "fsync"}
    unfound = [path for path in synced if not report_of(unsynced(recording, path), tmp_path, LESS).violations]
    assert len(synced) >= 6
    assert unfound == []


def unsynced(recording: Recording, path: str) -> Recording:
    kept = [operation for operation in recording.operations if (operation.call, operation.path) != ("fsync", path)]
    return dataclasses.replace(recording, operations=tuple(kept))


# --- the disk ---


def crashes(*calls: tuple[str, ...], data: bytes = b"") -> list[Crash]:
    disk = Disk()
    for call, path, *to in calls:
        disk.do(Operation(call=call, path=path, to="".join(to), data=data if call == "write" else b""))
    return list(disk.crashes(limit=1000, rng=random.Random(0)))


def trees(found: Iterable[Crash]) -> list[dict[str, bytes | None]]:
    """The different ones, without the root."""
    distinct: list[dict[str, bytes | None]] = []
    for tree in ({path: data for path, data in crash.tree.items() if path != "."} for crash in found):
        if tree not in distinct:
            distinct.append(tree)
    return distinct


def test_unsynced_data_is_absent_whole_cut_or_zeros() -> None:
    found = crashes(("create", "f"), ("fsync", "."), ("write", "f"), data=b"data")
    assert trees(found) == [{"f": b""}, {"f": b"data"}, {"f": b"da"}, {"f": bytes(4)}]


def test_a_synced_file_may_still_lack_its_name() -> None:
    found = crashes(("create", "f"), ("write", "f"), ("fsync", "f"), data=b"data")
    assert trees(found) == [{}, {"f": b"data"}]


def test_a_synced_folder_keeps_its_names_and_not_its_own() -> None:
    assert trees(crashes(("mkdir", "d"), ("create", "d/f"), ("fsync", "d"))) == [{}, {"d": None, "d/f": b""}]


def test_a_rename_is_lost_or_done_at_once() -> None:
    assert trees(crashes(("create", "a"), ("fsync", "."), ("rename", "a", "b"))) == [{"a": b""}, {"b": b""}]


def test_renames_may_reach_the_disk_without_the_earlier_one() -> None:
    found = trees(crashes(("create", "a"), ("create", "b"), ("fsync", "."), ("rename", "a", "c"), ("rename", "b", "a")))
    assert {frozenset(tree) for tree in found} >= {frozenset("ab"), frozenset("cb"), frozenset("a"), frozenset("ac")}


def test_an_exchange_is_lost_or_done_at_once() -> None:
    found = crashes(("mkdir", "a"), ("mkdir", "b"), ("create", "a/f"), ("fsync", "a"), ("fsync", "."))
    found = crashes(
        ("mkdir", "a"), ("create", "a/f"), ("fsync", "a"), ("create", "b"), ("fsync", "."), ("exchange", "a", "b")
    )
    assert trees(found) == [{"a": None, "b": b"", "a/f": b""}, {"b": None, "a": b"", "b/f": b""}]


def test_a_removal_may_be_undone() -> None:
    found = crashes(("create", "a"), ("fsync", "."), ("unlink", "a"))
    assert trees(found) == [{"a": b""}, {}]
    assert trees(crashes(("create", "a"), ("fsync", "."), ("unlink", "a"), ("fsync", "."))) == [{}]
