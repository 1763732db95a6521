"""The Trainer callback: saves the whole run on a schedule, and goes on from the newest checkpoint by itself."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

from lightning_resume import _distributed
from lightning_resume._lightning import Checkpoint, is_fitting, rank_zero_info
from lightning_resume.binding import TrainerBinding
from lightning_resume.checkpoint.commit import clean_leftovers, delete_checkpoint
from lightning_resume.checkpoint.layout import list_checkpoints, newest, step_name
from lightning_resume.checkpoint.retention import superseded


class ResumeCallback(Checkpoint):
    """Makes a killed and restarted ``trainer.fit`` the same run, with any stock strategy.

    ``trainer.fit`` goes on from the newest complete checkpoint under ``dirpath``, or starts fresh where there is none.
    A checkpoint is ``dirpath/step-<8 digits of global_step>``, a folder whatever the strategy; it is taken between two
    batches, after everything that belongs to the first of them: a validation that is due, the plateau schedulers, the
    user's hooks. Checkpoints of ``ModelCheckpoint`` and ``trainer.save_checkpoint`` keep their usual form and resume
    the same way through ``fit(ckpt_path=...)``.

    With gradient accumulation, checkpoints of this callback are taken at the end of a window. One that
    ``ModelCheckpoint`` or ``trainer.save_checkpoint`` takes inside a window goes back to the last optimizer step, with
    a warning.

    Without any of the three intervals a checkpoint is saved after every epoch. The last step of a ``fit`` is always
    saved.

    Args:
        dirpath: The run folder.
        every_n_train_steps: Save every so many optimizer steps.
        every_n_epochs: Save every so many epochs.
        train_time_interval: Save when this much time has passed since the last save, by rank 0's clock.
        keep_last: How many checkpoints to keep, ``None`` for all; one is deleted after a newer one is durable.
        resume: ``"auto"``, or ``"never"`` to start fresh unless ``fit(ckpt_path=...)`` is given.
        trust: Let checkpoints hold objects of any class. Loading such an object can run code: only for checkpoints
            that nobody else could have written. The same as ``fit(weights_only=False)``.

    Raises:
        ValueError: An argument is out of its bounds.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        keep_last: int | None = 3,
        resume: str = "auto",
        trust: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; pass at least 1, or None to leave it out.")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; pass at least 1, or None to keep all checkpoints.")
        if resume not in ("auto", "never"):
            raise ValueError(
                f"resume is {resume!r}; pass 'auto' or 'never'. To resume from a certain checkpoint, use"
                " `trainer.fit(ckpt_path=...)`."
            )
        if every_n_train_steps is None and every_n_epochs is None and train_time_interval is None:
            every_n_epochs = 1
        self.dirpath = os.fspath(dirpath)
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self.train_time_interval, self.keep_last = train_time_interval, keep_last
        self.resume, self.trust = resume, trust
        self._binding: TrainerBinding | None = None
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()

    @property
    def best_model_path(self) -> str:
        """The newest checkpoint, for ``trainer.test(ckpt_path="best")`` where there is no ``ModelCheckpoint``."""
        return str(newest(self.dirpath) or "")

    @property
    def last_model_path(self) -> str:
        """The newest complete checkpoint of the run folder."""
        return self.best_model_path

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._binding is None or self._binding.trainer is not trainer:
            self._binding = TrainerBinding(
                trainer, on_step=self._after_step, on_epoch=self._after_epoch, find=self._find, trust=self.trust
            )
        # last, so that what other callbacks do in a hook is in a checkpoint that is taken after it
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]

    def _find(self) -> str | None:
        if self.resume == "never" or self.trainer.fast_dev_run:
            return None
        found = _distributed.on_rank_zero(f"looking for checkpoints in {self.dirpath!r}", self._newest)
        rank_zero_info(
            f"Resuming from {found}." if found else f"No checkpoint in {self.dirpath!r}: a fresh run starts."
        )
        return found

    def _newest(self) -> str | None:
        found = newest(self.dirpath)
        return None if found is None else str(found)

    @property
    def trainer(self) -> Any:
        assert self._binding is not None
        return self._binding.trainer

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert self._binding is not None
        self._binding.place_loops()
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._binding is not None and is_fitting(trainer) and not trainer.sanity_checking:
            self._binding.validated()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._saved_step != trainer.global_step:
            self._save()

    def _after_step(self) -> None:
        n = self.every_n_train_steps
        due = n is not None and self.trainer.global_step % n == 0
        if (due or self._binding.stopped or self._time_is_up()) and self._saved_step != self.trainer.global_step:  # type: ignore[union-attr]
            self._save()

    def _after_epoch(self) -> None:
        n = self.every_n_epochs
        due = n is not None and self.trainer.current_epoch % n == 0
        if due and self._saved_step != self.trainer.global_step:
            self._save()
        else:
            self._after_step()

    def _time_is_up(self) -> bool:
        if self.train_time_interval is None:
            return False
        passed = time.monotonic() - self._saved_at >= self.train_time_interval.total_seconds()
        return _distributed.broadcast_object(passed)

    def _save(self) -> None:
        if self.trainer.fast_dev_run:
            return
        assert self._binding is not None
        path = os.path.join(self.dirpath, step_name(self.trainer.global_step))
        with self._binding.checkpoints.as_folder():
            self.trainer.save_checkpoint(path, weights_only=False)
        self._saved_step = self.trainer.global_step
        self._saved_at = time.monotonic()
        _distributed.on_rank_zero(f"tidying {self.dirpath!r}", self._tidy)

    def _tidy(self) -> None:
        clean_leftovers(self.dirpath)
        for path in superseded(list_checkpoints(self.dirpath), self.keep_last):
            delete_checkpoint(path)
