"""Kills a run at every step, in both stacks, under every strategy, and compares it with a run that was not killed.

``python -m tests.kill_matrix --all`` runs every cell with every kill, each followed by a run to the very end, and
prints a table of kills exact of kills tried. The tests of ``test_kill_matrix.py`` run chains of kills with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.harness import Launch, LaunchError, Zygote, zygote
from tests.runs import STACKS, STRATEGIES, Kill, Settings

STEPS = 8  # two epochs of 29 samples in steps of 8, 8, 8 and 5
MOMENTS = {
    "fabric": ("saved", "stepped", "backward", "saving"),
    "trainer": ("saved", "stepped", "backward", "saving", "validating"),
}
VALIDATED = (2, 4, 6, 8)  # the steps after which the Trainer validates
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What one kill is repeated over."""

    stack: str
    strategy: str
    workers: int
    async_save: str | bool = False

    def __str__(self) -> str:
        background = f"-{self.async_save}" if self.async_save else ""
        return f"{self.stack}-{self.strategy}-{self.workers}workers{background}"

    @property
    def world_size(self) -> int:
        return 1 if self.strategy == "single" else 2

    def launch(self, folder: Path, **changes: Any) -> Launch:
        settings = Settings(
            strategy=self.strategy,
            workers=self.workers,
            batch_size=8 // self.world_size,
            norm=True,
            async_save=self.async_save,
            **changes,
        )
        return launch_of(self.stack, settings, world_size=self.world_size, folder=folder)

    def moments(self, step: int) -> list[str]:
        """When a run may die around ``step``."""
        return [moment for moment in MOMENTS[self.stack] if moment != "validating" or step in VALIDATED]


def launch_of(stack: str, settings: Settings, *, world_size: int, folder: Path) -> Launch:
    function = STACKS[stack].__name__
    return Launch(function=function, arguments={"settings": settings}, world_size=world_size, folder=folder)


CELLS = [
    Cell(stack=stack, strategy=strategy, workers=workers)
    for stack, strategy, workers in itertools.product(STACKS, STRATEGIES, (0, 2))
]
ASYNC_CELLS = [
    Cell(stack=stack, strategy=strategy, workers=2 if strategy in ("single", "mp") else 0, async_save="thread")
    for stack, strategy in itertools.product(STACKS, STRATEGIES)
]


def chain_of(cell: Cell, *, first: int = 0) -> list[Kill]:
    """A kill at every step, at ever other moments of the step."""
    every = [cell.moments(step) for step in range(1, STEPS + 1)]
    return [Kill(step=step, moment=of[(first + step) % len(of)]) for step, of in enumerate(every, 1)]


def run_whole(cell: Cell, folder: Path, ranks: Zygote) -> None:
    """The run that nothing interrupts."""
    assert not ranks.run(cell.launch(folder))


def run_killed(cell: Cell, folder: Path, kills: Sequence[Kill], ranks: Zygote, *, sabotage: str | None = None) -> None:
    """Starts the run again after each of ``kills``, the last time to its end."""
    for number, kill in enumerate([*kills, None]):
        # before the first checkpoint the run starts fresh, and must start in the same way
        scramble = number if has_saved(folder) else 0
        launch = cell.launch(folder, launch=number, kill=kill, scramble=scramble, sabotage=sabotage)
        killed = ranks.run(launch)
        if killed != (kill is not None):
            raise LaunchError(f"{cell}: {kill} did {'' if killed else 'not '}kill the run")


def has_saved(folder: Path) -> bool:
    names = {path.parent.name for path in folder.rglob("manifest.json")}
    return any(name == "checkpoint" or name.startswith("step-") for name in names)


def goes_on_at(kill: Kill) -> int:
    """The step that the run after ``kill`` does first."""
    return kill.step + 1 if kill.moment == "saved" else kill.step


def differences(cell: Cell, whole: Path, killed: Path, kills: Sequence[Kill]) -> list[str]:
    """What tells the run that was killed from the whole one: nothing, when it is exact."""
    found = []
    for rank in range(cell.world_size):
        expected = read_launches(whole / f"rank{rank}.jsonl")[0]
        launches = read_launches(killed / f"rank{rank}.jsonl")
        starts = [1, *(goes_on_at(kill) for kill in kills)]
        # in the background, what was being saved when the run died may be lost
        found += [f"rank {rank}, {text}" for text in compare(expected, launches, starts, lost=bool(cell.async_save))]
    return found


def read_launches(log: Path) -> dict[int, list[Record]]:
    """The records of each launch that wrote to ``log``."""
    launches: dict[int, list[Record]] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "launch":
            current = launches[record["number"]] = []
        else:
            current.append(record)
    return launches


