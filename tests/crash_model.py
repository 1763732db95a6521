"""Enumerates what a disk may hold after a crash at any point of a save or a delete, and loads from every such state.

``strace`` records what the code asks of the system. A model of a disk then says what a crash may lose: a file's data
lasts once that file was fsynced, a name once its folder was; of the rest any part may have reached the disk, in any
order. So do ALICE (Pillai et al., OSDI 2014) and CrashMonkey (Mohan et al., OSDI 2018). Each state is laid out in a
real folder and judged by loading from it.

Not modelled: files written through mmap or appended to, links, renames from one folder into another (the recorder
raises, or sees that its operations do not lead to what is on the disk), a failing disk, and remote stores.

``python -m tests.crash_model --large`` takes more states, two ranks, and crashes after crashes; it prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from lightning_resume.checkpoint import filesystem
from lightning_resume.checkpoint.commit import delete_checkpoint
from lightning_resume.checkpoint.layout import Kind, classify, list_checkpoints, newest, resolve
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.writer import write_checkpoint
from lightning_resume.errors import CheckpointNotFoundError
from tests.checkpoint_worker import SECONDS, launch, save_file, save_small, small_state

NAME = "step-00000001"
BESIDE = "step-00000009"  # another checkpoint of the run, which only has its retired name and which nothing may touch
DIGITS = "0123456789abcdef"
LONG_AGO = 1_000_000_000  # seconds since 1970: older than what is written after a crash

T = TypeVar("T")


# --- what is done: acts on the path of a checkpoint, in a process that is recorded ---


def save_on_two_ranks(value: int, path: Path) -> None:
    work = {1: save_1_of_rank, 2: save_2_of_rank}[value]
    results = launch(work, 2, path.parents[2])
    assert results == [None, None], results


def save_1_of_rank(rank: int, folder: Path) -> None:
    _save_of_rank(rank, folder, 1)


def save_2_of_rank(rank: int, folder: Path) -> None:
    _save_of_rank(rank, folder, 2)


def _save_of_rank(rank: int, folder: Path, value: int) -> None:
    wanted = small_state(value)
    wanted["leaves"] |= {f"resume.rng.rank_{rank:05d}": b"rng of %d" % rank}
    write_checkpoint(folder / "disk" / "run" / NAME, **wanted)


def rename(old: str, new: str, path: Path) -> None:
    path.with_name(old).rename(path.with_name(new))


def leave_leftovers(path: Path) -> None:
    """Leaves what crashes of several saves leave, and another checkpoint, which only has its retired name."""
    for name in ("a", "b", BESIDE):
        save_small(path.with_name(name), 9)
    (path.with_name("a") / "manifest.json").unlink()
    rename("a", f".{NAME}.old-{DIGITS}", path)
    rename("b", f".step-00000002.tmp-{DIGITS}", path)
    rename(BESIDE, f".{BESIDE}.old-{DIGITS}", path)


ACTS: Mapping[str, Callable[[Path], None]] = {
    "save 1": lambda path: save_small(path, 1),
    "save 2": lambda path: save_small(path, 2),
    "save 3": lambda path: save_small(path, 3),
    "save 1 on two ranks": partial(save_on_two_ranks, 1),
    "save 2 on two ranks": partial(save_on_two_ranks, 2),
    "file 1": lambda path: save_file(path, 1),
    "file 2": lambda path: save_file(path, 2),
    "delete": delete_checkpoint,
    # what earlier crashes leave; put aside first, because a save would clean it
    "put aside": partial(rename, NAME, "aside"),
    "half remove it": lambda path: (path.with_name("aside") / "manifest.json").unlink(),
    "retire it": partial(rename, "aside", f".{NAME}.old-{DIGITS}"),
    "leave leftovers": leave_leftovers,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """An act on what earlier acts left: a load finds one of ``values`` while it runs, and after it the last."""

    before: tuple[str, ...] = ()
    act: str
    values: tuple[int | None, int | None]
    settled: bool = False  # all that was done before has reached the disk
    can_exchange: bool = True
    sabotage: str | None = None

    @property
    def beside(self) -> bool:
        return "leave leftovers" in self.before


OVER = {
    "a save over a save": Scenario(before=("save 1",), act="save 2", values=(1, 2)),
    "a save over a file": Scenario(before=("file 1",), act="save 2", values=(1, 2)),
    "a file over a save": Scenario(before=("save 1",), act="file 2", values=(1, 2)),
    "a save over a save over a save": Scenario(before=("save 3", "save 1"), act="save 2", values=(1, 2)),
    "a save beside what crashes left": Scenario(
        before=("save 1", "leave leftovers"), act="save 2", values=(1, 2), settled=True
    ),
    "a save beside a retired one, half removed": Scenario(
        before=("save 3", "put aside", "save 1", "half remove it", "retire it"),
        act="save 2",
        values=(1, 2),
        settled=True,
    ),
    "a save where only the retired one is": Scenario(
        before=("save 1", "put aside", "retire it"), act="save 2", values=(1, 2), settled=True
    ),
}
ONCE = {
    "a fresh save": Scenario(act="save 2", values=(None, 2)),
    "a fresh file": Scenario(act="file 2", values=(None, 2)),
    "a file over a file": Scenario(before=("file 1",), act="file 2", values=(1, 2)),
    "a delete": Scenario(before=("save 1",), act="delete", values=(1, None)),
    "a delete of a file": Scenario(before=("file 1",), act="delete", values=(1, None)),
    "a delete where only the retired one is": Scenario(
        before=("save 1", "put aside", "retire it"), act="delete", values=(1, None), settled=True
    ),
    "a delete after two renames": Scenario(
        before=("save 3", "save 1"), act="delete", values=(1, None), can_exchange=False
    ),
    "a delete beside a retired one": Scenario(
        before=("save 3", "put aside", "save 1", "retire it"), act="delete", values=(1, None), settled=True
    ),
    "a delete beside a retired one, half removed": Scenario(
        before=("save 3", "put aside", "save 1", "half remove it", "retire it"),
        act="delete",
        values=(1, None),
        settled=True,
    ),
}
TWO_RANKS = {
    "a fresh save on two ranks": Scenario(act="save 2 on two ranks", values=(None, 2)),
    "a save over a save on two ranks": Scenario(
        before=("save 1 on two ranks",), act="save 2 on two ranks", values=(1, 2)
    ),
}
CRASHED_AGAIN = ("a fresh save", "a save over a save, exchange", "a save over a save, two renames", "a delete")
AGAIN = 25  # states of each that are saved over, and deleted, with a crash at every point
SCENARIOS = {
    **ONCE,
    **{f"{name}, exchange": scenario for name, scenario in OVER.items()},
    **{f"{name}, two renames": dataclasses.replace(scenario, can_exchange=False) for name, scenario in OVER.items()},
}


def _skip_fsync(patch: pytest.MonkeyPatch, is_skipped: Callable[[str, int], bool]) -> None:
    fsync = os.fsync

    def fsync_the_rest(descriptor: int) -> None:
        if not is_skipped(os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_mode):
            fsync(descriptor)

    patch.setattr(os, "fsync", fsync_the_rest)


def _remove_older_first(patch: pytest.MonkeyPatch) -> None:
    def replace_folder(_from: int, new: bytes, _to: int, old: bytes, _flags: int) -> int:
        shutil.rmtree(old)
        os.rename(new, old)
        return 0

    patch.setattr(filesystem, "_renameat2", lambda: replace_folder)


def _write_in_place(patch: pytest.MonkeyPatch) -> None:
    def copy(source: Path, target: Path) -> None:
        data = source.read_bytes()
        source.unlink()
        with open(target, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    patch.setattr(os, "rename", copy)


SABOTAGES: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no folder is fsynced": lambda patch: _skip_fsync(patch, lambda _, mode: stat.S_ISDIR(mode)),
    "the run folder is not fsynced": lambda patch: _skip_fsync(patch, lambda path, _: path.endswith("/run")),
    "the staged folder is not fsynced": lambda patch: _skip_fsync(
        patch, lambda path, mode: stat.S_ISDIR(mode) and ".tmp-" in path
    ),
    "meta.pt is not fsynced": lambda patch: _skip_fsync(patch, lambda path, _: path.endswith("/meta.pt")),
    "the shards are not fsynced": lambda patch: _skip_fsync(patch, lambda path, _: path.endswith(".distcp")),
    "the older one is removed first": _remove_older_first,
    "it is written in place": _write_in_place,
}


# --- the recorder ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One thing that was asked of the disk; paths are relative to its root, of which "." is the name."""

    call: str
    path: str
    to: str = ""
    offset: int = 0
    data: bytes = b""

    def __str__(self) -> str:
        return f"{self.call} {self.path}{' ' + self.to if self.to else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """The operations of a scenario, with "begin" and "end" around those of its act; ``root`` is what they led to."""

    scenario: Scenario
    start: Crash
    root: Path
    operations: tuple[Operation, ...]


CALLS = "openat,open,creat,write,pwrite64,writev,pwritev,pwritev2,lseek,truncate,ftruncate,fallocate,copy_file_range,"
CALLS += "sendfile,splice,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,link,linkat,symlink,symlinkat,"
CALLS += "unlink,unlinkat,mkdir,mkdirat,rmdir"
LINE = re.compile(r"(?P<pid>\d+) +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
UNFINISHED = re.compile(r"(?P<pid>\d+) +(?P<start>.*) <unfinished \.\.\.>")
RESUMED = re.compile(r"(?P<pid>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)")


def record(scenarios: Sequence[Scenario], folder: Path, *, starts: Sequence[Crash] = ()) -> list[Recording]:
    """Acts all ``scenarios`` out in one process, each in a folder of its own, which is empty or one of ``starts``."""
    folder.mkdir()
    jobs, trace = folder / "jobs.json", folder / "trace"
    jobs.write_text(json.dumps([dataclasses.asdict(scenario) for scenario in scenarios]))
    roots = [folder / str(index) / "disk" for index in range(len(scenarios))]
    starts = starts or [EMPTY] * len(scenarios)
    for root, start in zip(roots, starts, strict=True):
        write_tree(start, root)
    strace = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "100000000", "-e", f"trace={CALLS}", "-o", str(trace)]
    command = [*strace, sys.executable, "-m", "tests.crash_model", "--act", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert run.returncode == 0, run.stderr
    whole_calls = list(_whole_calls(trace))
    recordings = [
        Recording(scenario=scenario, start=start, root=root, operations=tuple(_Parser(root).parse(whole_calls)))
        for scenario, start, root in zip(scenarios, starts, roots, strict=True)
    ]
    for recording in recordings:
        _check_nothing_was_missed(recording)
    return recordings


def act_out(folder: Path) -> None:
    """Is what the recorded process does."""
    torch.set_num_threads(1)
    for index, fields in enumerate(json.loads((folder / "jobs.json").read_text())):
        scenario = Scenario(**fields)
        root = folder / str(index) / "disk"
        with pytest.MonkeyPatch.context() as patch:
            if not scenario.can_exchange:
                patch.setattr(filesystem, "_renameat2", lambda: None)
            for act in scenario.before:
                ACTS[act](root / "run" / NAME)
            _mark("settled", root, wanted=scenario.settled)
            if scenario.sabotage is not None:
                SABOTAGES[scenario.sabotage](patch)
            _mark("begin", root)
            ACTS[scenario.act](root / "run" / NAME)
            _mark("end", root)


def _mark(what: str, root: Path, *, wanted: bool = True) -> None:
    if wanted:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(root / what)  # fails, and is seen


def _whole_calls(trace: Path) -> Iterator[re.Match[str]]:
    """Yields each call when it was done; strace writes one in two parts where another process came between."""
    started: dict[str, str] = {}
    for line in trace.read_text().splitlines():
        if cut := UNFINISHED.fullmatch(line):
            started[cut["pid"]] = cut["start"]
            continue
        resumed = RESUMED.fullmatch(line)
        text = f"{resumed['pid']} {started.pop(resumed['pid'])}{resumed['rest']}" if resumed else line
        if call := LINE.match(text):
            yield call


class _Parser:
    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._hex_root = "".join(f"\\x{byte:02x}" for byte in os.fsencode(root))
        self._positions: dict[str, int] = {}

    def parse(self, calls: Iterable[re.Match[str]]) -> Iterator[Operation]:
        for call in calls:
            if self._hex_root in call["arguments"]:
                yield from self._parse(call["call"], call["arguments"].split(", "), int(call["result"]))

    def _parse(self, call: str, arguments: list[str], result: int) -> Iterator[Operation]:
        if result < 0:
            yield from self._parse_mark(call, arguments)
        elif call in ("openat", "open", "creat"):
            yield from self._parse_open(call, arguments)
        elif call == "lseek":
            self._positions[self._file(arguments[0])] = result
        elif call in ("write", "pwrite64"):
            yield self._parse_write(call, arguments, result)
        elif call in ("fsync", "fdatasync"):
            yield Operation(call="fsync", path=self._file(arguments[0]))
        elif call in ("mkdir", "mkdirat"):
            yield Operation(call="mkdir", path=self._paths(call, arguments)[0])
        elif call in ("unlink", "unlinkat", "rmdir"):
            is_folder = call == "rmdir" or "AT_REMOVEDIR" in arguments[-1]
            yield Operation(call="rmdir" if is_folder else "unlink", path=self._paths(call, arguments)[0])
        elif call in ("rename", "renameat", "renameat2"):
            one, other = self._paths(call, arguments)
            yield Operation(call="exchange" if "EXCHANGE" in arguments[-1] else "rename", path=one, to=other)
        else:
            raise AssertionError(f"{call} is not modelled")

    def _parse_mark(self, call: str, arguments: list[str]) -> Iterator[Operation]:
        name = self._paths(call, arguments)[0] if call == "rmdir" else ""
        if name in ("begin", "end", "settled"):
            yield Operation(call=name, path=".")

    def _parse_open(self, call: str, arguments: list[str]) -> Iterator[Operation]:
        path = self._paths(call, arguments)[0]
        self._positions[path] = 0
        flags = " ".join(arguments[1:])
        assert "O_APPEND" not in flags, "appending is not modelled"
        if call == "creat" or "O_CREAT" in flags:
            yield Operation(call="create", path=path)
        if call == "creat" or "O_TRUNC" in flags:
            yield Operation(call="truncate", path=path)

    def _parse_write(self, call: str, arguments: list[str], length: int) -> Operation:
        path = self._file(arguments[0])
        start = int(arguments[3]) if call == "pwrite64" else self._positions[path]
        if call == "write":
            self._positions[path] = start + length
        return Operation(call="write", path=path, offset=start, data=_unescape(arguments[1])[:length])

    def _file(self, descriptor: str) -> str:
        return self._relative(_text(descriptor[descriptor.index("<") + 1 : -1]))

    def _paths(self, call: str, arguments: list[str]) -> list[str]:
        """The paths among the arguments, each with the folder that was opened for it, where there is one."""
        folders = [f"{_text(a.split('<')[1][:-1])}/" for a in arguments if a.endswith(">")]
        names = [_text(a) for a in arguments if a.startswith('"')]
        return [self._relative(os.path.join(f, n)) for f, n in zip(folders or ["/"] * len(names), names, strict=True)]

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self._root)


def _unescape(text: str) -> bytes:
    return bytes.fromhex(text.strip('"').replace("\\x", ""))


def _text(text: str) -> str:
    return os.fsdecode(_unescape(text))


def _check_nothing_was_missed(recording: Recording) -> None:
    disk = Disk(recording.start)
    for operation in recording.operations:
        disk.do(operation)
    assert disk.tree_now() == read_tree(recording.root), "the recorded operations do not lead to what is on the disk"


# --- the disk ---

Tree = dict[str, bytes | None]  # by path, relative to the root; None is a folder


@dataclasses.dataclass(kw_only=True)
class Node:
    """A file or folder: ``kept`` and ``names`` have reached the disk, ``data`` and ``names_now`` are what was asked."""

    is_folder: bool
    names: dict[str, int] = dataclasses.field(default_factory=dict)
    names_now: dict[str, int] = dataclasses.field(default_factory=dict)
    changed: int = 0
    kept: bytes = b""
    data: bytes = b""

    def variants(self) -> list[bytes]:
        """What a crash may leave of a file: nothing new, all of it, half of it, or zeros in its place."""
        pairs = enumerate(zip(self.kept, self.data, strict=False))
        same = next((at for at, (old, new) in pairs if old != new), min(len(self.kept), len(self.data)))
        half = self.data[: same + (len(self.data) - same) // 2]
        return list(dict.fromkeys([self.kept, self.data, half, self.data[:same].ljust(len(self.data), b"\0")]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """What one operation does, at once, to the names in one folder: where each leads to, None where it is gone."""

    folder: int
    names: Mapping[str, int | None]
    time: int
    operation: Operation

    def touches(self, other: Change) -> bool:
        return self.folder == other.folder and not self.names.keys().isdisjoint(other.names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crash:
    """A state that a crash may leave: the tree, its folders from the longest unchanged on, and how it came about."""

    tree: Tree
    folders_by_age: tuple[str, ...]
    story: str = ""

    @property
    def key(self) -> object:
        return frozenset(self.tree.items()), self.folders_by_age


EMPTY = Crash(tree={".": None}, folders_by_age=(".",))


class Disk:
    """What was asked of a disk, what of it is sure to last, and what is not."""

    def __init__(self, start: Crash = EMPTY) -> None:
        self._nodes = [Node(is_folder=True)]
        self._time = 0
        self._pending: list[Change] = []
        for path, data in start.tree.items():
            if path != ".":
                operation = Operation(call="start", path=path)
                self._change(operation, {path: self._add(Node(is_folder=data is None, data=data or b""))})
        self._settled(Operation(call="settled", path="."))
        for path in start.folders_by_age:
            self._time += 1
            self._nodes[self._find(path)].changed = self._time

    def do(self, operation: Operation) -> None:
        self._time += 1
        getattr(self, f"_{operation.call}")(operation)
        self._forget_what_is_gone()

    def tree_now(self) -> Tree:
        return {path: self._data(node) for path, node in self._walk([node.names_now for node in self._nodes]).items()}

    def crashes(self, *, limit: int, rng: random.Random) -> Iterator[Crash]:
        """Yields what a crash may leave now: all of it where there are at most ``limit`` ways, else a part."""
        unsure = [index for index, node in enumerate(self._nodes) if node.kept != node.data]
        choices = [[False, True] for _ in self._pending] + [self._nodes[index].variants() for index in unsure]
        for picked in _choose(choices, limit, rng):
            reached = [change for change, is_reached in zip(self._pending, picked, strict=False) if is_reached]
            yield self._crash(reached, dict(zip(unsure, picked[len(self._pending) :], strict=True)))
        for order in _orders(self._pending, limit, rng):
            yield self._crash(order, {})

    def _crash(self, reached: Sequence[Change], kept: Mapping[int, bytes]) -> Crash:
        names, changed = [node.names.copy() for node in self._nodes], [node.changed for node in self._nodes]
        for change in reached:
            _apply(change, names[change.folder])
            changed[change.folder] = max(changed[change.folder], change.time)
        found = self._walk(names)
        folders = [path for path, index in found.items() if self._nodes[index].is_folder]
        lost = [change for change in self._pending if change not in reached]
        cut = [f"{len(data)} of {len(self._nodes[index].data)} bytes" for index, data in kept.items()]
        return Crash(
            tree={path: kept.get(index, self._data(index)) for path, index in found.items()},
            folders_by_age=tuple(sorted(folders, key=lambda path: changed[found[path]])),
            story=f"reached the disk: {_listed(reached)}; lost: {_listed(lost)}; unsynced data: {_listed(cut)}",
        )

    def _data(self, index: int) -> bytes | None:
        return None if self._nodes[index].is_folder else self._nodes[index].data

    def _walk(self, names: Sequence[Mapping[str, int]]) -> dict[str, int]:
        """Returns which node lies at each path that ``names`` lead to."""
        found = {".": 0}
        folders = [(".", 0)]
        for above, folder in folders:  # which grows
            for name, index in names[folder].items():
                path = os.path.normpath(f"{above}/{name}")
                found[path] = index
                if self._nodes[index].is_folder:
                    folders.append((path, index))
        return found

    def _find(self, path: str) -> int:
        index = 0
        for name in Path(path).parts:
            index = self._nodes[index].names_now[name]
        return index

    def _add(self, node: Node) -> int:
        self._nodes.append(node)
        return len(self._nodes) - 1

    def _change(self, operation: Operation, leads_to: Mapping[str, int | None]) -> None:
        (above,) = {os.path.dirname(path) for path in leads_to}  # a rename into another folder is not modelled
        names = {os.path.basename(path): index for path, index in leads_to.items()}
        change = Change(folder=self._find(above), names=names, time=self._time, operation=operation)
        _apply(change, self._nodes[change.folder].names_now)
        self._pending.append(change)

    def _create(self, operation: Operation) -> None:
        above, name = os.path.split(operation.path)
        if name not in self._nodes[self._find(above)].names_now:
            self._change(operation, {operation.path: self._add(Node(is_folder=False))})

    def _mkdir(self, operation: Operation) -> None:
        self._change(operation, {operation.path: self._add(Node(is_folder=True, changed=self._time))})

    def _rename(self, operation: Operation) -> None:
        self._change(operation, {operation.path: None, operation.to: self._find(operation.path)})

    def _exchange(self, operation: Operation) -> None:
        one, other = self._find(operation.path), self._find(operation.to)
        self._change(operation, {operation.path: other, operation.to: one})

    def _unlink(self, operation: Operation) -> None:
        self._change(operation, {operation.path: None})

    def _rmdir(self, operation: Operation) -> None:
        self._change(operation, {operation.path: None})

    def _write(self, operation: Operation) -> None:
        node = self._nodes[self._find(operation.path)]
        before, after = node.data[: operation.offset], node.data[operation.offset + len(operation.data) :]
        node.data = before.ljust(operation.offset, b"\0") + operation.data + after

    def _truncate(self, operation: Operation) -> None:
        self._nodes[self._find(operation.path)].data = b""

    def _fsync(self, operation: Operation) -> None:
        index = self._find(operation.path)
        self._keep(index)
        self._pending = [change for change in self._pending if change.folder != index]

    def _keep(self, index: int) -> None:
        node = self._nodes[index]
        node.kept = node.data
        for change in self._pending:
            if change.folder == index:
                _apply(change, node.names)
                node.changed = change.time

    def _settled(self, _operation: Operation) -> None:
        for index in range(len(self._nodes)):
            self._keep(index)
        self._pending = []

    def _begin(self, _operation: Operation) -> None:
        pass

    def _end(self, _operation: Operation) -> None:
        pass

    def _forget_what_is_gone(self) -> None:
        """Drops what no crash can bring back, and what lies below it."""
        folders = {index for index, node in enumerate(self._nodes) if node.is_folder}
        reachable, new = {0}, {0}
        while new:
            below = {index for folder in new & folders for index in self._nodes[folder].names.values()}
            below |= {i for c in self._pending if c.folder in new for i in c.names.values() if i is not None}
            new = below - reachable
            reachable |= new
        self._pending = [change for change in self._pending if change.folder in reachable]
        for index in set(range(len(self._nodes))) - reachable:
            self._nodes[index].kept = self._nodes[index].data


def _apply(change: Change, names: dict[str, int]) -> None:
    for name, index in change.names.items():
        names.pop(name, None)
        if index is not None:
            names[name] = index


def _listed(things: Iterable[object]) -> str:
    return ", ".join(str(thing.operation if isinstance(thing, Change) else thing) for thing in things) or "nothing"


def _choose(choices: Sequence[Sequence[T]], limit: int, rng: random.Random) -> Iterator[tuple[T, ...]]:
    """Yields one of each of ``choices``, of which the first is "lost" and the second "reached the disk"."""
    if math.prod(map(len, choices)) <= limit:
        yield from itertools.product(*choices)
        return
    lost, reached = [choice[0] for choice in choices], [choice[1] for choice in choices]
    yield tuple(lost)
    yield tuple(reached)
    for index, choice in enumerate(choices):
        yield (*lost[:index], reached[index], *lost[index + 1 :])
        yield from ((*reached[:index], other, *reached[index + 1 :]) for other in choice if other != reached[index])
    for _ in range(limit):
        yield tuple(rng.choice(choice) for choice in choices)


def _orders(changes: Sequence[Change], limit: int, rng: random.Random) -> Iterator[Sequence[Change]]:
    """Yields ``changes``, or a part of them, in other orders, where some concern the same name."""
    if not any(one.touches(other) for one, other in itertools.combinations(changes, 2)):
        return
    if sum(math.perm(len(changes), count) for count in range(len(changes) + 1)) <= limit:
        for count in range(len(changes) + 1):
            yield from itertools.permutations(changes, count)
        return
    for _ in range(limit):
        yield rng.sample(changes, rng.randint(2, len(changes)))


def read_tree(root: Path) -> Tree:
    paths = [root, *root.rglob("*")]
    return {os.path.relpath(path, root): None if path.is_dir() else path.read_bytes() for path in paths}


def write_tree(crash: Crash, root: Path) -> None:
    """Makes ``root`` and all below it as the crash left it; the order of its folders' ages is that of their times."""
    for path, data in crash.tree.items():  # what is above comes before what is below
        if data is None:
            (root / path).mkdir(parents=True)
        else:
            (root / path).write_bytes(data)
    for age, path in enumerate(crash.folders_by_age):
        os.utime(root / path, (LONG_AGO + age, LONG_AGO + age))


