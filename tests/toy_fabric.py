"""A small Fabric run with an object of every kind in its ``state``; and checks that the ranks of a launch run.

:mod:`tests.harness` starts functions of :mod:`tests.runs` only; :func:`launch` adds one there that calls any function.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_resume import (
    CheckpointMismatchError,
    ResumableDDPStrategy,
    ResumableFSDPStrategy,
    ResumableModelParallelStrategy,
    ResumableSingleDeviceStrategy,
)
from tests import runs
from tests.harness import Launch, Zygote
from tests.runs import Augmented, local, optimizer_tensors, shard
from tests.toy_data import reseed


def call(*, folder: Path, check: Callable[..., None], arguments: dict[str, Any]) -> None:
    check(folder, **arguments)
    runs.end_processes()


runs.call = call  # type: ignore[attr-defined]  # unpickling `check` in the zygote imports this module, and so puts it there


def launch(ranks: Zygote, check: Callable[..., None], folder: Path, **arguments: Any) -> None:
    """Runs ``check(folder, **arguments)`` on both ranks of one launch."""
    content = {"check": check, "arguments": arguments}
    ranks.run(Launch(function="call", arguments=content, world_size=2, folder=folder, seconds=120))


def strategy(name: str, form: str = "folder", **options: Any) -> Any:
    """Our strategy; ``form`` is what it saves: a ``folder`` or a ``file``."""
    folder = form == "folder"
    if name == "fsdp":
        return ResumableFSDPStrategy(state_dict_type="sharded" if folder else "full", **options)
    if name == "mp":
        sizes = {"data_parallel_size": int(os.environ.get("WORLD_SIZE", "1")), "tensor_parallel_size": 1}
        return ResumableModelParallelStrategy(shard, save_distributed_checkpoint=folder, **sizes, **options)
    ready = {"single": ResumableSingleDeviceStrategy, "ddp": ResumableDDPStrategy}
    return ready[name](save_distributed_checkpoint=folder, **options)


def fabric(name: str = "single", form: str = "folder", **options: Any) -> L.Fabric:
    settings: dict[str, Any] = {"strategy": strategy(name, form)} | options
    made = L.Fabric(accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), **settings)
    made.launch()
    return made


class Scheduler(torch.optim.lr_scheduler.StepLR):
    """Counts the calls of its ``load_state_dict``."""

    loads = 0

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.loads += 1

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "loads"}


class Counter:
    """Any object with a state."""

    def __init__(self) -> None:
        self.value, self.loads = 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.value = state_dict["value"]
        self.loads += 1


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


class Toy:
    """One process of a run; ``seed`` is what everything in it begins with, unless it is loaded."""

    def __init__(self, fabric: L.Fabric, seed: int = 1, *, net: Callable[[], nn.Module] = network, **data: Any) -> None:
        torch.manual_seed(seed)
        self.fabric, rank = fabric, fabric.global_rank
        self.model = fabric.setup_module(net())
        self.optimizer: Any = fabric.setup_optimizers(torch.optim.Adam(self.model.parameters(), lr=0.01))
        self.scheduler = Scheduler(self.optimizer.optimizer, step_size=2, gamma=0.5)
        options = {"dataset": Augmented(30), "batch_size": 4, "shuffle": True} | data
        self.loader = fabric.setup_dataloaders(DataLoader(**options))
        self.batches: Any = None
        self.counter = Counter()
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "step": 0,
            "counter": self.counter,
            "torch": torch.Generator().manual_seed(seed + rank),
            "numpy": np.random.default_rng(seed + rank),
            "own": seed * 100 + rank,
        }
        reseed(seed * 1000 + rank)

    def step(self, batch: Any, *, optimizes: bool = True) -> tuple[Any, ...]:
        """Trains on one batch; returns what an equal run would have had."""
        loss = self.model(batch[1]).square().mean()
        self.fabric.backward(loss)
        if optimizes:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.state["step"] += 1
        self.counter.value += 1
        drawn = torch.rand((), generator=self.state["torch"]).item(), self.state["numpy"].random()
        return batch[0].tolist(), loss.item().hex(), *drawn, runs.draws()

    def train(self, steps: int) -> list[tuple[Any, ...]]:
        """The next ``steps`` batches, over as many epochs as it takes."""
        done: list[Any] = []
        while len(done) < steps:
            self.batches = iter(self.loader) if self.batches is None else self.batches
            batch = next(self.batches, None)
            if batch is None:
                self.batches = None
            else:
                done.append(self.step(batch))
        return done

    def tensors(self) -> list[Tensor]:
        """This rank's parts of the weights, buffers and moments, copied."""
        inner = self.model.module
        mine = [*local(inner.parameters()), *local(inner.buffers()), *optimizer_tensors(self.optimizer)]
        return [tensor.detach().clone() for tensor in mine]

    def others(self) -> dict[str, Any]:
        state = {key: self.state[key] for key in ("step", "own")}
        generators = {
            "torch": self.state["torch"].get_state().tolist(),
            "numpy": self.state["numpy"].bit_generator.state,
        }
        return {**state, **generators, "counter": self.counter.value, "scheduler": self.scheduler.state_dict()}


