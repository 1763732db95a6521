"""Checkpoints of ``ModelCheckpoint`` and ``trainer.save_checkpoint`` beside ours: each resumes exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_resume import ResumeCallback
from tests.toy_trainer import KillAt, Net, Points, Quiet, Saver, assert_same, every_step, files, fit, without_repeats


def loader(length: int) -> DataLoader[Any]:
    return DataLoader(Points(length), 4, shuffle=True)


def pairs(mode: str) -> CombinedLoader:
    return CombinedLoader({"a": loader(14), "b": loader(6)}, mode)  # type: ignore[arg-type]


def stops_early() -> list[Any]:
    return [EarlyStopping("val", patience=1)]


class Adversaries(Quiet):
    """Manual optimization of two networks, each with its own optimizer and scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        first, second = self.optimizers()
        for optimizer, network, sign in ((first, self.net, 1), (second, self.other, -1)):
            loss = sign * (self.net(batch[1]) * self.other(batch[1])).mean() + (network(batch[1]) ** 2).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(network.parameters(), lr=0.01) for network in (self.net, self.other)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9) for optimizer in optimizers]


class Data(LightningDataModule):
    """Has a state of its own, which its samples show."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs = 0

    def train_dataloader(self) -> Any:
        return loader(14)

    def val_dataloader(self) -> Any:
        return DataLoader(Points(6), 3)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer is not None and self.trainer.training:
            self.epochs += 1
        return [batch[0], batch[1] * (1 + 0.1 * self.epochs)]

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]


class Measured(Quiet):
    """Logs a metric over the epoch by an object, a number at times, and a sum, all of them for the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("only for the step", loss)
        if batch_idx == 1:
            self.log("second", loss, on_step=False, on_epoch=True)
            self.log("second, step too", loss, on_step=True, on_epoch=True)
        return loss


