"""The protocol by which a loader whose order is not ours gets a position."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_resume.data.capabilities import Capabilities, Change, Order, Randomness
from lightning_resume.state.component import Sharing

READS_AGAIN = Capabilities(
    world_size=Change.SAME,
    num_workers=Change.SAME,
    batch_size=Change.SAME,
    order=Order.TOPOLOGY,
    randomness=Randomness.POSITION,
    resume_cost="reads again what was read of the epoch",
    state_size="O(1)",
    caution="Of the epoch as many samples are skipped as were taken, rounded down to whole batches. Which ones these"
    " are depends on ranks, workers and batch size: some samples may be seen twice in this epoch, some not at all.",
)
"""What a loader can do whose only position is the number of batches taken."""


class LoaderAdapter(abc.ABC):
    """How loaders of one kind are iterated over, saved and gone on with.

    An adapter is made for one loader, and drives it. Everything else (which epoch it is, what was handed out and not
    yet stepped on, comparing a checkpoint with the run) is done for it, in ``make_resumable(loader)``. Register a class
    with :func:`~lightning_resume.register_adapter`, or by the entry point group ``lightning_resume.adapters``.

    Batches are asked for with Python's, NumPy's and torch's global generators seeded for that batch of that epoch; what
    worker processes draw is the adapter's own affair.

    Args:
        loader: One for which :meth:`matches` was true.
        rank: This process's index among those that see different data.
        world_size: Number of processes that see different data.
        seed: Key of all random numbers.
    """

    kind: str
    """Names this kind of loader; a checkpoint of another kind is refused."""
    capabilities: Capabilities
    """What a resume can do: refused is what they exclude, and tests hold the adapter to them."""
    sharing: Sharing = Sharing.PER_RANK
    """``REPLICATED`` where :meth:`capture` gives the same on every rank, so that it is stored once."""
    restores_from_all_ranks: bool = False
    """Whether :meth:`iterate` is given the states of all ranks as a list, in the order of the ranks."""
    goes_on_after_its_end: bool = False
    """Whether the state captured at the end of an epoch leads into the next one by itself."""

    def __init__(self, loader: Any, *, rank: int, world_size: int, seed: int) -> None:
        self.loader, self.rank, self.world_size, self.seed = loader, rank, world_size, seed

    @classmethod
    @abc.abstractmethod
    def matches(cls, loader: Any) -> bool:
        """Whether this adapter is for ``loader``, which may be anything that can be iterated over.

        Must not import the package that the loader is from: see :func:`is_from`.
        """

    @abc.abstractmethod
    def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
        """Starts a pass over the rest of an epoch.

        Args:
            epoch: Counted from 0.
            state: An earlier :meth:`capture`, in this process or another, or ``None``: from the epoch's start, then.
            skip: Batches taken of the epoch; with ``state=None`` they are passed over (:func:`skipped`).
        """

    @abc.abstractmethod
    def capture(self) -> Any:
        """The state after the batch handed out last: numbers, text, bytes, tensors, and lists and dicts of them.

        ``None`` where none is kept; then the number of batches is the position. Where asking is slow, a function that
        is called without arguments when this state is saved, perhaps some batches later.
        """

    def topology(self) -> dict[str, Any]:
        """The ``world_size``, ``num_workers`` and ``batch_size`` that the loader runs at, and what depends on them."""
        names = ("num_workers", "batch_size")
        counts = {name: getattr(self.loader, name) for name in names if hasattr(self.loader, name)}
        return {"world_size": self.world_size, **counts}

    def fixed(self) -> dict[str, Any]:
        """What of the topology must be the same on load, by name."""
        topology = self.topology()
        return {name: topology.get(name) for name in self.capabilities.fixed()}

    def identity(self) -> dict[str, Any]:
        """What tells the data and its order from others: must be the same on load even with ``strict=False``."""
        return {}

    def convert(self, state: Any, topology: Mapping[str, Any]) -> Any:
        """For ``strict=False``: makes of a state saved at another ``topology`` one for this, as well as can be done.

        ``None``, as by default, starts the epoch again and skips as many samples as were taken.
        """
        return None

    def reseed(self, seed: int) -> None:
        """Takes the seed of the run that is gone on with."""
        self.seed = seed

    def shut_down(self) -> None:
        """Ends worker processes."""


def is_from(loader: object, package: str, *names: str) -> bool:
    """Whether ``loader`` is an instance of one of the classes ``names`` of ``package``, or derived from one.

    Looks at the names of classes only, so that nothing is imported.
    """
    return any(
        cls.__name__ in names and (cls.__module__ == package or cls.__module__.startswith(f"{package}."))
        for cls in type(loader).__mro__
    )


def skipped(batches: Iterator[Any], count: int) -> Iterator[Any]:
    """Passes over ``count`` batches, or what there is of them."""
    for _ in itertools.islice(batches, count):
        pass
    return batches