def assert_equal(one: list[Tensor], other: list[Tensor], what: str = "") -> None:
    assert len(one) == len(other)
    different = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not torch.equal(a, b)]
    assert not different, f"{what}: tensors {different} of {len(one)}"


def check_state_comes_back(folder: Path, *, name: str) -> None:
    """All of ``state`` comes back, and the run goes on as it would have, in both forms."""
    for form in ("folder", "file"):
        path = folder / form
        first = Toy(fabric(name, form), seed=1)
        first.train(3)
        saved, others = first.tensors(), first.others()
        first.fabric.save(path, first.state)
        assert path.is_dir() == (form == "folder")
        whole = first.train(6)

        again = Toy(fabric(name, form), seed=2)
        rest = again.fabric.load(path, again.state)
        assert rest == {}, rest
        assert_equal(again.tensors(), saved, form)
        assert again.others() == others
        assert again.others()["own"] == 100 + again.fabric.global_rank
        assert (again.scheduler.loads, again.counter.loads) == (1, 1)
        assert again.state["loader"] is again.loader
        assert again.train(6) == whole
        assert_equal(again.tensors(), first.tensors())


def check_signatures(folder: Path, *, name: str) -> None:
    """What the signatures of ``fabric.save`` and ``load`` promise beside a plain save and load, in both forms."""
    for form in ("folder", "file"):
        run = Toy(fabric(name, form), seed=1)
        run.train(3)
        both = {"model": run.model, "optimizer": run.optimizer}
        run.fabric.save(folder / f"{form}-both", both)
        run.fabric.save(folder / f"{form}-part", both, filter={"model": lambda name, _: name.startswith("0.")})

        raw = Toy(fabric(name, form), seed=2)
        raw.fabric.load_raw(folder / f"{form}-both", raw.model)
        raw.fabric.load_raw(folder / f"{form}-both", raw.optimizer)
        assert_equal(raw.tensors(), run.tensors(), f"{form}: load_raw")

        part, whole = Toy(fabric(name, form), seed=3), weights(run)
        before = weights(part)
        with pytest.raises(CheckpointMismatchError, match="parameter names"):
            part.fabric.load(folder / f"{form}-part", {"model": part.model})
        part.fabric.load(folder / f"{form}-part", {"model": part.model}, strict=False, weights_only=False)
        assert_equal(weights(part)[:2], whole[:2], f"{form}: loaded in part")
        assert_equal(weights(part)[2:], before[2:], f"{form}: left as it was")

        content = run.fabric.load(folder / f"{form}-both")
        assert {"model", "optimizer"} <= content.keys()
        assert tuple(content["model"]["0.weight"].shape) == tuple(network()[0].weight.shape)


def weights(toy: Toy) -> list[Tensor]:
    """This rank's parts of the weights, copied."""
    return [tensor.detach().clone() for tensor in local(toy.model.module.parameters())]


def position(toy: Toy) -> Any:
    """Where its loader is."""
    return toy.fabric.strategy._tracker.loader_states()  # type: ignore[attr-defined]


@contextlib.contextmanager
def unchanged(toy: Toy) -> Any:
    """Inside, nothing of ``toy`` may change."""
    tensors, others = toy.tensors(), toy.others()
    loader, drawn = position(toy), torch.get_rng_state()
    yield
    assert_equal(toy.tensors(), tensors)
    assert toy.others() == others
    assert position(toy) == loader
    assert torch.equal(torch.get_rng_state(), drawn)
