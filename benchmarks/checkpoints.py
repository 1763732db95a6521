"""Saves and loads beside what others offer and beside the disk itself, on one rank and on two, in turns in one run.

    python benchmarks/checkpoints.py --mib 1024 --rounds 5 --output checkpoints.json

Every way ends with its bytes on the disk (fsync) or in the tensors. Ranks start together, and the slowest counts.
Medians; report ratios, not seconds: machines differ. ``raw`` writes and reads the same bytes and does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_resume.checkpoint.archive import memory_of
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.writer import write_checkpoint

TENSORS = 24
WRITE_BYTES, READ_BYTES = 2**20, 2**23


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured: so many MiB in all, so often, in a folder on the disk that counts."""

    mib: int
    rounds: int
    folder: str


def tensors_of(mib: int, *, fill: bool = True) -> dict[str, torch.Tensor]:
    """Tensors of the sizes of a Transformer's: large matrices, and between them small vectors."""
    rows = max(2, mib * 2**20 // 4 // TENSORS // 1024)
    make = torch.randn if fill else torch.zeros
    found = {f"layers.{i}.weight": make(rows, 1024) for i in range(TENSORS)}
    return found | {f"layers.{i}.bias": make(1024) for i in range(TENSORS)}


class Ranks:
    """One rank of a measurement; without a group, the only one."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.root = setting, Path(setting.folder)
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def measure(self, ways: dict[str, Callable[[], Any]], *, clean: bool) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.setting.rounds + 1):  # the first warms up
            for name, act in ways.items():
                if clean and self.rank == 0:
                    shutil.rmtree(self.root, ignore_errors=True)
                    self.root.mkdir()
                    os.sync()
                self.meet()
                started = time.perf_counter()
                act()
                self.meet()
                seconds[name].append(time.perf_counter() - started)
        return {name: taken[1:] for name, taken in seconds.items()}

    def meet(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def share(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What this rank writes of what all have."""
        return list(tensors.values())[self.rank :: self.world_size]


def write_raw(path: Path, tensors: list[torch.Tensor]) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for tensor in tensors:
        memory = memory_of(tensor)
        for start in range(0, len(memory), WRITE_BYTES):
            assert os.write(file, memory[start : start + WRITE_BYTES]) == min(WRITE_BYTES, len(memory) - start)
    os.fsync(file)
    os.close(file)


def read_raw(path: Path, tensors: list[torch.Tensor]) -> None:
    file, offset = os.open(path, os.O_RDONLY), 0
    for tensor in tensors:
        memory = memory_of(tensor)
        for start in range(0, len(memory), READ_BYTES):
            offset += os.preadv(file, [memory[start : start + READ_BYTES]], offset)
    os.close(file)


def torch_save(path: Path, state: Any) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def durable(path: Path, save: Callable[[Path], Any]) -> None:
    """Has ``save`` write a file, and the file on the disk."""
    save(path)
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def copy_into(into: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(loaded[name])


class Into:
    """Takes what Fabric has loaded into the tensors that there are, as a module does."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def load_state_dict(self, loaded: dict[str, torch.Tensor]) -> None:
        copy_into(self._tensors, loaded)


FABRIC = Fabric(accelerator="cpu", devices=1)


def of_rank(rank: int, world_size: int, setting: Setting, meeting: str, to: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    ranks = Ranks(setting)
    found = {"save": saves(ranks), "load": loads(ranks)}
    if world_size > 1:
        found["reshard"] = reshard(ranks)
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        Path(to).write_text(json.dumps(found))


def saves(ranks: Ranks) -> dict[str, Any]:
    tensors = tensors_of(ranks.setting.mib)
    state, names = {"model": tensors}, [f"model.{name}" for name in tensors]
    target = ranks.root / "checkpoint"
    ways: dict[str, Callable[[], Any]] = {
        "raw": lambda: write_raw(ranks.root / f"raw-{ranks.rank}", ranks.share(tensors)),
        "ours": lambda: write_checkpoint(target, state=state, leaves={}, meta=None, weights=names),
        "dcp.save": lambda: dcp.save(state, checkpoint_id=target),
    }
    if ranks.world_size == 1:
        ways["torch.save"] = lambda: torch_save(ranks.root / "file", state)
        ways["fabric.save"] = lambda: durable(ranks.root / "fabric", lambda path: FABRIC.save(path, state))
        ways["safetensors"] = lambda: durable(ranks.root / "weights", lambda path: save_file(tensors, path))
    return ratios(ranks.measure(ways, clean=True))


def loads(ranks: Ranks) -> dict[str, Any]:
    tensors, into = tensors_of(ranks.setting.mib), tensors_of(ranks.setting.mib, fill=False)
    state = {"model": into}
    ours, stock, raw, one = (ranks.root / name for name in ("ours", "dcp", f"raw-{ranks.rank}", "file"))
    ranks.meet()
    write_checkpoint(ours, state={"model": tensors}, leaves={}, meta=None)
    dcp.save({"model": tensors}, checkpoint_id=stock)
    write_raw(raw, list(tensors.values()))
    ways: dict[str, Callable[[], Any]] = {
        "raw": lambda: read_raw(raw, list(into.values())),
        "ours": lambda: CheckpointReader(ours).load_into(state),
        "dcp.load": lambda: dcp.load(state, checkpoint_id=stock),
    }
    if ranks.world_size == 1:
        torch_save(one, {"model": tensors})
        save_file(tensors, ranks.root / "weights")
        ways["torch.load"] = lambda: torch.load(one)
        ways["fabric.load"] = lambda: FABRIC.load(one, {"model": Into(into)})
        ways["safetensors"] = lambda: copy_into(into, load_file(ranks.root / "weights"))
    measured = ratios(ranks.measure(ways, clean=False))
    assert all(torch.equal(into[name], tensors[name]) for name in into)
    extra = {name: extra_memory(ways[name]) for name in ways}
    return {**measured, "extra MiB": extra}


def reshard(ranks: Ranks) -> dict[str, Any]:
    """What two ranks read of one rank's checkpoint: their halves of every tensor."""
    tensors, target = tensors_of(ranks.setting.mib), ranks.root / "of-one"
    if ranks.rank == 0:
        write_alone(tensors, target)
    ranks.meet()
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    into = {name: distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(0)]) for name, tensor in tensors.items()}
    state = {"model": into}
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: CheckpointReader(target).load_into(state),
        "dcp.load": lambda: dcp.load(state, checkpoint_id=target),
    }
    needed = sum(tensor.to_local().nbytes for tensor in into.values())
    read = {}
    for name, act in ways.items():
        before = bytes_read()
        act()
        read[name] = (bytes_read() - before) / needed
    return {**ratios(ranks.measure(ways, clean=False)), "bytes read of those needed": read}


