"""Kills real processes at random moments of saves and deletes, and looks at what is left with fresh eyes.

A *run* is one or two ranks that load what there is and then save one number after another, into a run folder or over
one path, on disk or in an object store. Its ranks are killed, one or all of them; then a fresh process looks: every
checkpoint must verify and hold one number everywhere, the newest must not be older than the last that was reported as
saved, and what else lies there must be known as a leftover. Then the same run is started again. At the end of a chain
of kills one run is let live, and must leave nothing but its checkpoints.

``python -m tests.sigkill --kills 200 --seed 0`` prints a table. Every process is forked from this one, which has
imported torch and never starts a thread.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_resume import CheckpointManager, KeepLast
from lightning_resume.checkpoint import commit
from lightning_resume.checkpoint.commit import clean_leftovers
from lightning_resume.checkpoint.layout import Kind, classify, leftovers, list_checkpoints, newest
from lightning_resume.checkpoint.paths import as_path
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.writer import write_checkpoint
from lightning_resume.errors import CheckpointIncompleteError, CheckpointSaveError, RankLostError
from tests.faulty import HIDDEN, register

SECONDS = 60.0  # no process here takes a tenth of it
LOST = 3  # the exit code of a rank that was told that another one is lost
NUMBERS = 20_000  # in the largest tensor


# --- processes ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
    """A forked process, and the pipe that it tells lines to."""

    pid: int
    told: int

    def lines(self) -> list[str]:
        """What it has told and not yet been heard, once it has ended."""
        with os.fdopen(self.told, "r") as pipe:
            return pipe.read().splitlines()


def fork(work: Callable[[Callable[[str], None]], None]) -> Rank:
    """Runs ``work(tell)`` in a process of its own, which ends with 0, with LOST, or with 1 and a traceback."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _run_and_exit(work, lambda line: os.write(writing, f"{line}\n".encode()))
    os.close(writing)
    return Rank(pid=pid, told=reading)


def _run_and_exit(work: Callable[[Callable[[str], None]], None], tell: Callable[[str], Any]) -> NoReturn:
    code = 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            work(tell)
        code = 0
    except (CheckpointSaveError, RankLostError) as error:
        tell(f"error {type(error).__name__} {error}".replace("\n", " "))
        code = LOST
    except BaseException:
        tell("error " + traceback.format_exc().replace("\n", " | "))
    os._exit(code)  # what the parent has planned for its own end is not for this process


def fork_ranks(
    work: Callable[[Callable[[str], None]], None], world_size: int, folder: Path, *, seconds: float = SECONDS
) -> list[Rank]:
    """Runs ``work(tell)`` on every rank of a fresh gloo group; of one rank, without any group.

    A collective may take so many ``seconds``.
    """
    rendezvous = folder / f"rendezvous-{time.monotonic_ns()}"

    def of_rank(rank: int, tell: Callable[[str], None]) -> None:
        torch.set_num_threads(1)
        if world_size > 1:
            where = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": world_size}
            dist.init_process_group("gloo", timeout=timedelta(seconds=seconds), **where)
        work(tell)
        if world_size > 1:
            dist.barrier()
            dist.destroy_process_group()

    return [fork(lambda tell, rank=rank: of_rank(rank, tell)) for rank in range(world_size)]


def ended(ranks: Sequence[Rank], seconds: float = SECONDS) -> tuple[list[int], float]:
    """Waits for all ranks; returns their exit codes, and after how many seconds the last one ended.

    Raises:
        TimeoutError: One did not end; all are killed then.
    """
    begun, codes = time.monotonic(), dict.fromkeys(rank.pid for rank in ranks)
    while None in codes.values():
        for pid in [pid for pid, code in codes.items() if code is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - begun > seconds:
            for pid in [pid for pid, code in codes.items() if code is None]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"{codes} after {seconds} s")
        time.sleep(0.001)
    return [code for code in codes.values() if code is not None], time.monotonic() - begun


# --- the run ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is saved, where, by how many ranks, and who is killed."""

    form: str
    """``steps``: a checkpoint for each number, of which two are kept; ``one path``: always over the same one."""
    store: str
    """``disk``, ``two renames`` (a disk that cannot exchange names), ``objstore`` or ``fileserver``."""
    ranks: int
    victims: str
    """``all`` or ``one``."""
    sabotage: str | None = None
    """A save that is broken on purpose, by its name in ``SABOTAGES``."""
    async_save: str | bool = False

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{self.form}, {self.async_save or self.store}, {ranks}, kills {self.victims}"

    def url(self, folder: Path) -> str:
        root = folder / "run"
        return f"{self.store}://{root}" if self.store in ("objstore", "fileserver") else str(root)


