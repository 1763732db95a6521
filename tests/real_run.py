"""A real run on real text: killed, resumed at other topologies, and counted: every row of every epoch exactly once.

``python -m tests.real_run --megabytes 400`` writes the sources of this machine into parquet files (examples/corpus.py)
and trains on them for two epochs through both stacks (examples/parquet_lm.py), as a user does: 2 ranks with 2 workers
each, killed by SIGKILL at a random moment; 1 with 3, killed while a save is on its way; 3 with none, killed in the
second epoch; and 2 with 1 to the end. An uninterrupted run shows the order that the rows should have come in.

A rank writes down each step. Of a killed run only the steps count that the next one went on after; so what is counted
is what the model in the last checkpoint has been trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_resume.checkpoint.layout import newest
from lightning_resume.checkpoint.names import find_leftovers
from tests.real_legs import EPOCHS, EXAMPLES, LARGE, TINY, Data, Kill, Leg, Setting, make_data

ROOT = Path(__file__).resolve().parent.parent
STACKS = ("trainer", "fabric")
Record = dict[str, Any]

# Read by every Python process that is started with it on its path: writes down who opens which data file, and when.
WATCH = """
import os, sys, time
_log = os.open(os.environ["OPENS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def _hook(event, args):
    if event == "open" and str(args[0]).endswith(".parquet"):
        os.write(_log, f"{time.time()} {args[0]}\\n".encode())
sys.addaudithook(_hook)
"""


# -- the run


@dataclasses.dataclass(kw_only=True)
class Run:
    """A run of several legs, and what has been seen of it."""

    data: Data
    stack: str
    folder: Path
    save_every: int
    seconds: float
    """What a leg may take."""
    steps: dict[int, list[Record]] = dataclasses.field(default_factory=dict)
    """What each rank did in each step that counts."""
    table: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """A row for each leg."""
    wrong: list[str] = dataclasses.field(default_factory=list)

    def seen(self, name: str) -> list[int]:
        """The ``ids`` or ``crops`` of all steps that count, in the order of the data."""
        return [one for step in sorted(self.steps) for record in self.steps[step] for one in record[name]]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """What a leg writes."""

    name: Path

    @property
    def log(self) -> str:
        return Path(f"{self.name}.log").read_text(errors="replace")

    @property
    def resumed_from(self) -> int | None:
        match = re.search(r"^Going on after step (\d+)\.$", self.log, re.MULTILINE)
        return None if match is None else int(match[1])

    @property
    def last_step(self) -> int:
        return max(map(int, re.findall(r"^step (\d+) loss", self.log, re.MULTILINE)), default=0)

    def journal(self, rank: int) -> list[Record]:
        """What a rank wrote down; a line that a kill cut short does not count."""
        path = Path(f"{self.name}.rank{rank}.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def opens(self, until: float) -> Counter[str]:
        """How often each data file was opened, by any process."""
        lines = Path(f"{self.name}.opens").read_text().splitlines()
        found = (line.split(" ", 1) for line in lines)
        return Counter(Path(path).name for when, path in found if float(when) < until)


def run_leg(run: Run, number: int, leg: Leg, rng: random.Random) -> None:
    """Starts the run again, and kills it where the leg says or waits for its end."""
    files = Files(name=run.folder / f"leg{number}")
    point = rng.uniform(*leg.between) * run.data.rows
    launched = time.time()
    with training(run, leg, files) as process:
        wait(process, lambda: files.resumed_from is not None, run.seconds)
        assert files.resumed_from is not None, files.log
        forget_steps_after(run, files.resumed_from)
        base = len(run.seen("ids")) - files.resumed_from * leg.ranks * leg.batch_size
        if leg.kill is not Kill.NEVER:
            wait(process, lambda: base + files.last_step * leg.ranks * leg.batch_size >= point, run.seconds)
        if leg.kill is Kill.IN_A_SAVE:
            wait(process, lambda: is_saving(run.checkpoints), run.seconds)
        elif leg.kill is Kill.ANY_MOMENT:
            time.sleep(rng.uniform(0.0, 0.1))  # anywhere in a step, or between two
        else:
            wait(process, lambda: False, run.seconds)
        code = process.poll()
    # a gloo process may abort while its interpreter exits, its work done; that it is done is seen in what it did
    if code not in ((None,) if leg.kill is not Kill.NEVER else (0, -signal.SIGABRT)):
        raise AssertionError(f"leg {number} of {run.stack} ended with {code}:\n{files.log}")
    run.table.append(line_of(run, leg, files, launched))
    take_steps(run, leg, files)
    print(f"  {format_line(run.table[-1])}", flush=True)


@contextlib.contextmanager
def training(run: Run, leg: Leg, files: Files) -> Iterator[subprocess.Popen[bytes]]:
    """Starts the example in a session of its own, with its ranks and workers, and kills what is left of it."""
    watch = run.folder / "watch"
    watch.mkdir(exist_ok=True)
    (watch / "sitecustomize.py").write_text(WATCH)
    options = {
        "stack": run.stack,
        "devices": leg.ranks,
        "workers": leg.workers,
        "batch-size": leg.batch_size,
        "epochs": EPOCHS,
        "save-every": run.save_every,
        "run": run.checkpoints,
        "journal": files.name,
        "width": 16,  # a tiny model: it is the data that counts here
        "layers": 1,
        "context": 32,
    }
    command = [sys.executable, EXAMPLES / "parquet_lm.py", run.data.folder, *(f"--{k}={v}" for k, v in options.items())]
    environment = {"PYTHONPATH": f"{watch}{os.pathsep}{ROOT}", "OPENS": f"{files.name}.opens", "OMP_NUM_THREADS": "1"}
    with open(f"{files.name}.log", "wb") as log:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=run.folder,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(process: subprocess.Popen[bytes], condition: Callable[[], bool], seconds: float) -> None:
    """Waits until the condition holds, or the process has ended."""
    until = time.monotonic() + seconds
    while process.poll() is None and not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"{process.args!r} did not come so far in {seconds} s")
        time.sleep(0.002)


def is_saving(checkpoints: Path) -> bool:
    """Whether there lies a part of a checkpoint that is newer than the newest."""
    done = newest(checkpoints)
    parts = [left.of.name for left in find_leftovers(checkpoints) if not left.retired]
    return any(done is None or part > done.name for part in parts)


# -- what is counted


def forget_steps_after(run: Run, step: int) -> None:
    """Leaves the steps that the checkpoint has counted, all of which every rank must have done."""
    run.steps = {one: records for one, records in run.steps.items() if one <= step}
    if sorted(run.steps) != list(range(1, step + 1)):
        run.wrong.append(f"a leg went on after step {step}, but only {len(run.steps)} of these steps were done")


def take_steps(run: Run, leg: Leg, files: Files) -> None:
    for rank in range(leg.ranks):
        for record in files.journal(rank):
            if "step" in record:
                run.steps.setdefault(record["step"], []).append(record)


def line_of(run: Run, leg: Leg, files: Files, launched: float) -> dict[str, Any]:
    """What there is to say of a leg; asked for before its steps are taken."""
    journals = [files.journal(rank) for rank in range(leg.ranks)]
    epoch_ends = [_end_of_first_epoch(journal[1:]) for journal in journals]
    opens, all_opens = files.opens(min(epoch_ends)), files.opens(float("inf"))
    in_epoch = run.seen("ids")[len(run.seen("ids")) // run.data.rows * run.data.rows :]
    left = run.data.names_of(set(range(run.data.rows)) - set(in_epoch))
    return {
        "stack": run.stack,
        "ranks x workers": f"{leg.ranks} x {leg.workers}",
        "batch": leg.batch_size,
        "after": files.resumed_from,
        "until": files.last_step,
        "killed": leg.kill.value,
        "a save was cut off": is_saving(run.checkpoints),
        "s to batch 1": max(journal[1]["time"] - journal[0]["time"] for journal in journals),
        "of launch": max(journal[1]["time"] for journal in journals) - launched,
        "files left": f"{len(left)} of {len(run.data.first_row)}",
        "opens": f"{sum(all_opens.values())}, most {max(all_opens.values())}",
        "of finished": sum(times for name, times in opens.items() if name not in left),
    }


def _end_of_first_epoch(steps: Sequence[Record]) -> float:
    """When the rank had the last batch of the epoch that it began in: later it may open any file."""
    here = [step["time"] for step in steps if step["epoch"] == steps[0]["epoch"]]
    return float("inf") if len(here) == len(steps) else float(here[-1])


def format_line(line: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items()
    )


def check(run: Run) -> None:
    """Counts the rows of each epoch."""
    rows, ids = run.data.rows, run.seen("ids")
    forget_steps_after(run, max(run.steps))
    for epoch in range(EPOCHS):
        times = Counter(ids[epoch * rows : (epoch + 1) * rows])
        once, never = (sum(times[row] == n for row in range(rows)) for n in (1, 0))
        print(f"  epoch {epoch}: {once:,} of {rows:,} rows once, {never:,} never, {rows - once - never:,} again")
        if once != rows:
            run.wrong.append(f"epoch {epoch}: {once} of {rows} rows were trained on once")
    if len(ids) != EPOCHS * rows:
        run.wrong.append(f"{len(ids)} rows were trained on in {EPOCHS} epochs of {rows}")
    opened = sum(line["of finished"] for line in run.table)
    if opened:
        run.wrong.append(f"finished files were opened {opened} times")


def compare(run: Run, reference: Run) -> None:
    """Compares the rows, and the pieces cut out of them, with those of an uninterrupted run, in their order."""
    for name in ("ids", "crops"):
        pairs = itertools.zip_longest(run.seen(name), reference.seen(name))
        differ = sum(one != other for one, other in pairs)
        print(f"  {differ:,} of {len(run.seen(name)):,} {name} differ from the uninterrupted run's, in their order")
        if differ:
            run.wrong.append(f"{differ} {name} differ from the uninterrupted run's")


# -- all of it


def run_legs(
    data: Data, folder: Path, *, stack: str, legs: Sequence[Leg], save_every: int, seed: int, seconds: float
) -> Run:
    """Runs all legs, and counts; what is not as it should be is in ``wrong`` of the run."""
    begun, rng = time.monotonic(), random.Random(f"{seed} {stack}")
    run = Run(data=data, stack=stack, folder=folder, save_every=save_every, seconds=seconds)
    folder.mkdir()
    print(f"{stack}, {len(legs)} legs:", flush=True)
    for number, leg in enumerate(legs):
        run_leg(run, number, leg, rng)
    check(run)
    print(f"  {max(run.steps)} steps, {time.monotonic() - begun:.0f} s", flush=True)
    return run


def whole(setting: Setting) -> Sequence[Leg]:
    """The first leg, let run to the end."""
    return [dataclasses.replace(setting.legs[0], kill=Kill.NEVER, between=(EPOCHS, EPOCHS))]


def prove(setting: Setting, folder: Path, *, stacks: Sequence[str], seed: int, seconds: float) -> list[Run]:
    data = make_data(folder / "data", setting)
    print(data.summary)
    options: dict[str, Any] = {"save_every": setting.save_every, "seed": seed, "seconds": seconds}
    reference = run_legs(data, folder / "whole", stack=stacks[0], legs=whole(setting), **options)
    runs = [reference]
    for stack in stacks:
        runs.append(run_legs(data, folder / stack, stack=stack, legs=setting.legs, **options))
        compare(runs[-1], reference)
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=LARGE.megabytes, help="of text")
    parser.add_argument("--tiny", action="store_true", help="the setting of the tests")
    parser.add_argument("--stack", choices=STACKS, action="append", help="this one only")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which the run is killed")
    parser.add_argument("--folder", help="where to write (default: the folder for temporary files)")
    args = parser.parse_args()
    setting = TINY if args.tiny else dataclasses.replace(LARGE, megabytes=args.megabytes)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        runs = prove(setting, Path(folder), stacks=args.stack or STACKS, seed=args.seed, seconds=1800)
    wrong = [f"{run.stack}: {one}" for run in runs for one in run.wrong]
    print("\n".join(["WRONG:", *wrong]) if wrong else "Every row of every epoch exactly once, in the same order.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
