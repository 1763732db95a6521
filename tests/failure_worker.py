"""What the ranks of :mod:`tests.test_failures` do: save or load while one fails or dies, and tell how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_resume import CheckpointManager, loading
from lightning_resume.checkpoint import items, shards
from lightning_resume.checkpoint.commit import Commit, LocalCommit
from lightning_resume.checkpoint.layout import leftovers, newest
from lightning_resume.checkpoint.paths import as_path
from lightning_resume.checkpoint.reader import CheckpointReader
from tests.faulty import Fault, Plan, failing, register
from tests.sigkill import ended, fork_ranks

Told = dict[str, Any]
SETTLED = 20.0  # seconds in which every rank must have ended, whatever happens; measured: less than one
ANSWERED = 2.0  # the process group's own limit where a rank hangs, in seconds


class CannotUnpickleError(OSError):
    """An error of a client library that does not survive the way to another rank."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class Raises:
    """A user's object that raises when it is saved."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.error = error

    def __reduce__(self) -> str:
        raise self.error()


class Counter:
    """A user's object that raises where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def state_dict(self) -> dict[str, Any]:
        if self.fails == "save":
            raise ValueError("the state cannot be told")
        return {"count": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.fails == "load":
            raise ValueError("the state cannot be taken")


class Net(nn.Module):
    """Its ``state_dict`` raises when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(50, 50)
        self.is_bad = False
        self.register_state_dict_pre_hook(lambda *_: self.check())

    def check(self) -> None:
        if self.is_bad:
            raise ValueError("the weights cannot be told")


@dataclasses.dataclass
class Run:
    """One rank of a run without Lightning."""

    root: str
    net: Net = dataclasses.field(default_factory=Net)
    extra: Any = 0
    loads_into: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, number: int, **options: Any) -> Any:
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.fill_(number)
        manager = CheckpointManager(self.root, max_attempts=None, **options)
        try:
            return manager.save(
                {"net": self.net, "number": number, "extra": self.extra}, step=number, user_content=number
            )
        finally:
            manager.close()

    def load(self, **options: Any) -> int:
        """The number that is everywhere in what was loaded."""
        state: dict[str, Any] = {"net": self.net, "number": 0, **self.loads_into}
        content = CheckpointManager(self.root, max_attempts=None).load(state, **options)
        found = {content, state["number"], *(int(v) for p in self.net.parameters() for v in p.detach().unique())}
        assert len(found) == 1, f"a mix: {found}"
        return int(found.pop())


def told_of(act: Callable[[], Any]) -> Told:
    """How ``act`` went, and how long it took."""
    begun = time.monotonic()
    try:
        result: Told = {"returned": act()}
    except BaseException as error:
        result = {"error": type(error).__name__, "cause": type(error.__cause__).__name__, "text": str(error)}
    return result | {"seconds": time.monotonic() - begun}


# --- one rank fails, and lives ---


@contextlib.contextmanager
def small_files(_run: Run) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def nobody(_run: Run) -> Iterator[None]:
    os.seteuid(65534)
    yield
    os.seteuid(0)


@contextlib.contextmanager
def silent_store(_run: Run) -> Iterator[None]:
    with failing(Plan(kind="part", fault=Fault.REFUSED, times=1000)):
        yield


@contextlib.contextmanager
def lost_connection(_run: Run) -> Iterator[None]:
    with failing(Plan(kind="complete", fault=Fault.TIMEOUT, times=1000)):
        yield


@contextlib.contextmanager
def bad_weights(run: Run) -> Iterator[None]:
    run.net.is_bad = True
    yield
    run.net.is_bad = False


def object_in_place(make: Callable[[], Any]) -> Callable[[Run], Any]:
    @contextlib.contextmanager
    def put(run: Run) -> Iterator[None]:
        run.extra = make()
        yield
        run.extra = 0

    return put


@contextlib.contextmanager
def bad_file(_run: Run) -> Iterator[None]:
    """A shard's own write fails with an error that cannot be sent."""
    write = shards.ShardFile.write

    def fail(*_: Any, **__: Any) -> Any:
        raise CannotUnpickleError("no", "connection")

    shards.ShardFile.write = fail  # type: ignore[method-assign]
    yield
    shards.ShardFile.write = write  # type: ignore[method-assign]


FAILURES: dict[str, Callable[[Run], Any]] = {
    "an object that cannot be pickled": object_in_place(lambda: Raises(lambda: ValueError("cannot be saved"))),
    "an error that cannot be sent": object_in_place(lambda: Raises(lambda: CannotUnpickleError("two", "parts"))),
    "a write whose error cannot be sent": bad_file,
    "a state_dict that raises": object_in_place(lambda: Counter(fails="save")),
    "weights that raise": bad_weights,
    "a full disk": small_files,
    "no permission": nobody,
    "a store that answers 503": silent_store,
    "a store that does not answer": lost_connection,
}
USERS_ERRORS = {
    "an object that cannot be pickled": "cannot be saved",
    "an error that cannot be sent": "two parts",
    "a state_dict that raises": "the state cannot be told",
    "weights that raise": "the weights cannot be told",
}
ON_A_STORE = ("a store that answers 503", "a store that does not answer")


def save_while_one_fails(folder: Path, failure: str, world_size: int, bad: int) -> list[Told]:
    """Saves 1; saves 2 while rank ``bad`` fails; loads; saves 3; loads."""
    url = f"objstore://{folder}/run" if failure in ON_A_STORE else str(folder / "run")

    def work(tell: Callable[[str], None]) -> None:
        register()
        run = Run(url)
        run.save(1)
        with FAILURES[failure](run) if dist.get_rank() == bad else contextlib.nullcontext():
            told = told_of(lambda: run.save(2))
        told["then"] = run.load()
        told["left"] = [str(path) for path in leftovers(url)]
        run.save(3)
        told["next"] = run.load()
        tell(json.dumps(told))

    return results(folder, work, world_size)


def load_while_one_fails(folder: Path, world_size: int, bad: int) -> list[Told]:
    """Loads what cannot be put back on rank ``bad``."""

    def work(tell: Callable[[str], None]) -> None:
        run = Run(str(folder / "run"), extra=Counter())
        run.save(1)
        run.loads_into = {"extra": Counter(fails="load" if dist.get_rank() == bad else "")}
        told = told_of(run.load)
        run.loads_into = {}
        told["then"] = run.load()
        tell(json.dumps(told))

    return results(folder, work, world_size)


def results(folder: Path, work: Callable[..., None], world_size: int, **options: Any) -> list[Told]:
    """What each rank told, or how it ended."""
    ranks = fork_ranks(work, world_size, folder, **options)
    try:
        codes, _ = ended(ranks, SETTLED)
    except TimeoutError as error:
        codes = [f"hangs: {error}"] * world_size  # type: ignore[list-item]
    lines = [rank.lines() for rank in ranks]
    return [
        json.loads(told[-1]) if told and told[-1].startswith("{") else {"code": code, "lines": told}
        for told, code in zip(lines, codes, strict=True)
    ]


# --- one rank dies, or hangs ---


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def at_a_shard(act: Callable[..., None]) -> None:
    shards.ShardFile.write = act  # type: ignore[method-assign,assignment]


def at_the_commit(act: Callable[..., None]) -> None:
    LocalCommit.publish = act  # type: ignore[method-assign,assignment]
    assert issubclass(LocalCommit, Commit)


def at_a_read(act: Callable[..., None]) -> None:
    items.ItemSource.read_into = act  # type: ignore[method-assign,assignment]


DEATHS: dict[str, tuple[Callable[[Callable[..., None]], None], Callable[[Run], Any]]] = {
    "in a shard": (at_a_shard, lambda run: run.save(2) and None),
    "in the commit": (at_the_commit, lambda run: run.save(2) and None),
    "in a load": (at_a_read, lambda run: run.load()),
}


def go_on_while_one_dies(folder: Path, death: str, world_size: int, victim: int, *, hangs: bool = False) -> list[Told]:
    """Saves 1; saves 2, or loads, while rank ``victim`` dies; then one process alone looks at what is left."""
    prepare, act = DEATHS[death]
    root = str(folder / "run")

    def work(tell: Callable[[str], None]) -> None:
        run = Run(root)
        run.save(1)
        if dist.get_rank() == victim:
            prepare(stop if hangs else die)
        told = told_of(lambda: act(run))
        tell(json.dumps(told))
        os._exit(0)  # the group is broken

    ranks = fork_ranks(work, world_size, folder, seconds=ANSWERED if hangs else SETTLED)
    survivors = [rank for index, rank in enumerate(ranks) if index != victim]
    ended(survivors, SETTLED)
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks[victim].pid, signal.SIGKILL)
    ended([ranks[victim]])
    told = [json.loads(rank.lines()[-1]) for rank in survivors]
    alone = Run(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after: Told = {"then": alone.load(), "left": [str(path) for path in leftovers(root)]}
        alone.save(3)
        after |= {"next": alone.load(), "left then": [str(path) for path in leftovers(root)]}
    return [*told, after]


# --- one rank alone sees damage ---


@contextlib.contextmanager
def damaged_eyes(path: Any, name: str) -> Iterator[None]:
    """In this process, one byte of the files called ``name`` in ``path`` is read wrongly."""
    read, read_fully = items.read_range, items._read_fully

    def is_damaged(file: str) -> bool:
        return file.startswith(str(path)) and file.endswith(name)

    def wrong(file: Any, offset: int, length: int) -> bytes:
        data = read(file, offset, length)
        return bytes([data[0] ^ 1]) + data[1:] if is_damaged(str(file)) else data

    def wrong_in_place(file: int, into: memoryview, offset: int) -> None:
        read_fully(file, into, offset)
        if is_damaged(os.readlink(f"/proc/self/fd/{file}")):
            into[0] ^= 1

    items.read_range, items._read_fully = wrong, wrong_in_place
    try:
        yield
    finally:
        items.read_range, items._read_fully = read, read_fully


@contextlib.contextmanager
def closed_eyes(path: Any) -> Iterator[None]:
    """In this process, the file ``path`` cannot be read."""
    read = loading.read_bytes

    def fail(file: Any) -> bytes:
        if str(file) == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return read(file)

    loading.read_bytes = fail
    try:
        yield
    finally:
        loading.read_bytes = read


def load_while_one_sees_damage(folder: Path, name: str, world_size: int, bad: int) -> list[Told]:
    """Saves 1 and 2; rank ``bad`` reads 2 wrongly; the run is loaded, and 2 by name."""
    root = str(folder / "run")

    def work(tell: Callable[[str], None]) -> None:
        run = Run(root)
        run.save(1)
        run.save(2)
        path = newest(as_path(root))
        with damaged_eyes(path, name) if dist.get_rank() == bad else contextlib.nullcontext():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                told = told_of(run.load)
            named = told_of(lambda: run.load(path=path))
        told |= {"named": named.get("error"), "warnings": [warning.category.__name__ for warning in caught]}
        CheckpointReader(path).verify()
        tell(json.dumps(told))

    return results(folder, work, world_size)


# --- training goes on ---


def save_with_warnings(folder: Path, world_size: int, bad: int) -> list[Told]:
    """Trains and saves each of five steps, of which rank ``bad`` cannot write the second and third."""
    root = str(folder / "run")

    def work(tell: Callable[[str], None]) -> None:
        run = Run(root)
        saved, caught_of = [], []
        for step in range(1, 6):
            is_full = step in (2, 3) and dist.get_rank() == bad
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with small_files(run) if is_full else contextlib.nullcontext():
                    saved.append(run.save(step, on_save_error="warn", keep=None) is not None)
            caught_of.append([warning.category.__name__ for warning in caught])
        names = sorted(path.name for path in (folder / "run").iterdir())
        tell(json.dumps({"saved": saved, "warnings": caught_of, "names": names, "then": run.load()}))

    return results(folder, work, world_size)
