"""The Trainer callback: saves the whole run on a schedule, and goes on from the newest checkpoint by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal

from lightning_resume import _distributed
from lightning_resume._lightning import Checkpoint, is_fitting, rank_zero_info
from lightning_resume.binding import TrainerBinding
from lightning_resume.checkpoint.background import AsyncSave, Background
from lightning_resume.checkpoint.layout import Found, newest, step_name
from lightning_resume.checkpoint.manifest import Manifest
from lightning_resume.checkpoint.retention import Policy, best_policy
from lightning_resume.checkpoint.validation import Validate
from lightning_resume.loading import Verify
from lightning_resume.run_folder import RunFolder, is_no_crash
from lightning_resume.saving import OnSaveError


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
        dirpath: The run folder: a path, or any fsspec URL (``s3://``, ``gs://``, ``az://``, ``sftp://``, ...).
        every_n_train_steps: Save every so many optimizer steps.
        every_n_epochs: Save every so many epochs.
        train_time_interval: Save when this much time has passed since the last save, by rank 0's clock.
        keep: Which checkpoints to keep: the number of the newest, ``None`` for all, or policies such as
            ``KeepLast(3) | KeepBest(1, "val_loss") | KeepEvery(steps=10_000)``. The others are deleted in the
            background after a newer one is durable; the newest is never deleted.
        resume: ``"auto"``, or ``"never"`` to start fresh unless ``fit(ckpt_path=...)`` is given. ``"auto"`` takes the
            newest checkpoint that is whole, and loudly an older one where that is damaged or set aside.
        max_attempts: A checkpoint is set aside when the run has been begun from it so many times and ended each time
            within 10 steps. ``None`` never sets one aside.
        verify: ``"read"`` compares a checkpoint with its hashes as it is read, ``"first"`` all of it before.
        validate: Whether tensors that ranks hold alike (all of DDP's) are compared before a save: ``"quick"`` by one
            hash of all, ``"full"`` tensor by tensor, ``None`` not at all.
        on_save_error: ``"raise"``, or ``"warn"`` to train on without that checkpoint; older ones are untouched.
        async_save: ``"thread"`` (or ``True``) or ``"process"``: training goes on once the state is copied, and a
            thread, or a process for each rank, writes the checkpoint. What failed is raised at the optimizer's next
            step, the next save and the end of ``fit``, which waits for what is in flight, as an exception does.
        when_busy: ``"wait"``, or ``"skip"`` with a warning, a save that is due while one is being written. That of the
            last step is never skipped.
        staging: ``"now"``: all is copied before training goes on. ``"deferred"``: what only optimizers change is copied
            beside the next forward and backward, and the optimizer's step waits for it; for runs that change
            parameters in no other way, which else fails the save.
        strict: Whether a run is refused whose loader cannot go on exactly, say at another number of workers.
            ``False`` lets it go on as well as it can, with a warning that says what may repeat or be lost.
        trust: Let checkpoints hold objects of any class. Loading such an object can run code: only for checkpoints
            that nobody else could have written. The same as ``fit(weights_only=False)``.
        storage_options: Arguments of the fsspec filesystem for ``dirpath``, beyond fsspec's own configuration.

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
        keep: Policy | int | Iterable[Policy] | None = 3,
        resume: str = "auto",
        max_attempts: int | None = 2,
        verify: str = "read",
        validate: str | None = None,
        on_save_error: str = "raise",
        async_save: Literal["thread", "process"] | bool = False,
        when_busy: Literal["wait", "skip"] = "wait",
        staging: Literal["now", "deferred"] = "now",
        strict: bool = True,
        trust: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; pass at least 1, or None to leave it out.")
        if resume not in ("auto", "never"):
            raise ValueError(
                f"resume is {resume!r}; pass 'auto' or 'never'. To resume from a certain checkpoint, use"
                " `trainer.fit(ckpt_path=...)`."
            )
        if every_n_train_steps is None and every_n_epochs is None and train_time_interval is None:
            every_n_epochs = 1
        self.dirpath = os.fspath(dirpath)
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self.train_time_interval = train_time_interval
        self.resume, self.strict, self.trust = resume, strict, trust
        self.verify, self.validate = Verify(verify), None if validate is None else Validate(validate)
        self.on_save_error = OnSaveError(on_save_error)
        how = AsyncSave.of(async_save, when_busy, staging)
        self._background = None if how is None else Background(how, on_error=self.on_save_error.applied)
        self._folder = RunFolder(dirpath, keep=keep, max_attempts=max_attempts, storage_options=storage_options)
        self._binding: TrainerBinding | None = None
        self._asked_step: int | None = None
        self._saved_step: int | None = None
        self._seen_step = 0
        self._saved_at = time.monotonic()

    @property
    def best_model_path(self) -> str:
        """For ``trainer.test(ckpt_path="best")``: the best by the first ``KeepBest`` in ``keep``, else the newest.

        One whose weights are not finite is neither.
        """
        best = self._folder.best(best_policy(self._folder.keep))
        return "" if best is None else str(best.path)

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Lightning's launchers of processes tell the path that they had; the folder knows better."""

    @property
    def last_model_path(self) -> str:
        """The newest complete checkpoint of the run folder."""
        return str(newest(self._folder.root) or "")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._binding is None or self._binding.trainer is not trainer:
            self._binding = TrainerBinding(
                trainer,
                on_step=self._after_step,
                on_epoch=self._after_epoch,
                find=self._find,
                folder=self._folder,
                trust=self.trust,
                strict=self.strict,
                verify=self.verify,
                validate=self.validate,
            )
        # last, so that what other callbacks do in a hook is in a checkpoint that is taken after it
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]

    def _find(self) -> list[Found]:
        if self.resume == "never" or not self._is_active:
            return []
        found = self._folder.candidates()
        rank_zero_info(
            f"Resuming from {found[0].path}." if found else f"No checkpoint in {self.dirpath!r}: a fresh run starts."
        )
        return found

    @property
    def _is_active(self) -> bool:
        """Not in a trial run, nor where the tuner has taken the callbacks away to try learning rates."""
        return not self.trainer.fast_dev_run and any(callback is self for callback in self.trainer.callbacks)

    @property
    def trainer(self) -> Any:
        assert self._binding is not None
        return self._binding.trainer

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert self._binding is not None
        self._binding.place_loops()
        self._asked_step = self._saved_step = self._seen_step = trainer.global_step
        self._saved_at = time.monotonic()
        if self._background is not None:
            self._background.prepare()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._binding is not None and is_fitting(trainer) and not trainer.sanity_checking:
            self._binding.validated()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self._folder.stepped()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._wait()
        if self._saved_step != trainer.global_step:
            self._save()
            self._wait()
        self._close()
        self._folder.withdraw()
        self._folder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()
        if is_no_crash(exception):
            self._folder.withdraw()
        self._folder.close()

    def _after_step(self) -> None:
        n = self.every_n_train_steps
        due = n is not None and self.trainer.global_step % n == 0
        if (due or self._binding.stopped or self._time_is_up()) and self._asked_step != self.trainer.global_step:  # type: ignore[union-attr]
            self._save()
        if self._binding.stopped:  # type: ignore[union-attr]
            self._fence()

    def _after_epoch(self) -> None:
        n = self.every_n_epochs
        due = n is not None and self.trainer.current_epoch % n == 0
        if due and self._asked_step != self.trainer.global_step:
            self._save()
        else:
            self._after_step()
        self._fence()

    def _fence(self) -> None:
        """For where no batch may follow: the hooks of an end are free to change weights."""
        if self._background is not None:
            self._background.fence()

    def _time_is_up(self) -> bool:
        if self.train_time_interval is None:
            return False
        passed = time.monotonic() - self._saved_at >= self.train_time_interval.total_seconds()
        return _distributed.broadcast_object(passed)

    def _save(self) -> None:
        if not self._is_active:
            return
        assert self._binding is not None
        path = self._folder.root / step_name(self.trainer.global_step)
        with self.on_save_error.applied():  # what is raised here was the save before
            if self._background is not None and not self._background.is_free(str(path)):
                return
        self._saved_at = time.monotonic()
        self._folder.make_way(path)
        as_folder = self._binding.checkpoints.as_folder(background=self._background, done=self._is_durable)
        with self.on_save_error.applied(), as_folder:
            self.trainer.save_checkpoint(path, weights_only=False)
            self._asked_step = self.trainer.global_step

    def _is_durable(self, manifest: Manifest) -> None:
        self._saved_step = manifest.step
        self._folder.tidy()

    def _wait(self) -> None:
        if self._background is not None:
            with self.on_save_error.applied():
                self._background.wait()

    def _close(self) -> None:
        if self._background is not None:
            self._background.close()