CASES = [
    Case(form=form, store=store, ranks=ranks, victims=victims)
    for form, store, (ranks, victims) in itertools.product(
        ("steps", "one path"), ("disk", "two renames", "objstore", "fileserver"), ((1, "all"), (2, "one"), (2, "all"))
    )
    if (form, store) != ("steps", "two renames")
] + [
    Case(form="steps", store="disk", ranks=ranks, victims=victims, async_save=async_save)
    for async_save, ranks, victims in (
        ("thread", 1, "all"),
        ("thread", 2, "one"),
        ("thread", 2, "all"),
        ("process", 1, "all"),
        ("process", 2, "one"),
        ("process", 2, "all"),
    )
]


def run(case: Case, folder: Path, saves: int, tell: Callable[[str], None]) -> None:
    """Goes on from what there is, for so many saves; tells of each when it begins and when it is done."""
    if case.store == "two renames":
        commit.exchange = lambda *_: False  # type: ignore[assignment]
    if case.sabotage is not None:
        SABOTAGES[case.sabotage]()
    if case.form == "steps":
        run_steps(case.url(folder), saves, tell, async_save=case.async_save)
    else:
        run_one_path(case.url(folder), saves, tell)


def run_steps(root: str, saves: int, tell: Callable[[str], None], *, async_save: Any = False) -> None:
    net = nn.Linear(100, NUMBERS // 100)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    state: dict[str, Any] = {"net": net, "optimizer": optimizer, "number": 0, "own": 0}
    with CheckpointManager(
        root, keep=KeepLast(2), max_attempts=None, async_save=async_save, staging="deferred"
    ) as manager:
        first = manager.load(state) or 0
        values = {int(value) for value in net.weight.unique()} if first else {0}
        assert {state["number"], state["own"], *values} == {first}, "what was loaded is a mix"
        for number in range(first + 1, first + 1 + saves):
            optimizer.step()  # without gradients it changes nothing, but waits until it may
            fill(net, optimizer, number)
            starts_process = async_save == "process" and number == first + 1
            if not starts_process:  # takes seconds, within which each kill would come
                tell(f"begin {number}")
            manager.save(state | {"number": number, "own": number}, step=number, user_content=number)
            if starts_process:
                manager.wait()
                tell(f"begin {number}")
            if not async_save or starts_process:
                tell(f"done {number}")
            elif number > first + 1:  # for which this save has waited
                tell(f"done {number - 1}")
        manager.wait()
        tell(f"done {first + saves}")


def fill(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(number)
            optimizer.state[parameter] = {"momentum_buffer": torch.full_like(parameter, number)}


def run_one_path(root: str, saves: int, tell: Callable[[str], None]) -> None:
    path = as_path(f"{root}/last")
    first = number_at(path) or 0
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for number in range(first + 1, first + 1 + saves):
        tell(f"begin {number}")
        tensors: dict[str, Any] = {f"copy{i}": torch.full((NUMBERS // 10,), number) for i in range(4)}
        tensors["shards"] = sharded(torch.full((NUMBERS,), number)) if world_size > 1 else torch.full((7,), number)
        leaves = {"resume.all": b"%d" % number, f"resume.own.rank_{rank:05d}": b"%d" % number}
        write_checkpoint(path, state={"w": tensors, "n": number}, leaves=leaves, meta={"n": number}, step=number)
        tell(f"done {number}")


def sharded(tensor: torch.Tensor) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


# --- saves that are broken on purpose ---


def remove_the_old_first() -> None:
    def put_in_place(staged: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        time.sleep(0.02)
        os.rename(staged, target)

    commit.put_in_place = put_in_place  # type: ignore[assignment]


def write_over_the_old() -> None:
    def put_in_place(staged: Path, target: Path) -> None:
        target.mkdir(exist_ok=True)
        for file in sorted(staged.iterdir(), reverse=True):
            os.replace(file, target / file.name)
            time.sleep(0.01)
        staged.rmdir()

    commit.put_in_place = put_in_place  # type: ignore[assignment]


SABOTAGES = {"removes the old first": remove_the_old_first, "writes over the old": write_over_the_old}


# --- looking at what is left ---


def number_at(path: Any) -> int | None:
    """The one number that is everywhere in the checkpoint at ``path``, every byte of which is verified.

    Raises:
        AssertionError: It holds several.
    """
    try:
        reader = CheckpointReader(path)
    except (FileNotFoundError, CheckpointIncompleteError):
        return None
    reader.verify()
    found = set(_numbers_in(reader.read())) | set(_numbers_in(reader.meta()))
    found |= {int(reader.leaf(name)) for name in reader.leaf_names() if name.startswith(("resume.all", "resume.own"))}
    assert reader.manifest is not None
    found |= {float(reader.manifest.step or 0)}
    assert len(found) == 1, f"a mix of {sorted(found)} at {path}"
    return int(found.pop())


def _numbers_in(value: Any) -> Iterator[float]:
    """Every number in a nested state but the settings of its optimizer."""
    if isinstance(value, torch.Tensor):
        yield from map(float, value.unique())
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "param_groups":
                yield from _numbers_in(inner)
    elif isinstance(value, int):
        yield float(value)


def look(case: Case, folder: Path, begun: int, done: int) -> list[str]:
    """What is wrong with what a run left that began number ``begun`` and reported ``done`` as saved."""
    root = as_path(case.url(folder))
    paths = list_checkpoints(root) if case.form == "steps" else [root / "last"]
    wrong, numbers = [], []
    for path in paths:
        try:
            numbers.append(number_at(path))
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
    best = max((number for number in numbers if number is not None), default=0)
    if not done <= best <= begun:
        wrong.append(f"lost: {best} is there, {done} was reported as saved, {begun} was begun")
    if case.form == "steps":
        wrong += [
            f"{path} holds {number}" for path, number in zip(paths, numbers, strict=False) if _differ(path, number)
        ]
        if paths and number_at(newest(root)) != best:
            wrong.append(f"the newest is {newest(root)}, not {best}")
    elif done and classify(root / "last") is not Kind.RESUMABLE:
        wrong.append(f"{root / 'last'} is {classify(root / 'last')}")
    return wrong + [f"unknown: {name}" for name in strangers(case, folder)]


def _differ(path: Any, number: int | None) -> bool:
    return int(path.name.removeprefix("step-")) != number


def strangers(case: Case, folder: Path, *, after_cleaning: bool = False) -> list[str]:
    """The files that belong neither to a checkpoint nor to what is known as a leftover."""
    root = as_path(case.url(folder))
    name = None if case.form == "steps" else "last"
    if after_cleaning:
        clean_leftovers(root, name=name)
    left = [str(path).partition("://")[2] or str(path) for path in leftovers(root, name=name)]
    known = [f"{path}/" for path in left]
    for path in list_checkpoints(root) if name is None else [root / name]:
        with contextlib.suppress(FileNotFoundError, CheckpointIncompleteError):
            reader = CheckpointReader(path)
            own = [reader.folder / file for file in reader.file_bytes] + [path / "manifest.json"]
            known += [str(file).partition("://")[2] or str(file) for file in own]
    files = [str(file) for file in (folder / "run").rglob("*") if file.is_file() and not file.name.startswith(HIDDEN)]
    return [file for file in files if file not in {*known, *left} and not file.startswith(tuple(known))]


# --- the kills ---


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What came of the kills of one case."""

    case: Case
    kills: int = 0
    in_a_save: int = 0
    saved: int = 0
    survivors: int = 0
    slowest_seconds: float = 0.0
    wrong: list[str] = dataclasses.field(default_factory=list)


def kill_case(case: Case, kills: int, folder: Path, rng: random.Random) -> Tally:
    """A chain of killed runs, and one that is let live."""
    tally = Tally(case=case)
    folder.mkdir(parents=True)
    done = 0
    for _ in range(kills):
        done = _kill_once(case, tally, folder, rng, done)
        if tally.wrong:
            return tally
    done = _let_live(case, tally, folder, done)
    names = sorted(os.listdir(folder / "run"))
    expected = ["last"] if case.form == "one path" else [f"step-{number:08d}" for number in (done - 1, done)]
    if case.store not in ("objstore", "fileserver") and names != expected:
        tally.wrong.append(f"left in the end: {names}")
    return tally


def _kill_once(case: Case, tally: Tally, folder: Path, rng: random.Random, done: int) -> int:
    ranks = fork_ranks(lambda tell: run(case, folder, 10_000, tell), case.ranks, folder)
    for rank in ranks:
        select.select([rank.told], [], [], SECONDS)  # all have begun to save
    time.sleep(rng.uniform(0.0, 0.2))
    victims = ranks if case.victims == "all" else [rng.choice(ranks)]
    for rank in victims:
        os.kill(rank.pid, signal.SIGKILL)
    try:
        codes, seconds = ended(ranks)
    except TimeoutError as error:
        codes, seconds = [], SECONDS
        tally.wrong.append(f"a survivor hangs: {error}")
    lines = [line for rank in ranks for line in rank.lines()]
    expected = sorted([-signal.SIGKILL] * len(victims) + [LOST] * (len(ranks) - len(victims)))
    if codes and sorted(codes) != expected:
        tally.wrong.append(f"exit codes {codes}: {[line for line in lines if line.startswith('error')]}")
    begun = max([_number(line) for line in lines if line.startswith("begin")], default=done)
    last = max([_number(line) for line in lines if line.startswith("done")], default=done)
    tally.kills += 1
    tally.in_a_save += begun > last
    tally.saved += last - done
    tally.survivors += len(ranks) - len(victims)
    tally.slowest_seconds = max(tally.slowest_seconds, seconds if case.victims == "one" else 0.0)
    tally.wrong += _look_afresh(case, folder, begun, last)
    return last if tally.wrong else max(last, _found(case, folder))


def _number(line: str) -> int:
    return int(line.split()[1])


def _found(case: Case, folder: Path) -> int:
    """What the next run goes on from: it may be one more than was reported as saved."""
    root = as_path(case.url(folder))
    path = newest(root) if case.form == "steps" else root / "last"
    return (number_at(path) if path is not None else None) or 0


def _look_afresh(case: Case, folder: Path, begun: int, done: int) -> list[str]:
    def report(tell: Callable[[str], None]) -> None:
        for text in look(case, folder, begun, done):
            tell(text.replace("\n", " "))

    observer = fork(report)
    codes, _ = ended([observer])
    return observer.lines() + ([f"the observer ended with {codes}"] if codes != [0] else [])


def _let_live(case: Case, tally: Tally, folder: Path, done: int) -> int:
    ranks = fork_ranks(lambda tell: run(case, folder, 2, tell), case.ranks, folder)
    codes, _ = ended(ranks)
    lines = [line for rank in ranks for line in rank.lines()]
    if any(codes):
        tally.wrong.append(f"the next run ended with {codes}: {lines}")
    tally.wrong += [f"after the next saves: {text}" for text in _look_afresh(case, folder, done + 2, done + 2)]
    tally.wrong += [f"not cleaned: {name}" for name in strangers(case, folder, after_cleaning=True)]
    if leftovers(as_path(case.url(folder)), name="last"):
        tally.wrong.append("leftovers remain")
    return done + 2


def kill_all(kills: int, seed: int, cases: Sequence[Case]) -> Iterator[Tally]:
    """Divides the kills among the cases."""
    register()
    rng = random.Random(seed)
    for index, case in enumerate(cases):
        share = kills // len(cases) + (index < kills % len(cases))
        folder = Path(tempfile.mkdtemp(prefix="sigkill-"))
        try:
            yield kill_case(case, share, folder / "case", rng)
        finally:
            shutil.rmtree(folder)


# --- the table ---


def table(tallies: Sequence[Tally]) -> str:
    header = f"{'case':<42}{'kills':>6}{'in a save':>11}{'saved':>7}{'told in':>9}{'wrong':>7}"
    rows = [
        f"{tally.case!s:<42}{tally.kills:>6}{tally.in_a_save:>11}{tally.saved:>7}"
        f"{f'{tally.slowest_seconds:.2f} s' if tally.survivors else '':>9}{len(tally.wrong):>7}"
        for tally in tallies
    ]
    sums = [sum(getattr(tally, name) for tally in tallies) for name in ("kills", "in_a_save", "saved")]
    slowest = f"{max(tally.slowest_seconds for tally in tallies):.2f} s"
    wrong = sum(len(tally.wrong) for tally in tallies)
    return "\n".join([header, *rows, f"{'all':<42}{sums[0]:>6}{sums[1]:>11}{sums[2]:>7}{slowest:>9}{wrong:>7}"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sigkill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many in all (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims (default: 0)")
    parser.add_argument(
        "--sabotage", choices=SABOTAGES, help="break the saves over one path on disk, and kill only those"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begun = time.monotonic()
    tallies = list(kill_all(chosen.kills, chosen.seed, CASES))
    print(table(tallies))
    for tally in tallies:
        for text in tally.wrong:
            print(f"{tally.case}: {text}")
    print(f"{time.monotonic() - begun:.0f} s, seed {chosen.seed}")
    return 1 if any(tally.wrong for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
