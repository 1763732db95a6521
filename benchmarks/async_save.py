"""How long a save holds up training, and how much slower steps are while it is written; all in one run, in turns.

    python benchmarks/async_save.py --mib 512 --rounds 5
    python benchmarks/async_save.py --mib 8192 --device cuda      # beside the speed of the bus

A model with Adam trains on one thread. Each way saves it in the middle: ours blocking, from a thread and from a
process, with the copy made now or deferred; torch's ``dcp.async_save``; Lightning's ``AsyncCheckpointIO``. *Stall* is
the time of the call and of the wait before the next optimizer step, as a part of our blocking save. Report ratios, not
seconds: machines differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from lightning_resume import CheckpointManager
from lightning_resume.checkpoint.background import Background

BLOCKING = "ours, blocking"


class Run:
    """A model that trains; ``mib`` is the size of its weights and moments."""

    def __init__(self, mib: int, batch: int, device: str) -> None:
        width = int((mib * 2**20 / 4 / 3 / 16) ** 0.5)
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(16))).to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.inputs = torch.randn(batch, width, device=device)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.net(self.inputs).square().mean().backward()
        self.optimizer.step()

    @property
    def objects(self) -> dict[str, Any]:
        return {"net": self.net, "optimizer": self.optimizer}

    @property
    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}


@dataclass(kw_only=True)
class Way:
    """One way to save: ``save`` returns what waits until it is done."""

    save: Callable[[Run, Path], Callable[[], None]]
    close: Callable[[], None] = lambda: None


def ours(folder: Path, name: str, **options: Any) -> Way:
    manager = CheckpointManager(folder / name, keep=1, **options)
    steps = iter(range(1, 10**9))

    def save(run: Run, path: Path) -> Callable[[], None]:  # noqa: ARG001 - the manager names its folders
        manager.save(run.objects, step=next(steps))
        return lambda: [manager.wait(), manager._folder.close()][0]  # type: ignore[return-value]

    return Way(save=save, close=manager.close)


def stock_dcp(**options: Any) -> Way:
    def save(run: Run, path: Path) -> Callable[[], None]:
        future: Any = dcp.async_save(run.state, checkpoint_id=path, **options)
        return lambda: getattr(future, "upload_completion", future).result()

    return Way(save=save)


def stock_lightning() -> Way:
    def save(run: Run, path: Path) -> Callable[[], None]:
        io = AsyncCheckpointIO(TorchCheckpointIO())
        io.save_checkpoint(run.state, path)
        return io.teardown

    return Way(save=save)


def ways_in(folder: Path) -> dict[str, Way]:
    stock: dict[str, Way] = {
        "dcp.async_save, thread": stock_dcp(),
        "dcp.async_save, process": stock_dcp(async_checkpointer_type=AsyncCheckpointerType.PROCESS),
        "Lightning AsyncCheckpointIO": stock_lightning(),
    }
    mine = {
        f"ours, {where}, {staging}": ours(folder, f"{where}-{staging}", async_save=where, staging=staging)
        for where in ("thread", "process")
        for staging in ("now", "deferred")
    }
    return {BLOCKING: ours(folder, "blocking"), **mine, **stock}


@dataclass(kw_only=True)
class Figures:
    """Seconds of one way in one round: of the call, of the wait before a step, of steps before and beside it."""

    call: float
    fence: float
    before: list[float]
    beside: list[float]
    total: float

    @property
    def slowdown(self) -> float:
        # the wait of the first step is counted as stall
        beside = [self.beside[0] - self.fence, *self.beside[1:]]
        return statistics.median(beside) / statistics.median(self.before)


def measure(run: Run, way: Way, path: Path) -> Figures:
    before = [step_seconds(run) for _ in range(5)]
    with fences() as waited:
        begun = time.perf_counter()
        wait = way.save(run, path)
        call = time.perf_counter() - begun
        beside = [step_seconds(run)]
        while time.perf_counter() - begun < 0.8 * way_seconds.get(id(way), 0.0):
            beside.append(step_seconds(run))
        wait()
        total = time.perf_counter() - begun
    way_seconds[id(way)] = min(total, way_seconds.get(id(way), total))
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return Figures(call=call, fence=sum(waited), before=before, beside=beside, total=total)


way_seconds: dict[int, float] = {}
"""How long each way took at least: about so long it writes, and steps beside it are counted."""


@contextlib.contextmanager
def fences() -> Iterator[list[float]]:
    """Gives the seconds that optimizers waited for copies inside."""
    stock, waited = Background.fence, []

    def fence(self: Background) -> None:
        at = time.perf_counter()
        stock(self)
        waited.append(time.perf_counter() - at)

    Background.fence = fence  # type: ignore[method-assign]
    try:
        yield waited
    finally:
        Background.fence = stock  # type: ignore[method-assign]


def step_seconds(run: Run) -> float:
    begun = time.perf_counter()
    run.step()
    if run.inputs.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begun


def copy_seconds(run: Run) -> float:
    """What a copy of all weights and moments into pinned memory takes: no stall without deferring is shorter."""
    if not run.optimizer.state:
        run.step()
    moments = (value for state in run.optimizer.state.values() for value in state.values())
    tensors = [tensor.detach() for tensor in (*run.net.parameters(), *moments) if isinstance(tensor, torch.Tensor)]
    pinned = run.inputs.device.type != "cpu"
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=pinned) for tensor in tensors]
    taken = []
    for _ in range(6):  # the first touches the memory
        run.step()  # as before a save: nothing of the state is in the processor's caches by chance
        begun = time.perf_counter()
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=pinned)
        if pinned:
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run = Run(options.mib, options.batch, options.device)
    copy = copy_seconds(run)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ways = {name: way for name, way in ways_in(folder).items() if any(part in name for part in options.only)}
        figures: dict[str, list[Figures]] = {}
        for round_ in range(options.rounds + 1):  # the first warms up: memory is reserved, processes are started
            for way_name, way in ways.items():
                measured = measure(run, way, folder / "stock")
                if round_:
                    figures.setdefault(way_name, []).append(measured)
        for way in ways.values():
            way.close()
        dist.destroy_process_group()
    report(figures, copy)
    if options.output:
        told = {way_name: [asdict(one) for one in of_way] for way_name, of_way in figures.items()}
        Path(options.output).write_text(json.dumps({"options": vars(options), "copy": copy, "ways": told}))


def report(figures: dict[str, list[Figures]], copy: float) -> None:
    blocking = statistics.median(one.call for one in figures[BLOCKING])
    step = statistics.median(seconds for of_way in figures.values() for one in of_way for seconds in one.before)
    print(f"blocking save {blocking:.3f} s, step {step:.3f} s; medians of {len(figures[BLOCKING])} rounds")
    print(f"the state copied within memory or over the bus, the limit of a copy made now: {copy / blocking:.3f} of it")
    print(f"{'':28}{'call':>9}{'fence':>9}{'stall':>8}{'range':>16}{'steps beside':>14}")
    for name, of_way in figures.items():
        stalls = [(one.call + one.fence) / blocking for one in of_way]
        call, fence, slowdown = (
            statistics.median(getattr(one, field) for one in of_way) for field in ("call", "fence", "slowdown")
        )
        spread = f"{min(stalls):.3f} to {max(stalls):.3f}"
        beside = "" if name == BLOCKING else f"{slowdown:.2f}"
        print(f"{name:28}{call:9.4f}{fence:9.4f}{statistics.median(stalls):8.3f}{spread:>16}{beside:>14}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512, help="size of the state (default: 512)")
    parser.add_argument("--batch", type=int, default=128, help="samples of a step, which decides how long it takes")
    parser.add_argument("--device", default="cpu", help="where the model is (default: cpu)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to save (default: the folder for temporary files)")
    parser.add_argument("--output", help="a JSON file for the figures")
    parser.add_argument("--only", nargs="+", default=[""], help="only ways whose name has one of these in it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
