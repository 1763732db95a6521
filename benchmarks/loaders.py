"""Seconds to the first batch after a resume, and rows per second, beside what others offer; all in one run, in turns.

    python benchmarks/loaders.py --rows 1000000 --rounds 3 --output loaders.json

Each measurement has a process of its own, forked from one that has imported everything: no caches but the system's,
and no imports, are in it. From making the loader to its first batch, resumed after 10, 50 and 90 % of an epoch. Each
first batch is compared with the one that came there without a stop, and after a resume in the middle the rest of the
epoch is counted: a row that never comes is lost, one that comes again is repeated. Medians; report ratios, not
seconds: machines differ.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import platform
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from anchors import Way, ways
from rows import Data, write_data

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.loader_packages import imported

POINTS = (10, 50, 90)
"""Where an epoch is stopped, in percent."""
COUNTED = 50
"""The point after which the rest is counted."""
PRELOADED = ("pandas", "pyarrow.parquet", "fsspec.implementations.local", "torchdata.stateful_dataloader", "datasets")
SECONDS = 1800


@dataclass(kw_only=True)
class Seen:
    """What was measured of one way."""

    name: str
    remark: str
    first_batch: dict[int, list[float]] = field(default_factory=dict)
    """Seconds, by the percentage of the epoch that was done."""
    first_batch_is_right: dict[int, bool] = field(default_factory=dict)
    rows_per_second: list[float] = field(default_factory=list)
    state_seconds: float = 0.0
    state_bytes: int = 0
    epoch_is_whole: bool = False
    lost: int | None = None
    repeated: int | None = None


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch without a stop."""

    ids: list[int]
    states: dict[int, Any]
    """By percentage."""
    taken: dict[int, int]
    """Rows before each of these."""
    state_seconds: float
    seconds: float


# -- measured in a process of its own


def run_epoch(way: Way, data: Data) -> Epoch:
    stops = {max(1, data.rows * point // 100 // data.batch_size): point for point in POINTS}
    ids: list[int] = []
    states, taken, state_seconds = {}, {}, []
    started = time.perf_counter()
    loader = way.open(data)
    for number, batch in enumerate(loader, 1):
        ids += way.ids(batch)
        if number in stops:
            before = time.perf_counter()
            states[stops[number]] = pickle.dumps(way.state(loader, number))
            state_seconds.append(time.perf_counter() - before)
            taken[stops[number]] = len(ids)
    seconds = time.perf_counter() - started - sum(state_seconds)
    return Epoch(ids=ids, states=states, taken=taken, state_seconds=statistics.median(state_seconds), seconds=seconds)


def resume(way: Way, data: Data, state: bytes, *, to_the_end: bool) -> tuple[float, list[list[int]]]:
    """Seconds to the first batch, and the rows of that batch or of all that are left."""
    started = time.perf_counter()
    batches = iter(way.open(data, pickle.loads(state)))
    first = next(batches)
    seconds = time.perf_counter() - started
    return seconds, [way.ids(batch) for batch in itertools.chain([first], batches if to_the_end else ())]


def in_a_process(act: Callable[[], Any]) -> Any:
    """Returns what ``act`` returns in a forked process.

    Raises:
        RuntimeError: It failed; with its traceback.
    """
    context: Any = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def work() -> None:
        try:
            result = act(), ""
        except BaseException:
            result = None, traceback.format_exc()
        gc.collect()  # ends the workers of a loader that was dropped in its middle
        sending.send(result)

    process = context.Process(target=work)
    process.start()
    sending.close()
    try:
        if not receiving.poll(SECONDS):
            raise RuntimeError(f"took more than {SECONDS} s")
        result, error = receiving.recv()
    finally:
        process.join(10)
        process.kill()
        process.join()
    if error:
        raise RuntimeError(error)
    return result


# -- the rounds


def measure(data: Data, chosen: Sequence[Way], *, rounds: int, epochs: int) -> list[Seen]:
    seen = {way.name: Seen(name=way.name, remark=way.remark) for way in chosen}
    whole: dict[str, Epoch] = {}
    for way in chosen:
        in_a_process(lambda way=way: way.prepare(data))
    for _ in range(epochs):
        for way in chosen:
            print(f"  an epoch of {way.name}", file=sys.stderr, flush=True)
            whole[way.name] = epoch = in_a_process(lambda way=way: run_epoch(way, data))
            seen[way.name].rows_per_second.append(len(epoch.ids) / epoch.seconds)
    for name, epoch in whole.items():
        seen[name].state_seconds, seen[name].state_bytes = epoch.state_seconds, len(epoch.states[COUNTED])
        seen[name].epoch_is_whole = sorted(epoch.ids) == list(range(data.rows))
    resumable = [way for way in chosen if pickle.loads(whole[way.name].states[COUNTED]) is not None]
    for way in resumable:
        count_the_rest(way, data, whole[way.name], seen[way.name])
    for _, point, way in itertools.product(range(rounds), POINTS, resumable):
        epoch, line = whole[way.name], seen[way.name]
        print(f"  {way.name} after {point} %", file=sys.stderr, flush=True)
        state = epoch.states[point]
        seconds, [ids] = in_a_process(lambda way=way, state=state: resume(way, data, state, to_the_end=False))
        line.first_batch.setdefault(point, []).append(seconds)
        line.first_batch_is_right[point] = ids == epoch.ids[epoch.taken[point] :][: len(ids)]
    return list(seen.values())


def count_the_rest(way: Way, data: Data, epoch: Epoch, line: Seen) -> None:
    state, taken = epoch.states[COUNTED], epoch.taken[COUNTED]
    _, batches = in_a_process(lambda: resume(way, data, state, to_the_end=True))
    times = Counter(itertools.chain(epoch.ids[:taken], *batches))
    line.lost = sum(times[row] == 0 for row in range(data.rows))
    line.repeated = sum(times.values()) - len(times)


# -- the table


def table(seen: Sequence[Seen]) -> str:
    points = [f"{point} %" for point in POINTS]
    rows = [["seconds to the first batch after", *points, "rows/s", "state ms", "bytes", "lost", "repeated", ""]]
    for line in seen:
        times = [_seconds(line, seen[0], point) for point in POINTS]
        counts = [" " if count is None else f"{count:,}" for count in (line.lost, line.repeated)]
        rate = f"{statistics.median(line.rows_per_second):,.0f}"
        state = [f"{1e3 * line.state_seconds:.2f}", f"{line.state_bytes:,}"] if line.first_batch else [" ", " "]
        rows.append([line.name, *times, rate, *state, *counts, _remark(line)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))]
        )
        + f"  {row[-1]}"
        for row in rows
    )


