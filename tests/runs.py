"""The training runs that the tests kill and go on with: one script for Fabric and one for the Trainer.

Both write one line for each step and rank to ``rank<r>.jsonl``: sample ids, a hash of each sample's bytes, the bits of
the loss and the learning rates, a draw from each random number generator, and hashes of this rank's parameters and
optimizer state. The lines survive SIGKILL.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from lightning_resume import (
    ResumableDDPStrategy,
    ResumableFSDPStrategy,
    ResumableModelParallelStrategy,
    ResumableSingleDeviceStrategy,
    ResumeCallback,
    binding,
    run,
)
from lightning_resume.data.position import Resumable
from lightning_resume.state.rng import RngState, restore
from tests.harness import die

SEED = 1
STRATEGIES = ("single", "ddp", "fsdp", "mp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """When to die: at ``moment`` of the optimizer step ``step``, counted from 1.

    ``backward``: after the backward pass. ``stepped``: after the optimizer step, before the save. ``validating``: in
    the validation after the step. ``saving``: when rank 0 flushes the first file of the save. ``saved``: after it.
    """

    step: int
    moment: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    strategy: str
    workers: int = 0
    batch_size: int = 4
    samples: int = 29
    epochs: int = 2
    norm: bool = False
    launch: int = 0
    """How often the run was started before."""
    kill: Kill | None = None
    scramble: int = 0
    """Where it is not 0, weights and generators begin otherwise: a resumed run must not depend on how it begins."""
    gathers: bool = False
    """Whether the whole model and optimizer are recorded too, which is the same on every topology."""
    sabotage: str | None = None
    async_save: str | bool = False


class Augmented(Dataset[Any]):
    """Samples that are other ones each time, by every generator that a user may draw from."""

    def __init__(self, samples: int) -> None:
        self.inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.inputs[index] + 0.1 * torch.randn(4) + random.random() + float(np.random.rand())


def network(settings: Settings) -> nn.Sequential:
    norm = nn.BatchNorm1d(8) if settings.norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 8), norm, nn.Dropout(0.3), nn.Linear(8, 1))


def begin(settings: Settings) -> nn.Sequential:
    """Returns the network, the same on all ranks."""
    if settings.sabotage is not None:
        SABOTAGES[settings.sabotage]()
    L.seed_everything(SEED, verbose=False)
    torch.manual_seed(SEED + settings.scramble)
    return network(settings)


def seed_rank(settings: Settings, rank: int) -> None:
    """From here on the ranks draw different numbers."""
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(100 + rank + 1000 * settings.scramble)


class Recorder:
    """Appends lines to this rank's log with one write each, so that a killed rank leaves whole lines."""

    def __init__(self, folder: Path, rank: int, settings: Settings) -> None:
        self._file = os.open(folder / f"rank{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._gathers = settings.gathers
        self.write("launch", number=settings.launch)

    def write(self, kind: str, **fields: Any) -> None:
        os.write(self._file, (json.dumps({"kind": kind, **fields}) + "\n").encode())

    def step(self, step: int, epoch: int, batch: Any, loss: Tensor, model: nn.Module, optimizer: Any) -> None:
        ids, inputs = batch
        self.write(
            "step",
            step=step,
            epoch=epoch,
            ids=ids.tolist(),
            data=[digest(row) for row in inputs],
            loss=loss.item().hex(),
            rate=[group["lr"].hex() for group in optimizer.param_groups],
            draws=draws(),
            parameters=digest(*local(model.parameters())),
            buffers=digest(*local(model.buffers())),
            optimizer=digest(*optimizer_tensors(optimizer)),
        )

    def whole(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """Records hashes of the whole model and optimizer, by name of the parameters."""
        if not self._gathers:
            return
        model = getattr(model, "_forward_module", model)  # what Fabric has wrapped
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True)
        model_state = get_model_state_dict(model, options=options)
        optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)["state"]
        moments = [optimizer_state[name][key] for name in sorted(model_state) for key in ("exp_avg", "exp_avg_sq")]
        weights = [model_state[name] for name in sorted(model_state)]
        self.write("whole", step=step, model=digest(*weights), optimizer=digest(*moments))


