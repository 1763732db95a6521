"""Saves in the background: training goes on while one thread writes and commits what was copied.

The write path is that of every save; only the thread is another one, and the process group that its collectives go
over. The thread is not a daemon, so that the interpreter does not end before a checkpoint is whole.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - so that it registers its end before we do
import contextlib
import ctypes
import dataclasses
import enum
import os
import platform
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch.distributed as dist
from torch.optim import LBFGS, Optimizer

from lightning_resume import _distributed
from lightning_resume.checkpoint.manifest import Manifest
from lightning_resume.checkpoint.shards import WriteItems, writing_with
from lightning_resume.checkpoint.staging import Snapshot, Stager, Staging, storages_of
from lightning_resume.checkpoint.writer_process import WriterProcess
from lightning_resume.errors import CheckpointSaveError, RankLostError, ResumeWarning

_NICE = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_LOWEST = 2 << 13 | 7  # of the best-effort class
_IOPRIO_WHO_PROCESS = 1


class Where(str, enum.Enum):
    """What writes a checkpoint in the background."""

    THREAD = "thread"
    PROCESS = "process"
    """One more process for each rank: hashing and writing take nothing from the trainer's interpreter."""


class WhenBusy(str, enum.Enum):
    """What is done when a save is due while the one before is being written."""

    WAIT = "wait"
    SKIP = "skip"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsyncSave:
    """How a run saves in the background."""

    where: Where
    when_busy: WhenBusy
    staging: Staging

    @classmethod
    def of(cls, async_save: str | bool, when_busy: str, staging: str) -> AsyncSave | None:
        """Checks the user's arguments; ``None`` where saves are not to be in the background.

        Raises:
            ValueError: One is another word.
        """
        chosen = {
            "when_busy": _one_of("when_busy", WhenBusy, when_busy),
            "staging": _one_of("staging", Staging, staging),
        }
        if async_save is False:
            return None
        where = Where.THREAD if async_save is True else _one_of("async_save", Where, async_save)
        return cls(where=where, **chosen)


def _one_of(name: str, kind: type[enum.Enum], value: object) -> Any:
    words = [member.value for member in kind]
    if value not in words:
        more = " or a bool" if name == "async_save" else ""
        raise ValueError(f"{name} is {value!r}; pass one of {words}{more}.")
    return kind(value)


