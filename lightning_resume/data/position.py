"""What every loader that knows its position can do, however it keeps it."""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from lightning_resume.data.capabilities import Capabilities
from lightning_resume.data.scenarios import Scenarios
from lightning_resume.errors import CheckpointMismatchError, UnsafeResumeWarning
from lightning_resume.state.component import Sharing


class Resumable(Scenarios):
    """A loader that can say where it is and go on from there.

    A batch counts as taken when it is handed out. A caller that took batches ahead of what it trained on says so with
    ``behind``: the state is then the one before these batches.
    """

    sharing: Sharing
    capabilities: Capabilities
    """What a resume of this loader can do."""
    topology: Mapping[str, Any]
    """The ``world_size``, ``num_workers`` and ``batch_size`` that it runs at."""
    strict = True
    """False: where the capabilities say that a resume would break, it is warned about and tried."""
    epoch: int
    _taken: int
    """Batches handed out by the open iteration."""
    _stepped: int
    _watched = False
    _before_pending: Callable[[], None] | None = None
    _ended: bool
    _left: bool
    _resumed: bool
    _iteration: object

    def __iter__(self) -> Iterator[Any]:
        # eager, so that where an iteration begins does not depend on when its first batch is asked for
        if not self._resumed and self._used() and not self._only_peeked():
            self._next_epoch()
        return self._open()

    def _used(self) -> bool:
        """Whether an iteration has taken anything of the current epoch."""
        return self._taken > 0 or self._at_end() or self._left

    def _open(self) -> Iterator[Any]:
        """An iteration from here, whatever was iterated over before."""
        self._resumed = False
        self._taken = self._stepped = 0
        self._ended = self._left = False
        self._iteration = object()
        self._opened()
        return self._run(self._iteration)

    def _run(self, iteration: object) -> Iterator[Any]:
        batches = self._batches()
        while True:
            if self._before_pending is not None and self._taken == self._stepped and torch.is_grad_enabled():
                self._before_pending()
            try:
                batch = next(batches)
            except StopIteration:
                break
            if iteration is not self._iteration:
                raise RuntimeError(
                    "This iterator is no longer the loader's position: `iter(loader)`, `set_epoch` or `load_state_dict`"
                    " was called since. Iterate over the loader once at a time."
                )
            self._taken += 1
            if not torch.is_grad_enabled():  # a batch to evaluate on: no step will come for it
                self._stepped = self._taken
            self._handed_out()
            yield batch
        if iteration is self._iteration:
            self._ended = True

    @property
    def taken(self) -> int:
        """Batches handed out by the open iteration."""
        return self._taken

    def mark_stepped(self) -> None:
        """Notes that the optimizer has stepped on all batches handed out so far."""
        self._stepped = self._taken

    def watch_steps(self, before_pending: Callable[[], None]) -> None:
        """Says that :meth:`mark_stepped` will be called for every optimizer step.

        ``before_pending`` is called before the first batch is fetched that no step has followed yet.
        """
        self._watched, self._before_pending = True, before_pending

    def remember(self, batches: int) -> None:
        """Says how many batches ``state_dict(behind=...)`` will at most go back."""

    def _only_peeked(self) -> bool:
        """Whether batches were looked at (``next(iter(loader))``) but none was used: the iteration did not count."""
        return self._watched and not self._ended and self._taken > 0 and self._stepped == 0

    @property
    def unstepped(self) -> int:
        """Batches handed out since the optimizer last stepped; 0 when the iteration has ended."""
        return 0 if self._ended else self._taken - self._stepped

    def _behind(self) -> int:
        return self.unstepped if self._watched else 0

    def state_dict(self, behind: int = 0) -> dict[str, Any]:
        """The position, as it was before the last ``behind`` batches were handed out."""
        return {**self._state(behind), "ended": self._ended}

    def moment(self, behind: int = 0) -> Callable[[], dict[str, Any]]:
        """What gives, later, the :meth:`state_dict` of now: training asks at every step, and hardly ever needs it."""
        state = self.state_dict(behind)
        return lambda: state

    def share_by_default(self, *, rank: int, world_size: int) -> None:
        """Says which part of the data is this process's, for where the user has not: the strategy knows."""

    def agree(self) -> None:
        """Has all ranks of the process group compare what their order depends on, and take rank 0's where it is open.

        A collective, where this loader is the process group's: where its rank and world size are. It takes place when
        loaders are made, or given to a strategy, which all ranks do; not at `iter`, for a map-style loader may be
        looked at on one rank alone.

        Raises:
            OutOfStepError: Ranks differ; names in what, and the values of each. Raised on all of them.
        """

    def hint(self, state_dict: Mapping[str, Any]) -> None:
        """Tells a state that may be loaded next, so that what it knows need not be read; changes nothing else."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool | None = None) -> None:
        """Goes on from ``state_dict`` at the next ``iter``: with what was left of the iteration, or, when the iteration
        had ended, with the next epoch. An iteration saved at its last batch has nothing left.

        Args:
            state_dict: From :meth:`state_dict`.
            strict: ``False`` goes on at another topology too, as well as can be done, and warns about what may repeat
                or be lost (:class:`UnsafeResumeWarning`); ``None`` is what the loader was made with.

        Raises:
            CheckpointMismatchError: The state belongs to another dataset, order or topology; nothing was changed.
        """
        with self._strictness(strict), whole(state_dict):
            self.check(state_dict)
        self._load(state_dict)
        self._begin_attributes()
        self._resumed = True
        if state_dict["ended"]:
            self._next_epoch()

    @contextlib.contextmanager
    def _strictness(self, strict: bool | None) -> Iterator[None]:
        before, self.strict = self.strict, self.strict if strict is None else strict
        try:
            yield
        finally:
            self.strict = before

    def load_epoch_end(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict`` with the next epoch, whatever is left of the current one."""
        self.load_state_dict(state_dict)
        if not state_dict["ended"] and self._begun():
            self._next_epoch()

    def leave_epoch(self) -> None:
        """Says that nothing more will be taken of the open epoch: the next ``iter`` begins another."""
        self._left = True

    def load_exhausted(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from the ``state_dict`` of an iterator that has ended but is still held: the next is empty."""
        self.load_state_dict({**state_dict, "ended": False})

    def check(self, state_dict: Mapping[str, Any]) -> None:
        """Raises :class:`CheckpointMismatchError` when ``state_dict`` does not fit; changes nothing."""
        if state_dict.get("kind") != self._kind():
            raise CheckpointMismatchError(
                "loader",
                "order",
                saved=state_dict.get("kind"),
                current=self._kind(),
                advice="Use the sampler and kind of loader that the run was started with.",
            )
        self._check_topology(state_dict["fixed"])

    def _check_topology(self, saved: Mapping[str, Any]) -> None:
        current = self._fixed()
        for field in {**saved, **current}:
            if saved.get(field) == current.get(field):
                continue
            error = CheckpointMismatchError(
                "loader",
                field,
                saved=saved.get(field, "any"),
                current=current.get(field, "any"),
                advice=f"This loader ({self._kind()}) can only go on with the {field} that it was saved with:"
                f" {self._advice()}",
            )
            if self.strict or not self.capabilities.caution:
                raise error
            warnings.warn(
                f"This loader ({self._kind()}) goes on (strict=False) with another {field} than it was saved with:"
                f" {saved.get(field, 'any')} became {current.get(field, 'any')}. {self.capabilities.caution}",
                UnsafeResumeWarning,
                stacklevel=2,
            )

    def _advice(self) -> str:
        """What the user can do about another topology."""
        without = f"goes on with it as it is: {self.capabilities.caution}" if self.capabilities.caution else _LEAVES_OUT
        return f"start with it again. (`strict=False` {without})"

    def _begin_attributes(self) -> None:
        self._taken = self._stepped = 0
        self._ended = self._resumed = self._left = False
        self._iteration = object()

    def _opened(self) -> None:
        """Called when an iteration begins."""

    def _handed_out(self) -> None:
        """Called after each batch, before it is handed out."""

    def set_epoch(self, epoch: int) -> None:
        """Makes ``epoch`` the epoch of the next iteration, which begins at its start.

        As with ``DistributedSampler``, it may be the same one again. Only a position that was just loaded is kept, when
        it is in ``epoch``: a loop that calls this before every epoch goes on exactly.
        """
        if epoch != self.epoch:
            self._go_to(epoch)
        elif self._resumed or not self._used():
            return
        else:
            self._restart()
        self._begin_attributes()

    @abc.abstractmethod
    def _go_to(self, epoch: int) -> None:
        """Moves to the start of another epoch."""

    @abc.abstractmethod
    def _restart(self) -> None:
        """Moves back to the start of the current epoch."""

    @abc.abstractmethod
    def _batches(self) -> Iterator[Any]: ...
    @abc.abstractmethod
    def _at_end(self) -> bool: ...
    @abc.abstractmethod
    def _begun(self) -> bool:
        """Whether the loaded state is past the start of its epoch."""

    @abc.abstractmethod
    def _next_epoch(self) -> None: ...
    @abc.abstractmethod
    def _state(self, behind: int) -> dict[str, Any]: ...
    @abc.abstractmethod
    def _load(self, state_dict: Mapping[str, Any]) -> None: ...
    @abc.abstractmethod
    def _kind(self) -> str: ...
    def _fixed(self) -> dict[str, Any]:
        """What must be the same on load, by name."""
        return {name: self.topology.get(name) for name in self.capabilities.fixed()}


@contextlib.contextmanager
def whole(state_dict: Any) -> Iterator[None]:
    """Raises an error that says so when what is loaded inside is no state of a loader, or a part of one."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict was given {_named(state_dict)}; pass what `state_dict` has returned, or what was loaded"
            " from the file that it was saved to."
        )
    try:
        for name in ("kind", "fixed", "ended"):
            _ = state_dict[name]
        yield
    except KeyError as error:
        raise ValueError(
            f"The position in the data is not whole: it has no {error}. Pass all that `state_dict` has returned, or"
            " load another checkpoint."
        ) from error


def _named(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


_LEAVES_OUT = "of `fabric.load` leaves this loader's position out."
