"""The arguments of ``ResumeCallback``: when it saves, what it keeps, where it goes on from."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, IterableDataset

from lightning_resume import (
    CheckpointMismatchError,
    KeepBest,
    KeepEvery,
    KeepLast,
    ResumeCallback,
    UnsafeResumeWarning,
    list_checkpoints,
)
from tests.toy_trainer import KillAt, Net, Points, Quiet, assert_same, fit, trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(*numbers: int) -> list[str]:
    return [f"step-{number:08d}" for number in numbers]


def test_it_keeps_the_last_checkpoints_only(tmp_path: Path) -> None:
    fit(tmp_path, resume=ResumeCallback(tmp_path / "r", every_n_train_steps=1, keep=2))
    assert names(tmp_path / "r") == steps(7, 8)


def test_it_keeps_all_checkpoints_when_told_to(tmp_path: Path) -> None:
    fit(tmp_path, resume=ResumeCallback(tmp_path / "r", every_n_train_steps=1, keep=None))
    assert names(tmp_path / "r") == steps(*range(1, 9))


def test_it_takes_policies_and_the_metrics_that_were_logged(tmp_path: Path) -> None:
    keep = KeepLast(1) | KeepBest(1, "val") | KeepEvery(steps=5)
    fit(tmp_path, max_epochs=3, resume=ResumeCallback(tmp_path / "r", every_n_train_steps=1, keep=keep))
    losses = {info.step: info.metrics["val"] for info in list_checkpoints(tmp_path / "r") if "val" in info.metrics}
    assert {5, 10, 12} <= losses.keys()
    assert len(names(tmp_path / "r")) == len({5, 10, 12, min(sorted(losses), key=losses.__getitem__)})


def test_without_an_interval_it_saves_after_every_epoch(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=3, resume=ResumeCallback(tmp_path / "r"))
    assert names(tmp_path / "r") == steps(4, 8, 12)


def test_it_saves_every_n_epochs_and_at_the_end(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=5, resume=ResumeCallback(tmp_path / "r", every_n_epochs=2))
    assert names(tmp_path / "r") == steps(8, 16, 20)


def test_it_saves_when_the_interval_of_time_has_passed(tmp_path: Path) -> None:
    always = ResumeCallback(tmp_path / "r", train_time_interval=timedelta(0), keep=None)
    fit(tmp_path, resume=always)
    assert names(tmp_path / "r") == steps(*range(1, 9))
    rarely = ResumeCallback(tmp_path / "s", train_time_interval=timedelta(days=1), keep=None)
    fit(tmp_path, resume=rarely)
    assert names(tmp_path / "s") == steps(8)


def test_resume_never_starts_fresh_beside_older_checkpoints(tmp_path: Path) -> None:
    first = fit(tmp_path, resume=ResumeCallback(tmp_path / "r", every_n_train_steps=1))
    again = fit(tmp_path, resume=ResumeCallback(tmp_path / "r", every_n_train_steps=1, resume="never"))
    assert_same(again, first)


def test_after_an_explicit_rewind_the_newest_is_the_one_saved_last(tmp_path: Path) -> None:
    callback = lambda: ResumeCallback(tmp_path / "r", every_n_train_steps=2, keep=None)  # noqa: E731
    whole = fit(tmp_path, resume=callback())
    run = fit(tmp_path, seed=3, max_epochs=1, ckpt_path=tmp_path / "r" / steps(2)[0], resume=callback())
    assert run.trainer.global_step == 4
    assert Path(callback().best_model_path).name == steps(4)[0]
    assert_same(fit(tmp_path, seed=4, resume=callback()), whole)


def test_a_finished_run_that_is_started_again_does_nothing(tmp_path: Path) -> None:
    first = fit(tmp_path, resume=ResumeCallback(tmp_path / "r"))
    again = fit(tmp_path, seed=5, resume=ResumeCallback(tmp_path / "r"))
    assert again.trainer.global_step == first.trainer.global_step
    assert all(torch.equal(again.state[name], value) for name, value in first.state.items())


def test_best_and_last_are_the_newest_checkpoint_for_trainer_test(tmp_path: Path) -> None:
    run = fit(tmp_path, resume=ResumeCallback(tmp_path / "r"))
    weights = {name: value.clone() for name, value in run.module.state_dict().items()}
    torch.nn.init.zeros_(run.module.net[0].weight)
    run.trainer.test(run.module, run.module.val_dataloader(), ckpt_path="best", verbose=False)
    assert all(torch.equal(value, weights[name]) for name, value in run.module.state_dict().items())


def test_two_fits_in_one_process_go_on_from_each_other(tmp_path: Path) -> None:
    run = fit(tmp_path, max_epochs=1, resume=ResumeCallback(tmp_path / "r"))
    run.trainer.fit_loop.max_epochs = 2
    run.trainer.fit(run.module)
    whole = fit(tmp_path / "whole", max_epochs=2)
    assert all(torch.equal(run.state[name], value) for name, value in whole.state.items())


class Hooked(Quiet):
    """Saves something of its own with each checkpoint."""

    steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["my steps"] = self.steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps = checkpoint["my steps"]


def test_what_the_module_saves_by_its_hooks_comes_back(tmp_path: Path) -> None:
    fit(tmp_path, module=Hooked, max_epochs=1, resume=ResumeCallback(tmp_path / "r", every_n_train_steps=1))
    again = fit(tmp_path, module=Hooked, max_epochs=2, resume=ResumeCallback(tmp_path / "r", every_n_train_steps=1))
    assert again.module.steps == 8


@pytest.mark.parametrize(
    ("argument", "value"), [("every_n_train_steps", 0), ("every_n_epochs", -1), ("keep", 0), ("resume", "maybe")]
)
def test_arguments_out_of_bounds_are_named(argument: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{argument} is {value!r}"):
        ResumeCallback(tmp_path, **{argument: value})


def test_it_saves_nothing_in_a_fast_dev_run(tmp_path: Path) -> None:
    fit(tmp_path, module=Net, resume=ResumeCallback(tmp_path / "r", every_n_train_steps=1), fast_dev_run=True)
    assert not (tmp_path / "r").exists()


def test_launchers_of_processes_may_tell_the_path_that_they_had(tmp_path: Path) -> None:
    callback = ResumeCallback(tmp_path / "r", every_n_train_steps=4)
    fit(tmp_path, resume=callback)
    callback.best_model_path = "of another process"
    assert callback.best_model_path == str(tmp_path / "r" / steps(8)[0])


class Tunable(Quiet):
    """Has a learning rate that the tuner may set."""

    def __init__(self) -> None:
        super().__init__("none")
        self.lr = 0.01

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@pytest.mark.filterwarnings("ignore:.*(lr_find|suggestion|num_training):UserWarning")
def test_looking_for_a_learning_rate_saves_nothing_and_the_run_goes_on_from_its_start(tmp_path: Path) -> None:
    callback = ResumeCallback(tmp_path / "r", every_n_train_steps=2, keep=None)
    made = trainer(tmp_path, [callback])
    module = Tunable()
    Tuner(made).lr_find(module, num_training=5, update_attr=False)
    assert not (tmp_path / "r").exists()
    made.fit(module)
    assert names(tmp_path / "r") == steps(2, 4, 6, 8)


@pytest.mark.filterwarnings("ignore:.*(lr_find|suggestion|num_training):UserWarning")
def test_the_learning_rate_finder_goes_beside_it(tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    fit(tmp_path, module=Tunable, callbacks=[finder], resume=ResumeCallback(tmp_path / "r", every_n_train_steps=4))
    assert names(tmp_path / "r") == steps(4, 8)


class Plain(IterableDataset[Any]):
    """Has no position of its own: which samples a number of batches is depends on the number of workers."""

    def __iter__(self) -> Any:
        points = Points()
        return (points[index] for index in range(len(points)))


def test_a_loader_that_cannot_go_on_exactly_is_refused_unless_the_user_says_otherwise(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def run(*, workers: int, **options: Any) -> Any:
        resume = ResumeCallback(tmp_path / "r", every_n_train_steps=1, **options)
        loader = lambda: DataLoader(Plain(), 4, num_workers=workers)  # noqa: E731
        return fit(tmp_path, data=loader, module=Quiet, resume=resume, callbacks=[KillAt(2)])

    run(workers=0)
    with pytest.raises(CheckpointMismatchError, match="not the same num_workers"):
        run(workers=1)
    assert run(workers=1, strict=False).trainer.global_step > 2
    assert "seen twice" in str(recwarn.pop(UnsafeResumeWarning).message)
