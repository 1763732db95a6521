"""A small Trainer run whose journal shows every sample, loss bit, learning rate, metric and random number of it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_resume import ResumeCallback
from tests.toy_data import draw, reseed


class Points(Dataset[Any]):
    """Each sample is its index and four numbers with random noise."""

    def __init__(self, length: int = 14) -> None:
        self.x = torch.randn(length, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, self.x[index] + 0.1 * draw()


class Net(LightningModule):
    """Dropout and BatchNorm, so that random numbers and buffers count; ``schedule`` names the scheduler."""

    def __init__(self, schedule: str = "step", *, length: int = 14, batch_size: int = 4) -> None:
        super().__init__()
        self.schedule, self.length, self.batch_size = schedule, length, batch_size
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))

    def loss(self, batch: Any) -> torch.Tensor:
        return (self.net(batch[1]) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch) + torch.rand(()), batch_size=len(batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        if self.schedule == "none":
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    def _scheduler(self, optimizer: Any) -> dict[str, Any]:
        if self.schedule == "step":
            return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"}
        if self.schedule == "epoch":
            return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7), "interval": "epoch"}
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        interval, monitor = self.schedule.split(" on ")
        return {"scheduler": plateau, "interval": interval, "monitor": monitor}

    def train_dataloader(self) -> Any:
        return DataLoader(Points(self.length), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Points(6), 3)


class Quiet(Net):
    """Without a validation."""

    validation_step = LightningModule.validation_step
    val_dataloader = LightningModule.val_dataloader


class Journal(Callback):
    """Writes down all that happens; its lines are part of the checkpoint, so that a resumed run goes on writing."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, *parts: Any) -> None:
        self.lines.append(" ".join(map(str, parts)))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.write("epoch", trainer.current_epoch, "starts", draw())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.write("batch", trainer.current_epoch, batch_idx, bits(batch))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.write("step", trainer.global_step, bits(loss), rates, bits(dict(trainer.callback_metrics)), draw())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.write("validated", trainer.global_step, bits(dict(trainer.callback_metrics)), draw())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.write("epoch", trainer.current_epoch, "ends", bits(dict(trainer.callback_metrics)), draw())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.write("end", trainer.global_step, trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self.lines)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lines = list(state_dict["lines"])


def bits(value: Any) -> str:
    """``value`` as text that is equal only for equal bits."""
    if isinstance(value, dict):
        return " ".join(f"{key}={bits(item)}" for key, item in sorted(value.items()))
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return f"[{' '.join(map(bits, value))}]"
    return " ".join(map(float.hex, torch.as_tensor(value, dtype=torch.float64).flatten().tolist()))


class Killed(Exception):
    """Stands for the end of the process."""


class KillAt(Callback):
    """Ends the run at the start of batch number ``batch`` of the run, counted over epochs."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_train_batch_start(self, *_: Any) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


def trainer(folder: Path, callbacks: Sequence[Any] = (), **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return Trainer(**settings | options, callbacks=list(callbacks))


@dataclasses.dataclass
class Run:
    """What a run has come to."""

    trainer: Trainer
    module: Any
    lines: list[str]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """All parameters, buffers and tensors of the optimizers, copied."""
        tensors = dict(self.module.state_dict())
        for number, optimizer in enumerate(self.trainer.optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"{number}.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def fit(
    folder: Path,
    *,
    module: Callable[[], Any] = Net,
    seed: int = 1,
    data: Callable[[], Any] | None = None,
    ckpt_path: Any = None,
    resume: ResumeCallback | None = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> Run:
    """One ``trainer.fit`` in a process that knows nothing of earlier ones; only :class:`Killed` may end it early."""
    reseed(seed)
    model, journal = module(), Journal()
    own = resume or ResumeCallback(folder / "run", every_n_epochs=10**6, resume="never")
    made = trainer(folder, [journal, *callbacks, own], **options)
    with contextlib.suppress(Killed):
        made.fit(model, data and data(), ckpt_path=ckpt_path)
    return Run(made, model, journal.lines)


def difference(run: Run, whole: Run) -> str | None:
    """The first thing in which ``run`` is not ``whole``, ``None`` where it is the same run to the last bit."""
    for number, (mine, other) in enumerate(itertools.zip_longest(run.lines, whole.lines)):
        if mine != other:
            return f"line {number}:\n  resumed: {mine}\n  whole:   {other}"
    ours, theirs = run.state, whole.state
    if ours.keys() != theirs.keys():
        return f"names of tensors: {sorted(ours)} {sorted(theirs)}"
    return next((f"tensor {name}" for name in ours if not torch.equal(ours[name], theirs[name])), None)


def assert_same(run: Run, whole: Run, where: Any = "") -> None:
    different = difference(run, whole)
    assert different is None, f"{where}: {different}"


class Saver(Callback):
    """Calls ``trainer.save_checkpoint`` in the hook of a name, each time."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.folder, self.saved = folder, 0
        setattr(self, hook, self.save)

    def save(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{self.saved:03}.ckpt")
            self.saved += 1


def without_repeats(run: Run) -> Run:
    """``run`` without the note of a batch that was fetched, dropped by a checkpoint and fetched again."""
    lines = [line for before, line in zip(["", *run.lines], run.lines, strict=False) if line != before]
    return dataclasses.replace(run, lines=lines)


def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    """A ``ModelCheckpoint`` that keeps all it saves."""
    settings: dict[str, Any] = {"filename": "{step}-{epoch}", "save_top_k": -1, "every_n_train_steps": 1}
    return ModelCheckpoint(folder / "files", **settings | options)


def files(folder: Path) -> list[Path]:
    """What is in ``folder``, oldest first."""
    found = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert found
    return found