def compare(
    expected: list[Record], launches: dict[int, list[Record]], starts: Sequence[int], *, lost: int = 0
) -> Iterator[str]:
    """Each launch must write a part of ``expected`` without a gap, from the step in ``starts``; together all of it.

    It may begin so many steps earlier as may be ``lost``.
    """
    where = {(record["kind"], record["step"]): index for index, record in enumerate(expected)}
    done = 0
    for number, start in enumerate(starts):
        records = launches.get(number, [])
        if not records:
            continue
        first = (records[0]["kind"], records[0]["step"])
        begin = where.get(first, done)
        if first[0] == "step" and not start - lost <= first[1] <= start:
            yield f"launch {number} goes on at step {first[1]}, not {start}"
        if begin > done:
            yield f"launch {number} leaves out records {done} to {begin}"
        yield from compare_records(f"launch {number}", expected[begin : begin + len(records)], records)
        done = max(done, begin + len(records))
    if done != len(expected):
        yield f"{done} records instead of {len(expected)}"


def compare_records(name: str, expected: Sequence[Record], records: Sequence[Record]) -> Iterator[str]:
    for one, other in zip(expected, records, strict=False):
        fields = [field for field in one.keys() | other.keys() if one.get(field) != other.get(field)]
        for field in sorted(fields):
            yield (
                f"{name}, {other['kind']} at step {other['step']}: {field} is {other.get(field)},"
                f" but {one.get(field)} in the whole run"
            )


# -- the long variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    cell: Cell
    kill: Kill
    differences: list[str]


def run_cell(cell: Cell, folder: Path, ranks: Zygote) -> Iterator[Result]:
    run_whole(cell, folder / "whole", ranks)
    for step in range(1, STEPS + 1):
        for moment in cell.moments(step):
            kill = Kill(step=step, moment=moment)
            yield Result(cell=cell, kill=kill, differences=try_kill(cell, folder, kill, ranks))


def try_kill(cell: Cell, folder: Path, kill: Kill, ranks: Zygote) -> list[str]:
    killed = folder / f"{kill.step}-{kill.moment}"
    try:
        run_killed(cell, killed, [kill], ranks)
    except LaunchError as error:
        return [str(error)]
    return differences(cell, folder / "whole", killed, [kill])


def run_matrix(cells: Iterable[Cell], *, parallel: int) -> list[Result]:
    """All results of ``cells``, some cells at the same time, each told as it is done."""
    results: list[Result] = []
    zygotes = [zygote(index) for index in range(parallel)]

    def run(cell: Cell) -> list[Result]:
        ranks = zygotes.pop()
        with tempfile.TemporaryDirectory(prefix="kill-matrix-") as folder:
            done = list(run_cell(cell, Path(folder), ranks))
        zygotes.append(ranks)
        return done

    with ThreadPoolExecutor(parallel) as pool:
        for done in pool.map(run, cells):
            exact = sum(not result.differences for result in done)
            print(f"{done[0].cell!s:<28}{exact:>4} of {len(done)}", flush=True)
            for text in problems(done):
                print(f"    {text}", flush=True)
            results += done
    return results


def problems(results: Sequence[Result]) -> Iterator[str]:
    """The first difference of every kill that was not exact; of a run that failed, its last line, each told once."""
    told = set()
    for result in results:
        for text in result.differences[:1]:
            last = text.splitlines()[-1]
            if last not in told:
                told.add(last)
                yield f"{result.kill.moment} at step {result.kill.step}: {last}"


def table(results: Sequence[Result]) -> str:
    """Kills exact of kills tried, by cell and step."""
    lines = ["cell".ljust(28) + "".join(f"step {step}".rjust(8) for step in range(1, STEPS + 1)) + "   total"]
    for cell in dict.fromkeys(result.cell for result in results):
        of_cell = [result for result in results if result.cell == cell]
        counts = [_count([r for r in of_cell if r.kill.step == step]) for step in range(1, STEPS + 1)]
        lines.append(f"{cell!s:<28}" + "".join(count.rjust(8) for count in counts) + _count(of_cell).rjust(8))
    return "\n".join(lines)


def _count(results: Sequence[Result]) -> str:
    return f"{sum(not result.differences for result in results)}/{len(results)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill_matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every cell; without it, those without workers")
    parser.add_argument("--parallel", type=int, default=1, help="cells to run at the same time (default: 1)")
    parser.add_argument("--async-save", choices=["thread", "process"], help="save like this in every cell")
    chosen = parser.parse_args(arguments)
    begun = time.monotonic()
    cells = [cell for cell in CELLS if chosen.all or cell.workers == 0]
    if chosen.async_save:
        cells = [dataclasses.replace(cell, async_save=chosen.async_save) for cell in cells]
    else:
        cells += ASYNC_CELLS
    results = run_matrix(cells, parallel=chosen.parallel)
    exact = sum(not result.differences for result in results)
    print(f"\n{table(results)}\n\n{exact} of {len(results)} exact, {time.monotonic() - begun:.0f} s")
    return 0 if exact == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