def _seconds(line: Seen, first: Seen, point: int) -> str:
    """The median, as a ratio to that of the first line, and the range."""
    taken = line.first_batch.get(point)
    if not taken:
        return "-"
    ratio = statistics.median(taken) / statistics.median(first.first_batch[point])
    return f"{statistics.median(taken):.3f}  {ratio:.1f}x ({min(taken):.3f} to {max(taken):.3f})"


def _remark(line: Seen) -> str:
    wrong = [f"{point} %" for point, right in line.first_batch_is_right.items() if not right]
    remarks = [line.remark, f"ANOTHER BATCH after {', '.join(wrong)}" if wrong else ""]
    return "; ".join(filter(None, [*remarks, "" if line.epoch_is_whole else "AN EPOCH WITHOUT A STOP IS NOT WHOLE"]))


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    chosen = [way for way in ways() if any(part in way.name for part in options.only)]
    for way in chosen:
        if not way.is_installed:
            print(f"{way.name}: left out, for {way.package} is not installed.")
    chosen = [way for way in chosen if way.is_installed]
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for way in [way for way in chosen if way.package]:
        try:
            imported(way.package)
        except ImportError as error:
            print(f"{way.name}: left out, for {way.package} cannot be imported: {error}.")
            chosen.remove(way)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data = Data(folder=Path(folder), rows=options.rows, batch_size=options.batch_size)
        in_a_process(lambda: write_data(data, files=options.files, row_group=options.row_group))
        seen = measure(data, chosen, rounds=options.rounds, epochs=options.epochs)
    print(
        f"{options.rows:,} rows in {options.files} files, batches of {options.batch_size}; medians of {options.rounds}"
    )
    print(table(seen))
    if options.output:
        machine = {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        content = {"settings": {**vars(options)}, "machine": machine, "ways": [vars(line) for line in seen]}
        Path(options.output).write_text(json.dumps(content, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--row-group", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="resumes at each point")
    parser.add_argument("--epochs", type=int, default=1, help="epochs read for the rows per second")
    parser.add_argument("--only", action="append", help="only ways whose name has this in it; may be given again")
    parser.add_argument("--output", help="a JSON file for all figures")
    parser.add_argument("--folder", help="where to write the data (default: the folder for temporary files)")
    options = parser.parse_args()
    options.only = options.only or [""]
    return options


if __name__ == "__main__":
    main()
