"""What hashing and the check for finite weights cost a save, beside stock DCP; all in one run, in turns.

    python benchmarks/save.py --mib 1024 --rounds 7

Prints medians in seconds, and each as a ratio to our save without hashing. Report ratios, not seconds: machines differ.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp

from lightning_resume.checkpoint import filesystem
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.writer import write_checkpoint


class NoHash:
    """Stands for a hasher that costs nothing."""

    def update(self, data: object) -> None: ...

    def reset(self) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 32


@contextlib.contextmanager
def without_hashing() -> Iterator[None]:
    with mock.patch.object(filesystem.xxhash, "xxh3_128", NoHash):
        yield


def state_of(mib: int, tensors: int = 16) -> dict[str, Any]:
    count = mib * 2**20 // 4 // tensors
    return {"model": {f"w{i}": torch.randn(count) for i in range(tensors)}}


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    state = state_of(options.mib)
    names = [f"model.{name}" for name in state["model"]]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        target = Path(folder) / "checkpoint"

        def ours(**kwargs: Any) -> None:
            write_checkpoint(target, state=state, leaves={}, meta=None, **kwargs)

        def unhashed() -> None:
            with without_hashing():
                ours()

        ways: dict[str, Callable[[], None]] = {
            "ours, without hashing": unhashed,
            "ours": ours,
            "ours, weights checked": lambda: ours(weights=names),
            "stock dcp.save": lambda: dcp.save(state, checkpoint_id=target),
        }
        seconds = measure(ways, target, options.rounds)
        report(f"save of {options.mib} MiB, median of {options.rounds}", seconds)
        ours()
        into = state_of(options.mib)
        reads: dict[str, Callable[[], None]] = {
            "read, verified": lambda: CheckpointReader(target).load_into(into),
            "verify()": lambda: CheckpointReader(target).verify(),
            "stock dcp.load": lambda: dcp.load(into, checkpoint_id=target),
        }
        report("load", measure(reads, None, options.rounds))


def measure(ways: dict[str, Callable[[], None]], target: Path | None, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first warms up
        for name, act in ways.items():
            if target is not None:
                shutil.rmtree(target, ignore_errors=True)
            started = time.perf_counter()
            act()
            seconds[name].append(time.perf_counter() - started)
    return {name: taken[1:] for name, taken in seconds.items()}


def report(title: str, seconds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    base = next(iter(medians.values()))
    print(title)
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        print(f"  {name:24} {median:7.3f} s   {median / base:5.2f}   ({spread})")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where to save (default: the folder for temporary files)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