def write_alone(tensors: dict[str, torch.Tensor], target: Path) -> None:
    """Saves as a single process does, which a process group that exists would not let."""
    context = mp.get_context("spawn")
    process = context.Process(target=_write_alone, args=(tensors, target))
    process.start()
    process.join()
    assert process.exitcode == 0


def _write_alone(tensors: dict[str, torch.Tensor], target: Path) -> None:
    write_checkpoint(target, state={"model": tensors}, leaves={}, meta=None)


def bytes_read() -> int:
    """What this process has asked of all files so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def extra_memory(act: Callable[[], Any]) -> float:
    """MiB that a process needs at most beside what it had before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    kept = act()
    peak = _status("VmHWM")
    del kept
    return (peak - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    base = next(iter(medians.values()))
    return {
        "seconds": seconds,
        "median": medians,
        "ratio": {name: median / base for name, median in medians.items()},
    }


def report(world_size: int, found: dict[str, Any]) -> None:
    for what, measured in found.items():
        print(f"{what}, {world_size} rank{'s' * (world_size > 1)}")
        for name, median in measured["median"].items():
            taken = measured["seconds"][name]
            more = [
                f"{measured[key][name]:.2f} {key}" for key in measured if name in measured[key] and key not in SHOWN
            ]
            spread = f"{min(taken):.3f} to {max(taken):.3f}"
            print(f"  {name:12} {median:7.3f} s  {measured['ratio'][name]:5.2f}  ({spread})  {'  '.join(more)}")


SHOWN = ("seconds", "median", "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", help="where to save (default: the folder for temporary files)")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    figures: dict[str, Any] = {"mib": options.mib, "rounds": options.rounds, "torch": torch.__version__}
    for world_size in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            setting = Setting(mib=options.mib, rounds=options.rounds, folder=f"{folder}/run")
            Path(setting.folder).mkdir()
            to = f"{folder}/found.json"
            mp.spawn(of_rank, (world_size, setting, f"{folder}/meeting", to), nprocs=world_size)
            figures[f"{world_size} ranks"] = found = json.loads(Path(to).read_text())
        report(world_size, found)
    if options.output is not None:
        options.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