# --- the judge ---


@dataclasses.dataclass(kw_only=True)
class Report:
    """What was tried of a scenario, and what went wrong."""

    operations: int = 0
    states: int = 0
    different: int = 0
    next_saves: int = 0
    violations: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How much is tried: ways to crash at one point before a part is taken, and states into which is saved again."""

    limit: int = 64
    next_saves: int = 5
    seed: int = 0


def explore(recording: Recording, folder: Path, setting: Setting) -> tuple[Report, list[Crash]]:
    """Judges every state that a crash at any point of the recorded act may leave; returns the different states, too."""
    report, rng, scenario = Report(), random.Random(setting.seed), recording.scenario
    found: dict[object, int | str | None] = {}
    crashes: dict[object, Crash] = {}
    for what, allowed, crash in _crashes(recording, report, setting.limit, rng):
        if crash.key not in crashes:
            crashes[crash.key] = crash
            found[crash.key] = judge(crash, folder / "crash", beside=scenario.beside)
        if found[crash.key] not in allowed:
            report.violations.append(f"a crash after {what}: found {found[crash.key]}, not {allowed}; {crash.story}")
    report.different = len(crashes)
    for crash in rng.sample(list(crashes.values()), min(setting.next_saves, len(crashes))):
        report.next_saves += 1
        if problem := judge_next_save(crash, folder / "crash", scenario):
            report.violations.append(f"the next save: {problem}; {crash.story}")
    return report, list(crashes.values())


def _crashes(
    recording: Recording, report: Report, limit: int, rng: random.Random
) -> Iterator[tuple[str, tuple[int | None, ...], Crash]]:
    """Yields every crash, what was done last before it, and the values that may be found then."""
    disk = Disk(recording.start)
    allowed: tuple[int | None, ...] = ()
    old, new = recording.scenario.values
    for operation in recording.operations:
        disk.do(operation)
        if operation.call == "begin":
            allowed = (old,)
        elif allowed:
            allowed = (new,) if operation.call == "end" else (old, new)
        report.operations += bool(allowed) and operation.call not in ("begin", "end")
        for crash in disk.crashes(limit=limit, rng=rng) if allowed else ():
            report.states += 1
            yield str(operation), allowed, crash


def judge(crash: Crash, folder: Path, *, beside: bool) -> int | str | None:
    """Returns the value that is found at the path, whole, None where there is nothing, else what is wrong."""
    with _laid_out(crash, folder) as run:
        return _look(run, beside=beside)


def judge_next_save(crash: Crash, folder: Path, scenario: Scenario) -> str | None:
    """Returns what is wrong after one more save, None where nothing is."""
    with _laid_out(crash, folder) as run, pytest.MonkeyPatch.context() as patch:
        if not scenario.can_exchange:
            patch.setattr(filesystem, "_renameat2", lambda: None)
        save_small(run / NAME, 3)
        found, names = _look(run, beside=scenario.beside), set(os.listdir(run))
    wanted = {NAME} | ({f".{BESIDE}.old-{DIGITS}"} if scenario.beside else set())
    return None if (found, names) == (3, wanted) else f"found {found} and {sorted(names)}"


@contextlib.contextmanager
def _laid_out(crash: Crash, folder: Path) -> Iterator[Path]:
    write_tree(crash, folder)
    try:
        yield folder / "run"
    finally:
        shutil.rmtree(folder)


def _look(run: Path, *, beside: bool) -> int | str | None:
    try:
        found = value_at(run / NAME)
        listed, first = set(list_checkpoints(run)), newest(run)
        others = {run / BESIDE} if beside else set()
        assert all(value_at(other) == 9 for other in others), "the checkpoint beside it was lost"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wanted = others | ({run / NAME} if found is not None and resolve(run / NAME).is_dir() else set())
    if listed != wanted or (first is None) != (not wanted):
        return f"{found}, but listed are {listed} and the newest is {first}"
    return found


def value_at(path: Path) -> int | None:
    """Returns the value saved at ``path``, every byte of it verified; None where there is nothing."""
    if classify(path) is Kind.SINGLE_FILE:
        return int(torch.load(resolve(path)))
    try:
        reader = CheckpointReader(path)
    except CheckpointNotFoundError:
        return None
    reader.verify()
    assert reader.manifest is not None, "it passed for a stock checkpoint"
    state = reader.read()
    values = {*state["w"].tolist(), state["n"], reader.meta(), int(reader.leaf("resume.x"))}
    assert len(values) == 1, f"a mix: {values}"
    return int(values.pop())


# --- the table ---


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="more states, two ranks, crashes after crashes")
    parser.add_argument("--seed", type=int, default=0, help="of what is taken where not all states are")
    parser.add_argument("--act", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.act is not None:
        act_out(arguments.act)
        return 0
    torch.set_num_threads(1)
    small, large = Setting(seed=arguments.seed), Setting(seed=arguments.seed, limit=1024, next_saves=50)
    with tempfile.TemporaryDirectory() as folder:
        return print_table(Path(folder), large if arguments.large else small, is_large=arguments.large)


def print_table(folder: Path, setting: Setting, *, is_large: bool) -> int:
    """Returns how many scenarios found what is neither the old nor the new checkpoint."""
    columns = ("operations", "prefixes", "states", "different", "next saves", "violations", "seconds")
    print(f"{'scenario':55}" + "".join(f"{column:>11}" for column in columns))
    scenarios = SCENARIOS | (TWO_RANKS if is_large else {})
    recordings = dict(zip(scenarios, record(list(scenarios.values()), folder / "first"), strict=True))
    explored = {name: _print_row(name, [recording], folder, setting) for name, recording in recordings.items()}
    failed = [name for name, (report, _) in explored.items() if report.violations]
    if is_large:
        crashes = {name: crashes for name, (_, crashes) in explored.items() if name in CRASHED_AGAIN}
        failed += _print_crashes_after_crashes(crashes, folder, setting)
    print(f"{len(failed)} of the scenarios failed")
    return len(failed)


def _print_crashes_after_crashes(crashes: Mapping[str, Sequence[Crash]], folder: Path, setting: Setting) -> list[str]:
    """Saves over and deletes a part of what crashes left, and crashes again; returns the names of what failed."""
    tried = [
        (f"{act} after a crash of {name}", start, Scenario(act=act, values=(old, new), can_exchange=False))
        for name, start, old in _starts(crashes, folder / "crash", random.Random(setting.seed))
        for act, new in (("save 3", 3), ("delete", None))
    ]
    names, starts, scenarios = zip(*tried, strict=True)
    recordings: dict[str, list[Recording]] = defaultdict(list)
    for name, recording in zip(names, record(scenarios, folder / "again", starts=starts), strict=True):
        recordings[name].append(recording)
    setting = dataclasses.replace(setting, next_saves=2)
    reports = {name: _print_row(name, those, folder, setting)[0] for name, those in recordings.items()}
    return [name for name, report in reports.items() if report.violations]


def _starts(
    crashes: Mapping[str, Sequence[Crash]], folder: Path, rng: random.Random
) -> Iterator[tuple[str, Crash, int]]:
    """Yields a part of the crashes of each name, where a checkpoint is found, and its value."""
    for name, those in crashes.items():
        for crash in rng.sample(those, min(len(those), AGAIN)):
            value = judge(crash, folder, beside=False)
            if isinstance(value, int):
                yield name, crash, value


def _print_row(
    name: str, recordings: Sequence[Recording], folder: Path, setting: Setting
) -> tuple[Report, list[Crash]]:
    started = time.perf_counter()
    explored = [explore(recording, folder, setting) for recording in recordings]
    total = Report(
        **{
            field.name: functools.reduce(operator.add, [getattr(report, field.name) for report, _ in explored])
            for field in dataclasses.fields(Report)
        }
    )
    numbers = (total.operations, total.operations + len(recordings), total.states, total.different, total.next_saves)
    seconds = time.perf_counter() - started
    columns = "".join(f"{number:11}" for number in (*numbers, len(total.violations)))
    print(f"{name:55}{columns}{seconds:11.1f}", flush=True)
    for violation in total.violations[:3]:
        print(f"    {violation}")
    return total, [crash for _, crashes in explored for crash in crashes]


if __name__ == "__main__":
    sys.exit(main())