class Pairs(Quiet):
    """Two batches a step, by name; one may be missing."""

    def loss(self, batch: Any) -> torch.Tensor:
        return sum((super(Pairs, self).loss(part) for part in batch.values() if part is not None), torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {"module": Quiet},
    "validation": {},
    "validation within the epoch": {"val_check_interval": 2},
    "validation by fraction": {"val_check_interval": 0.5},
    "validation across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 3},
    "validation every second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 3},
    "plateau each epoch": {"module": lambda: Net("epoch on val"), "max_epochs": 3},
    "plateau each step": {"module": lambda: Net("step on train_step")},
    "plateau on the validation": {"module": lambda: Net("epoch on val"), "val_check_interval": 3, "max_epochs": 3},
    "scheduler each epoch": {"module": lambda: Net("epoch"), "max_epochs": 3},
    "accumulation": {"accumulate_grad_batches": 2, "val_check_interval": 2, "max_epochs": 3},
    "accumulation, uneven": {"accumulate_grad_batches": 3, "module": lambda: Quiet(length=22), "max_epochs": 3},
    "limited batches": {"limit_train_batches": 3, "max_epochs": 3},
    "limited to a fraction": {"limit_train_batches": 0.5, "max_epochs": 3},
    "loaders made again": {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
    "loaders made again at times": {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 4},
    "clipped gradients": {"gradient_clip_val": 0.1},
    "max_steps": {"max_steps": 6, "max_epochs": -1},
    "drop last": {"data": lambda: DataLoader(Points(), 4, shuffle=True, drop_last=True)},
    "early stopping": {"module": lambda: Net("none"), "max_epochs": 6, "more": stops_early},
    "two optimizers by hand": {"module": lambda: Adversaries()},
    "data module": {"data": lambda: Data()},
    "metrics": {"module": lambda: Measured()},
    "several loaders": {"data": lambda: pairs("max_size_cycle"), "module": Pairs},
    "several loaders, the shortest": {"data": lambda: pairs("min_size"), "module": Pairs},
    "several loaders, the longest": {"data": lambda: pairs("max_size"), "module": Pairs, "max_epochs": 3},
    "workers": {"data": lambda: DataLoader(Points(), 4, shuffle=True, num_workers=2), "module": Quiet},
}


def started(folder: Path, name: str, *, callbacks: Sequence[Any] = (), **more: Any) -> Any:
    options = dict(RUNS[name])
    make = options.pop("more", list)
    return fit(folder, callbacks=[*make(), *callbacks], **options | more)


@pytest.mark.filterwarnings("ignore:This checkpoint is saved inside a gradient accumulation window")
@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_after_every_batch_resumes_exactly(name: str, tmp_path: Path) -> None:
    whole = started(tmp_path, name, callbacks=[Saver(tmp_path / "files", "on_train_batch_end")])
    inside = RUNS[name].get("accumulate_grad_batches", 1) > 1
    for number, file in enumerate(files(tmp_path / "files")):
        if inside and not at_the_end_of_a_window(file):
            continue
        assert file.is_file()
        saver = Saver(tmp_path / "again", "on_train_batch_end")
        run = started(tmp_path, name, seed=number + 2, ckpt_path=file, callbacks=[saver])
        assert_same(run, whole, file.name)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_in_every_batch_goes_on_by_itself(name: str, tmp_path: Path) -> None:
    whole = started(tmp_path, name)
    for number in range(100):
        resume = ResumeCallback(tmp_path / "auto", every_n_train_steps=1)
        accumulated = RUNS[name].get("accumulate_grad_batches", 1)
        run = started(tmp_path, name, seed=number + 1, resume=resume, callbacks=[KillAt(accumulated)])
        if run.lines[-1].startswith("end"):
            break
    assert number > 2
    assert_same(run, whole, number)


def at_the_end_of_a_window(file: Path) -> bool:
    """Whether the run goes on from where ``file`` was saved, not from an earlier step."""
    content = torch.load(file)
    batches = sum(line.startswith("step") for line in content["callbacks"]["Journal"]["lines"])
    return bool(batches == content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"])


def test_saving_does_not_change_the_run(tmp_path: Path) -> None:
    assert_same(fit(tmp_path, callbacks=[every_step(tmp_path)]), fit(tmp_path))


HOOKS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
]


@pytest.mark.parametrize("interval", [2, 1.0])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_checkpoint_in_every_hook_resumes_exactly(hook: str, interval: float, tmp_path: Path) -> None:
    options: dict[str, Any] = {"module": lambda: Net("epoch on val"), "val_check_interval": interval}
    whole = fit(tmp_path, callbacks=[Saver(tmp_path / "files", hook)], **options)
    for number, file in enumerate(files(tmp_path / "files")):
        if hook == "on_train_epoch_end" and number == 1:
            continue  # nothing is left to do
        saver = Saver(tmp_path / "again", hook)
        run = fit(tmp_path, seed=number + 2, ckpt_path=file, callbacks=[saver], **options)
        assert_same(without_repeats(run), whole, file.name)


@pytest.mark.parametrize("options", [{}, {"every_n_epochs": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}])
def test_each_file_of_model_checkpoint_resumes_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    steps = {} if options else {"every_n_train_steps": 1}
    saver = lambda: every_step(tmp_path, **{"every_n_train_steps": None} | options | steps)  # noqa: E731
    whole = fit(tmp_path, callbacks=[saver()], val_check_interval=2)
    for number, file in enumerate(files(tmp_path / "files")):
        assert file.is_file()
        if "save_on_train_epoch_end" in options and number == 1:
            continue  # nothing is left to do
        run = fit(tmp_path, seed=number + 2, ckpt_path=file, callbacks=[saver()], val_check_interval=2)
        assert_same(run, whole, file.name)


def test_model_checkpoint_goes_on_keeping_the_best(tmp_path: Path) -> None:
    saver = lambda name: ModelCheckpoint(  # noqa: E731
        tmp_path / name, monitor="val", save_top_k=2, save_last=True, filename="{step}"
    )
    whole = fit(tmp_path, callbacks=[saver("whole")], max_epochs=6)
    killed = fit(tmp_path, callbacks=[saver("other"), KillAt(14)], max_epochs=6)
    assert killed.trainer.global_step == 14
    run = fit(tmp_path, seed=2, callbacks=[saver("other")], max_epochs=6, ckpt_path=tmp_path / "other/last.ckpt")
    assert_same(run, whole)
    assert names(tmp_path / "other") == names(tmp_path / "whole")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# OnExceptionCheckpoint makes Lightning say these in every fit without ckpt_path
@pytest.mark.filterwarnings("ignore:`.fit\\(ckpt_path=None\\)` was called without a model")
@pytest.mark.filterwarnings("ignore:.fit\\(ckpt_path=.last.\\) is set, but there is no last checkpoint")
def test_what_an_exception_left_resumes_exactly(tmp_path: Path) -> None:
    whole = fit(tmp_path, val_check_interval=2)
    for number in range(8):
        folder = tmp_path / f"{number}"
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, callbacks=[Crash(number), OnExceptionCheckpoint(folder)], val_check_interval=2)
        run = fit(tmp_path, seed=2, ckpt_path=folder / "on_exception.ckpt", val_check_interval=2)
        assert_same(without_repeats(run), whole, number)


class Crash(Callback):
    """Fails in batch number ``batch``, after its forward pass."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_backward(self, *_: Any) -> None:
        self.batch -= 1
        if self.batch < 0:
            raise ZeroDivisionError


def test_a_checkpoint_after_fit_leads_to_a_longer_run(tmp_path: Path) -> None:
    whole = fit(tmp_path, max_epochs=3)
    fit(tmp_path, max_epochs=2).trainer.save_checkpoint(tmp_path / "two")
    run = fit(tmp_path, seed=2, max_epochs=3, ckpt_path=tmp_path / "two")
    assert_same(without_end(run), whole)


def without_end(run: Any) -> Any:
    """``run`` without the note of an end of training that turned out not to be the last."""
    ends = [number for number, line in enumerate(run.lines) if line.startswith("end")]
    run.lines = [line for number, line in enumerate(run.lines) if number not in ends[:-1]]
    return run


def test_a_longer_max_steps_goes_on_in_the_middle_of_the_epoch(tmp_path: Path) -> None:
    whole = fit(tmp_path, module=Quiet, max_steps=7, max_epochs=-1)
    for steps in range(1, 7):
        resume = lambda: ResumeCallback(tmp_path / f"{steps}")  # noqa: B023, E731
        fit(tmp_path, module=Quiet, max_steps=steps, max_epochs=-1, resume=resume())
        run = fit(tmp_path, module=Quiet, seed=2, max_steps=7, max_epochs=-1, resume=resume())
        assert_same(run, whole, steps)
