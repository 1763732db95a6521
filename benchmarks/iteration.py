"""What a loader that knows its position costs in every batch; all in one run, in turns.

    python benchmarks/iteration.py --rounds 5 --output iteration.json

Torch's ``DataLoader``, the same made resumable, and torchdata's ``StatefulDataLoader`` iterate over samples that cost
nothing and over samples that are unpacked as images are, without workers and with two. Then: how long ``state_dict()``
takes; the first batch after a resume at the start, at 10, 50 and 90 % of 10^6 and of 10^9 samples; and the steps of a
``Trainer`` with and without the callback. Medians; report ratios, not seconds: machines differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_resume import ResumeCallback, make_resumable

BATCH_SIZE = 32
PLAIN, OURS, TORCHDATA = "DataLoader", "ours", "StatefulDataLoader"
DONE = (0, 10, 50, 90)
"""Where an epoch is resumed, in percent."""

Seconds = dict[str, list[float]]


class Images(Dataset[Any]):
    """Unpacked, turned or not, and scaled, as images of 224 x 224 are: about a quarter of a millisecond each."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._packed = zlib.compress(os.urandom(3 * 224 * 28) * 8, 6)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        pixels = torch.frombuffer(bytearray(zlib.decompress(self._packed)), dtype=torch.uint8).view(3, 224, 224)
        image = pixels.flip(-1) if random.random() < 0.5 else pixels
        return image.float().div_(255).sub_(0.5)[:, ::4, ::4], index


class Computed(Dataset[Any]):
    """Of any length, and in no memory: a class of a user's, that costs next to nothing."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def in_turns(ways: dict[str, Callable[[], float]], rounds: int) -> Seconds:
    """What each way takes; the first round warms up. Every round begins with another way."""
    seconds: Seconds = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = ways[name]()
            if number:
                seconds[name].append(taken)
    return seconds


def compared(seconds: Seconds, *, scale: float = 1.0) -> dict[str, Any]:
    """Medians, and the ratio to the first way: the median of what it was in each round."""
    base = next(iter(seconds.values()))
    return {
        "median": {name: statistics.median(taken) * scale for name, taken in seconds.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(taken, base, strict=True)) for name, taken in seconds.items()
        },
        "seconds": seconds,
    }


def loaders_over(dataset: Dataset[Any], num_workers: int) -> dict[str, Iterable[Any]]:
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "shuffle": True, "num_workers": num_workers}
    options |= {"persistent_workers": True} if num_workers else {}
    return {
        PLAIN: DataLoader(dataset, **options),
        OURS: make_resumable(DataLoader(dataset, **options), seed=0),
        TORCHDATA: StatefulDataLoader(dataset, **options),
    }


def epoch_seconds(loader: Iterable[Any]) -> float:
    """For each batch of an epoch after its first, which waits for the workers to start."""
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - started) / count


def iteration(rounds: int, batches: int, workers: Sequence[int]) -> dict[str, Any]:
    datasets: dict[str, Dataset[Any]] = {
        "TensorDataset": TensorDataset(torch.randn(batches * BATCH_SIZE, 64), torch.arange(batches * BATCH_SIZE)),
        "a dataset that costs nothing": Computed(batches * BATCH_SIZE),
        "images": Images(max(3, batches // 40) * BATCH_SIZE),
    }
    found = {}
    for (name, dataset), num_workers in itertools.product(datasets.items(), workers):
        loaders = loaders_over(dataset, num_workers)
        ways = {way: lambda loader=loader: epoch_seconds(loader) for way, loader in loaders.items()}
        found[f"{name}, {num_workers} workers"] = compared(in_turns(ways, rounds), scale=1e6)
        del loaders, ways  # ends their workers
    return found


def states(rounds: int, workers: Sequence[int]) -> dict[str, Any]:
    """``state_dict()`` in the middle of an epoch."""
    found = {}
    for num_workers in workers:
        ways = {}
        for name, loader in loaders_over(Computed(100_000), num_workers).items():
            if name != PLAIN:
                batches = iter(loader)
                next(batches)
                ways[name] = lambda loader=loader, batches=batches: state_seconds(loader, batches)
        found[f"state_dict(), {num_workers} workers"] = compared(in_turns(ways, rounds), scale=1e6)
    return found


def state_seconds(loader: Any, batches: Any) -> float:
    taken = []
    for _ in range(20):
        next(batches)
        started = time.perf_counter()
        loader.state_dict()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def first_batch(rounds: int, length: int) -> dict[str, Any]:
    """From a loader and a state to the first batch, without workers; a fresh loader each time."""
    dataset = Computed(length)
    states = {done: state_at(dataset, done) for done in DONE}
    ways = {f"at {done} %": lambda state=state: seconds_to_first(dataset, state) for done, state in states.items()}
    return compared(in_turns(ways, 4 * rounds), scale=1e6)


def made(dataset: Dataset[Any]) -> Any:
    return make_resumable(DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True), seed=0)


def state_at(dataset: Computed, done: int) -> dict[str, Any]:
    """The state that a run of so many percent of an epoch would have saved: a position is a number."""
    state = made(dataset).state_dict()
    batches = dataset.length * done // 100 // BATCH_SIZE
    state["order"] |= {"consumed": batches * BATCH_SIZE, "batches": batches}
    return dict(state)


def seconds_to_first(dataset: Dataset[Any], state: dict[str, Any]) -> float:
    started = time.perf_counter()
    loader = made(dataset)
    loader.load_state_dict(state)
    next(iter(loader))
    return time.perf_counter() - started


class Model(L.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, width))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(L.Callback):
    """The time of an epoch after its first ten batches."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.now = time.perf_counter()
        if trainer.global_step == 10:
            self.started = self.now

    def per_step(self, steps: int) -> float:
        return (self.now - self.started) / (steps - 10)


def trained(width: int, steps: int, folder: str, *, callback: bool) -> float:
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(steps * BATCH_SIZE, 64)), batch_size=BATCH_SIZE, shuffle=True)
    clock = Clock()
    ours = [ResumeCallback(folder, every_n_train_steps=10**9)] if callback else []
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=callback,  # else Lightning refuses a callback that saves
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *ours],
    )
    trainer.fit(Model(width), loader)
    return clock.per_step(steps)


def callback(rounds: int, steps: int) -> dict[str, Any]:
    found, folders = {}, itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        for name, width, count in (("1 ms", 64, steps), ("10 ms", 1700, steps // 10 + 11)):
            ways = {
                "without": lambda width=width, count=count: trained(width, count, "", callback=False),
                "with ResumeCallback": lambda width=width, count=count: trained(
                    width, count, f"{folder}/{next(folders)}", callback=True
                ),
            }
            found[f"Trainer, steps of about {name}"] = compared(in_turns(ways, rounds), scale=1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2000, help="in an epoch of samples that cost nothing")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = {
        **iteration(options.rounds, options.batches, options.workers),
        **states(options.rounds, options.workers),
        "first batch of 10^6 samples, resumed": first_batch(options.rounds, 10**6),
        "first batch of 10^9 samples, resumed": first_batch(options.rounds, 10**9),
        **callback(options.rounds, options.batches),
    }
    for what, measured in found.items():
        print(f"{what}: microseconds")
        for name, median in measured["median"].items():
            taken = [1e6 * one for one in measured["seconds"][name]]
            print(f"  {name:20} {median:9.1f}  {measured['ratio'][name]:5.2f}  ({min(taken):.1f} to {max(taken):.1f})")
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