@final
class Background:
    """What saves one run's checkpoints in the background, one at a time.

    All methods are called on the training's thread, and are collectives where they say so.

    Args:
        how: As the user asked for.
        on_error: What an optimizer's step raises the error of a save in: it may make a warning of it.
    """

    def __init__(self, how: AsyncSave, *, on_error: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._how, self._on_error = how, on_error
        self._stager = Stager(shared=how.where is Where.PROCESS)
        self._process = WriterProcess(self._stager) if how.where is Where.PROCESS else None
        self._group: dist.ProcessGroup | None = None
        self._saving: _Saving | None = None
        self._hooks: list[Any] = []

    def prepare(self) -> None:
        """Makes the process group, before the first save does. A collective.

        Best called when the run starts: a rank that dies while a group is being made is noticed only after the group's
        time limit, one that dies later at once.
        """
        _all.add(self)
        if self._group is None:
            self._group = _distributed.new_group()

    def is_free(self, what: str) -> bool:
        """Whether ``what`` can be saved now: waits for the save in flight, or says that it is skipped. A collective.

        Raises:
            CheckpointSaveError: The save before failed.
        """
        if self._saving is None:
            return True
        if self._how.when_busy is WhenBusy.SKIP and _distributed.broadcast_object(self._saving.is_running):
            if _distributed.rank() == 0:
                text = f"{what} is not saved: {self._saving.what} is still being written, and when_busy is 'skip'."
                warnings.warn(text, ResumeWarning, stacklevel=3)
            return False
        self.wait()
        return True

    def save(
        self,
        what: str,
        state: Any,
        write: Callable[[Snapshot], Manifest],
        *,
        done: Callable[[Manifest], None],
        optimizers: Collection[Optimizer] = (),
    ) -> None:
        """Copies ``state`` and starts ``write`` on another thread. A collective; only after :meth:`is_free`.

        Args:
            what: Names the checkpoint in messages.
            state: What :meth:`~lightning_resume.checkpoint.staging.Stager.stage` takes.
            write: Saves the copy, and calls its ``check`` before the commit; collectives go over a group of their own.
            done: Called on that thread once the checkpoint is durable; may be a collective.
            optimizers: Those whose steps wait for the copies that are made later, and raise the error of the save.
        """
        assert self._saving is None
        self.prepare()
        later = storages_of(optimizers) if self._how.staging is Staging.DEFERRED else ()
        stage = lambda: self._stager.stage(state, later=later)  # noqa: E731
        snapshot = _distributed.agree("copying the state", stage)
        write_items = None if self._process is None else self._process.write
        self._unhook()
        self._hooks = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]
        saving = _Saving(what, snapshot, self._group, write_items)
        saving.start(write, done)
        self._saving = saving

    def fence(self) -> None:
        """Waits until nothing is being copied any more: now tensors may change. Not a collective."""
        if self._saving is not None:
            self._saving.snapshot.fence()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Waits before the step changes anything, but after its closure has run forward and backward."""
        if self._saving is not None and self._saving.is_to_raise():
            with self._on_error():
                self.wait()
        if self._saving is None:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None or not _calls_closure_first(optimizer):
            self.fence()
            return None

        def fenced() -> Any:
            result = closure()
            self.fence()
            return result

        return ((args[0], fenced, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": fenced})

    def wait(self) -> None:
        """Waits for the save in flight. A collective.

        Raises:
            CheckpointSaveError: It failed, on every rank.
        """
        saving = self._saving
        if saving is not None:
            saving.join()
            self._saving = None
            _distributed.agree(f"saving {saving.what} in the background", saving.raise_error)

    def close(self) -> None:
        """Waits for the save in flight, and ends what works in the background. Not a collective.

        Its error is raised, or told in a warning where another one is already on its way.
        """
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.join()
        finally:
            self._unhook()
            self._stager.close()
            if self._process is not None:
                self._process.close()
            group, self._group = self._group, None
            _distributed.end_group(group)
        if saving is None or saving.error is None:
            return
        if sys.exc_info()[0] is None:
            raise saving.error
        warnings.warn(f"{saving.error}", ResumeWarning, stacklevel=2)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


_all: weakref.WeakSet[Background] = weakref.WeakSet()


def _at_exit() -> None:
    for background in list(_all):
        try:
            background.close()
        except Exception as error:  # nobody is left to catch it
            sys.stderr.write(f"{type(error).__name__}: {error}\n")


# atexit is too late: by then the pools of threads that writing to a store needs take no more work. What is registered
# here runs in the reverse order, so before concurrent.futures shuts them.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]


@final
class _Saving:
    """One save in flight."""

    def __init__(
        self,
        what: str,
        snapshot: Snapshot,
        group: dist.ProcessGroup | None,
        write_items: WriteItems | None,
    ) -> None:
        self.what, self.snapshot = what, snapshot
        self.error: Exception | None = None
        self._group, self._write_items = group, write_items
        self._polls = 0
        self._raise_at: int | None = None
        self._failed, self._decided = threading.Event(), threading.Event()
        self._lock = threading.Lock()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self, write: Callable[[Snapshot], Manifest], done: Callable[[Manifest], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(write, done), name="lightning-resume-save")
        try:
            self._thread.start()
        except BaseException:
            self.snapshot.close()
            raise

    def join(self) -> None:
        """Waits for its end."""
        self._thread.join()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _run(self, write: Callable[[Snapshot], Manifest], done: Callable[[Manifest], None]) -> None:
        try:
            with _distributed.using(self._group), writing_with(self._write_items):
                _distributed.agree("copying the state", self.snapshot.finish)
                lower_priority()
                done(write(self.snapshot))
        except Exception as error:
            self.error = error
            self._decide()
        except BaseException as error:
            self.error = CheckpointSaveError(f"Saving {self.what} ended early: {type(error).__name__}: {error}")
            self._decide()
        finally:
            self.snapshot.close()

    def is_to_raise(self) -> bool:
        """Whether this call, counted from the start of the save, is the one at which all ranks raise its error."""
        with self._lock:
            self._polls += 1
            failed = self._failed.is_set()
        if failed:
            self._decided.wait()
        return self._raise_at is not None and self._polls >= self._raise_at

    def _decide(self) -> None:
        """Agrees with the other ranks on a call that none of them has come to; this rank comes to none meanwhile."""
        with self._lock:
            self._failed.set()
            polls = self._polls
        try:
            if not self._is_alone:
                with _distributed.using(self._group):
                    polls = max(_distributed.all_gather_object(polls))
        except RankLostError:
            pass
        finally:
            self._raise_at = polls + 1
            self._decided.set()

    @property
    def _is_alone(self) -> bool:
        """Whether the save failed because others are gone: there is nobody to agree with."""
        return any(isinstance(error, RankLostError) for error in (self.error, getattr(self.error, "__cause__", None)))


def _calls_closure_first(optimizer: Optimizer) -> bool:
    """True of all of torch's own optimizers but LBFGS, which calls it between changes; unknown of any other class."""
    kind = type(optimizer)
    return kind.__module__.startswith("torch.optim.") and not issubclass(kind, LBFGS)


def lower_priority() -> None:
    """Lets the calling thread yield processors and disk to those that train; does nothing where that cannot be done."""
    if sys.platform != "linux":  # elsewhere a priority is the whole process's
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_LOWEST)
