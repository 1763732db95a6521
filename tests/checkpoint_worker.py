"""What the checkpoint tests run in processes of their own: ranks of a gloo group, and saves that die half-way."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_resume.checkpoint import commit, filesystem
from lightning_resume.checkpoint.layout import Kind, classify, resolve
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.writer import write_checkpoint
from lightning_resume.errors import CheckpointSaveError

SECONDS = 120  # no test here takes a tenth of it


def launch(work: Callable[[int, Path], Any], world_size: int, folder: Path) -> list[Any]:
    """Returns what ``work(rank, folder)`` returned on each rank of a fresh gloo group."""
    context = multiprocessing.get_context("spawn")
    rendezvous = folder / f"rendezvous-{work.__name__}"
    results = [context.SimpleQueue() for _ in range(world_size)]
    ranks = [
        context.Process(target=_run_rank, args=(work, rank, world_size, folder, rendezvous, results[rank]))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(SECONDS)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [json.loads(queue.get()) if not queue.empty() else {"error": "no result"} for queue in results]


def _run_rank(work: Callable[..., Any], rank: int, world_size: int, folder: Path, rendezvous: Path, out: Any) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch 2.10 in its own dcp.save
        result = work(rank, folder)
    out.put(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def full_tensor() -> torch.Tensor:
    return torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)


def replicated_tensor(index: int) -> torch.Tensor:
    return torch.full((256,), index, dtype=torch.bfloat16)


def sharded(tensor: torch.Tensor) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def make_state() -> dict[str, Any]:
    model: dict[str, Any] = {"weight": sharded(full_tensor())}
    model |= {f"copy{index}": replicated_tensor(index) for index in range(8)}
    return {"model": model, "list": [torch.tensor(3), {"a": 1}], "rank": dist.get_rank()}


def empty_state() -> dict[str, Any]:
    model: dict[str, Any] = {"weight": sharded(torch.zeros(7, 6))}
    model |= {f"copy{index}": torch.zeros(256, dtype=torch.bfloat16) for index in range(8)}
    return {"model": model, "list": [torch.tensor(0), {"a": 0}], "rank": None}


def is_restored(state: dict[str, Any]) -> bool:
    model, rest = state["model"], (state["list"][0].item(), state["list"][1], state["rank"])
    copies = all(torch.equal(model[f"copy{index}"], replicated_tensor(index)) for index in range(8))
    weight = model["weight"].full_tensor() if isinstance(model["weight"], DTensor) else model["weight"]
    return torch.equal(weight, full_tensor()) and copies and rest == (3, {"a": 1}, 0)


def save_ours(rank: int, path: Path) -> None:
    leaves = {f"resume.rng.rank_{rank:05d}": b"rng of %d" % rank, "resume.loader": b"same"}
    topology = {"world_size": dist.get_world_size()}
    write_checkpoint(path, state=make_state(), leaves=leaves, meta={"rank": rank}, step=7, topology=topology)


def rng_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """Saves and loads with two ranks; every value says whether one claim holds."""
    rng = rng_state()
    save_ours(rank, folder / "run" / "step-00000007")
    claims: dict[str, Any] = {"rng is unchanged": rng_state() == rng}
    reader = CheckpointReader(folder / "run" / "step-00000007")
    loaded, stock = empty_state(), empty_state()
    reader.load_into(loaded)
    dcp.load(stock, checkpoint_id=str(folder / "run" / "step-00000007"))
    dcp.save(make_state() | {"rank": 0}, checkpoint_id=str(folder / "stock"))
    claims |= {"we load": is_restored(loaded), "stock loads": is_restored(stock)}
    claims["leaves"] = [reader.leaf(name) for name in reader.leaf_names()] == [b"same", b"rng of 0", b"rng of 1"]
    return claims | {"errors": _failing_saves(rank, folder), "files": sorted(os.listdir(reader.path))}


def _failing_saves(rank: int, folder: Path) -> dict[str, str]:
    """Returns the message of every save that must fail; each is tried over the good checkpoint."""
    path = folder / "run" / "step-00000007"
    tries: dict[str, dict[str, Any]] = {
        "a differing leaf": {"leaves": {"resume.loader": b"%d" % rank}},
        "an object that fails on rank 1": {"state": {f"x{rank}": Unsaveable() if rank == 1 else 0}},
        "meta that fails": {"meta": Unsaveable()},
        "metadata that is not JSON": {"metadata": {"x": object()}},
        "another shape on rank 1": {"state": {"w": torch.zeros(2 + rank)}},
    }
    return {name: _message_of(path, changes) for name, changes in tries.items()}


def _message_of(path: Path, changes: dict[str, Any]) -> str:
    try:
        write_checkpoint(path, **{"state": {"w": torch.zeros(2)}, "leaves": {}, "meta": {}, **changes})
    except CheckpointSaveError as error:
        return str(error)
    return "no error"


class Unsaveable:
    def __reduce__(self) -> str:
        raise CannotPickleError("two", "arguments")


class CannotPickleError(Exception):
    """An error that does not survive pickling either."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"cannot save {one} {two}")


