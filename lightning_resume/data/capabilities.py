"""What a loader promises of a resume: declared beside the code that keeps it, shown to users, and tested."""

from __future__ import annotations

import dataclasses
import enum


class Change(str, enum.Enum):
    """Whether a number may differ between save and load."""

    ELASTIC = "elastic"
    """Any other will do."""
    SAME = "same"
    """Only the same; another is refused."""


class Order(str, enum.Enum):
    """Which samples come after a resume that is allowed, and in which order."""

    GLOBAL = "global"
    """Those of the uninterrupted run, step by step, whatever the topology was changed to."""
    TOPOLOGY = "topology"
    """At the same topology those of the uninterrupted run; at another the same samples in another order."""


class Randomness(str, enum.Enum):
    """What the random numbers of a sample depend on, beside the seed and the epoch."""

    SAMPLE = "sample"
    """The sample alone: the same bits whatever the worker, world size, batch or resume."""
    POSITION = "position"
    """Its worker and place: the same bits at the same topology."""
    OWN = "own"
    """The loader's own doing: nothing is promised."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a resume of one loader can do.

    Attributes:
        world_size: Whether the number of ranks may change.
        num_workers: Whether the number of worker processes may change.
        batch_size: Whether the number of samples in a batch may change.
        repeated: At most so many samples, over all ranks, are seen again by one resume that is allowed.
        lost: At most so many are never seen.
        order: In which order the others come.
        randomness: What the random numbers of a sample depend on.
        resume_cost: What a resume reads and computes before its first batch, in words.
        state_size: How large a state is, in words.
        caution: What ``strict=False`` risks where a change is refused; empty where it is of no use.
    """

    world_size: Change
    num_workers: Change
    batch_size: Change
    repeated: int = 0
    lost: int = 0
    order: Order = Order.TOPOLOGY
    randomness: Randomness = Randomness.POSITION
    resume_cost: str
    state_size: str
    caution: str = ""

    @property
    def elastic(self) -> bool:
        """Whether nothing of the topology has to stay as it was."""
        return {self.world_size, self.num_workers, self.batch_size} == {Change.ELASTIC}

    def fixed(self) -> tuple[str, ...]:
        """What has to stay as it was, by name."""
        names = ("world_size", "num_workers", "batch_size")
        return tuple(name for name in names if getattr(self, name) is Change.SAME)