def draws() -> list[str]:
    return [random.random().hex(), float(np.random.rand()).hex(), torch.rand(()).item().hex()]


def digest(*tensors: Tensor) -> str:
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def local(tensors: Any) -> Iterator[Tensor]:
    """This rank's part of each: all parts of all ranks together are the whole."""
    for tensor in tensors:
        yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [optimizer.state[parameter] for parameter in parameters]
    return list(local(state[name] for state in states for name in sorted(state)))


class Reaper:
    """Dies when the run comes to the moment it is told."""

    def __init__(self, settings: Settings) -> None:
        self._kill, self._async = settings.kill, settings.async_save

    def at(self, step: int, moment: str) -> None:
        if self._kill == Kill(step=step, moment=moment):
            die()

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Inside, a flush of a file is the moment; in the background, the next one from here on."""
        if self._kill != Kill(step=step, moment="saving"):
            yield
            return
        flush, os.fsync = os.fsync, lambda _descriptor: die()
        try:
            yield
        finally:
            if not self._async:
                os.fsync = flush


def end_processes() -> None:
    # without it, ranks that end at other times abort now and then
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# -- Fabric


def fabric_strategy(name: str, world_size: int, *, async_save: Any = False) -> Any:
    if name == "mp":
        sizes = {"data_parallel_size": world_size, "tensor_parallel_size": 1}
        return ResumableModelParallelStrategy(shard, **sizes, async_save=async_save, staging="deferred")
    ready = {"single": ResumableSingleDeviceStrategy, "ddp": ResumableDDPStrategy, "fsdp": ResumableFSDPStrategy}
    return ready[name](async_save=async_save, staging="deferred")


def shard(module: nn.Module, mesh: Any) -> nn.Module:
    return fully_shard(module, mesh=mesh["data_parallel"])


def run_fabric(*, folder: Path, settings: Settings) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    strategy = fabric_strategy(settings.strategy, world_size, async_save=settings.async_save)
    fabric = L.Fabric(accelerator="cpu", devices=world_size, strategy=strategy)
    fabric.launch()
    model = begin(settings)
    seed_rank(settings, fabric.global_rank)
    recorder, reaper = Recorder(folder, fabric.global_rank, settings), Reaper(settings)

    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), lr=0.01))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, step_size=3, gamma=0.5)
    dataset = Augmented(settings.samples)
    loader = fabric.setup_dataloaders(
        DataLoader(dataset, batch_size=settings.batch_size, shuffle=True, num_workers=settings.workers)
    )
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "step": 0, "epoch": 0}
    path = folder / "checkpoint"
    if path.exists():
        fabric.load(path, state)
        recorder.whole(state["step"], model, optimizer)
    for epoch in range(state["epoch"], settings.epochs):
        state["epoch"] = epoch
        for batch in loader:
            loss = model(batch[1]).square().mean()
            fabric.backward(loss)
            reaper.at(state["step"] + 1, "backward")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            state["step"] += 1
            recorder.step(state["step"], epoch, batch, loss, model, optimizer)
            recorder.whole(state["step"], model, optimizer)
            reaper.at(state["step"], "stepped")
            with reaper.saving(state["step"]):
                fabric.save(path, state)
            reaper.at(state["step"], "saved")
    strategy.close()
    recorder.write("end", step=state["step"], draws=draws())
    end_processes()


# -- Trainer


class CPUFSDPStrategy(FSDPStrategy):
    """Stock Lightning gives FSDP the index of the device, which a CPU has not."""

    def _setup_model(self, model: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def trainer_strategy(name: str, world_size: int) -> Any:
    if name == "mp":
        return ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    return {"single": "auto", "ddp": "ddp", "fsdp": CPUFSDPStrategy()}[name]


class Module(L.LightningModule):
    """Dies and records in the hooks of the module, which come after those of all callbacks."""

    def __init__(self, settings: Settings, net: nn.Module, recorder: Recorder, reaper: Reaper) -> None:
        super().__init__()
        self.net, self.settings, self.recorder, self.reaper = net, settings, recorder, reaper

    def setup(self, stage: str) -> None:
        seed_rank(self.settings, self.trainer.global_rank)  # strategies have just seeded all ranks alike

    def configure_model(self) -> None:
        if self.settings.strategy == "mp" and not isinstance(next(self.net.parameters()), DTensor):
            shard(self.net, self.device_mesh)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        steps = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        return [optimizer], [
            {"scheduler": steps, "interval": "step"},
            {"scheduler": plateau, "interval": "epoch", "monitor": "val_loss"},
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.loss = self.net(batch[1]).square().mean()
        self.log("train_loss", self.loss, on_epoch=True, on_step=False, sync_dist=True, batch_size=len(batch[0]))
        return self.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.reaper.at(self.trainer.global_step, "validating")
        loss = self.net(batch[1]).square().mean() + torch.rand(())
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch[0]))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._record_metric("validation", "val_loss")

    def on_train_epoch_end(self) -> None:
        self._record_metric("epoch", "train_loss")

    def _record_metric(self, kind: str, name: str) -> None:
        value = self.trainer.callback_metrics[name].item().hex()
        self.recorder.write(kind, step=self.trainer.global_step, value=value, draws=draws())

    def on_train_start(self) -> None:
        if self.trainer.global_step:
            self.recorder.whole(self.trainer.global_step, self.trainer.model, self.trainer.optimizers[0])

    def on_after_backward(self) -> None:
        self.reaper.at(self.trainer.global_step + 1, "backward")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, epoch = self.trainer.global_step, self.trainer.current_epoch
        self.recorder.step(step, epoch, batch, self.loss, self.net, self.trainer.optimizers[0])
        self.recorder.whole(step, self.trainer.model, self.trainer.optimizers[0])
        self.reaper.at(step, "stepped")
        self._saving = contextlib.ExitStack()
        self._saving.enter_context(self.reaper.saving(step))

    def on_train_epoch_start(self) -> None:
        self.reaper.at(self.trainer.global_step, "saved")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.reaper.at(self.trainer.global_step, "saved")

    def on_train_end(self) -> None:
        self.reaper.at(self.trainer.global_step, "saved")


def run_trainer(*, folder: Path, settings: Settings) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    net = begin(settings)
    recorder, reaper = Recorder(folder, rank, settings), Reaper(settings)
    loaders = partial(DataLoader, batch_size=settings.batch_size)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=trainer_strategy(settings.strategy, world_size),
        max_epochs=settings.epochs,
        callbacks=[
            ResumeCallback(
                folder / "checkpoints",
                every_n_train_steps=1,
                max_attempts=None,
                async_save=settings.async_save,  # type: ignore[arg-type]
                staging="deferred",
            )
        ],
        val_check_interval=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(
        Module(settings, net, recorder, reaper),
        loaders(Augmented(settings.samples), shuffle=True, num_workers=settings.workers),
        loaders(Augmented(6)),
    )
    recorder.write("end", step=trainer.global_step, draws=draws())
    end_processes()


def wait_forever(*, folder: Path) -> None:  # noqa: ARG001  # every run is given one
    threading.Event().wait()


STACKS = {"fabric": run_fabric, "trainer": run_trainer}


# -- what breaks a resume on purpose


def shift_position() -> None:
    """Every loader goes on one batch too late."""
    stock = Resumable.load_state_dict

    def load(loader: Any, state: Any, strict: bool | None = None) -> None:
        samples = loader.batch_size * int(os.environ["WORLD_SIZE"])
        position = {"consumed": state["order"]["consumed"] + samples, "batches": state["order"]["batches"] + 1}
        stock(loader, {**state, "order": {**state["order"], **position}}, strict)

    Resumable.load_state_dict = load  # type: ignore[method-assign]


def forget_generators() -> None:
    """No random number generator is restored."""
    run.restore_rng = binding.restore_rng = lambda _components: None  # type: ignore[attr-defined]


def share_generators() -> None:
    """Every rank gets the generators of rank 0."""

    def restore_first(components: Any) -> None:
        restore(RngState.from_plain(components.value(run.RNG, 0)))

    run.restore_rng = binding.restore_rng = restore_first  # type: ignore[attr-defined]


SABOTAGES = {function.__name__: function for function in (shift_position, forget_generators, share_generators)}