def three_ranks(_rank: int, folder: Path) -> dict[str, Any]:
    claims = {}
    for name in ("run/step-00000007", "stock"):
        state = empty_state()
        CheckpointReader(folder / name).load_into(state)
        claims[f"three ranks load {name}"] = is_restored(state)
    try:
        CheckpointReader(folder / "stock").load_into({"model": {"weight": sharded(torch.zeros(6, 6))}})
    except ValueError as error:
        claims["a wrong shape"] = "model.weight" in str(error)
    return claims


# --- saves that die: `python -m tests.checkpoint_worker SCENARIO FOLDER` ---


def small_state(value: int) -> dict[str, Any]:
    return {"state": {"w": torch.full((300,), value), "n": value}, "leaves": {"resume.x": b"%d" % value}, "meta": value}


def save_small(path: Path, value: int) -> None:
    write_checkpoint(path, **small_state(value))


def save_file(path: Path, value: int) -> None:
    commit.commit_file(path, lambda file: torch.save(value, file))


def value_at(path: Path) -> int | None:
    """Returns the value saved at ``path``, every part of it read and checked; None where there is nothing."""
    kind = classify(path)
    if kind is Kind.MISSING:
        return None
    if kind is Kind.SINGLE_FILE:
        return int(torch.load(resolve(path)))
    reader = CheckpointReader(path)
    state = reader.read()
    values = {*state["w"].tolist(), state["n"], reader.meta(), int(reader.leaf("resume.x"))}
    assert len(values) == 1, f"a mix: {values}"
    return int(values.pop())


SCENARIOS: dict[str, tuple[Callable[[Path], None] | None, Callable[[Path], None], list[int | None]]] = {
    "a fresh save": (None, lambda path: save_small(path, 2), [None, 2]),
    "an overwriting save": (lambda path: save_small(path, 1), lambda path: save_small(path, 2), [1, 2]),
    "a save over a file": (lambda path: save_file(path, 1), lambda path: save_small(path, 2), [1, 2]),
    "a file over a save": (lambda path: save_small(path, 1), lambda path: save_file(path, 2), [1, 2]),
    "a file over a file": (lambda path: save_file(path, 1), lambda path: save_file(path, 2), [1, 2]),
    "a delete": (lambda path: save_small(path, 1), commit.delete_checkpoint, [1, None]),
}


def die_at_every_operation(scenario: str, folder: Path, *, can_exchange: bool) -> list[str]:
    """Runs the scenario again and again, each time killed one file operation later; returns what went wrong."""
    before, act, allowed = SCENARIOS[scenario]
    wrong = []
    for count in range(10_000):
        path = folder / str(count) / "step-00000001"
        if before is not None:
            before(path)
        died = _die_after(count, partial(act, path), can_exchange=can_exchange)
        if value_at(path) not in (allowed if died else allowed[1:]):
            wrong.append(f"operation {count}: found {value_at(path)}")
        save_small(path, 3)
        if value_at(path) != 3 or os.listdir(path.parent) != [path.name]:
            wrong.append(f"operation {count}: after the next save: {os.listdir(path.parent)}")
        if not died:
            return wrong if count >= 3 else [f"only {count} operations were counted"]
    raise AssertionError("the operations do not end")


def _die_after(count: int, act: Callable[[], None], *, can_exchange: bool) -> bool:
    child = os.fork()
    if child == 0:
        with _counted(count, can_exchange=can_exchange):
            act()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), f"the save failed with {code}"
    return code == 9


@contextmanager
def _counted(count: int, *, can_exchange: bool) -> Iterator[None]:
    """Kills this process before the file operation number ``count``."""
    left = [count]

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return operation(*args, **kwargs)

        return run

    for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    for name in ("end_item", "__exit__"):
        setattr(filesystem.HashedFile, name, counted(getattr(filesystem.HashedFile, name)))
    commit.exchange = counted(commit.exchange if can_exchange else lambda *_: False)  # type: ignore[assignment]
    yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {
        f"{scenario}, {'exchange' if can_exchange else 'two renames'}": die_at_every_operation(
            scenario, Path(sys.argv[1]) / scenario / str(can_exchange), can_exchange=can_exchange
        )
        for scenario, (_, _, outcomes) in SCENARIOS.items()
        for can_exchange in ((True, False) if outcomes == [1, 2] else (True,))
    }
    print(json.dumps(results))
