"""What makes units of samples: a unit is what a batch is made of, and what a lane's position counts.

Each kind of unit can be made again from the position of the first record that it needs: none of the content that is
waiting to be grouped is in a state.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

from lightning_resume.data.sharded.records import LEFT_OUT, Found, Where

Records = Callable[[Where], Iterator[Found]]
"""The records of a lane from a point on."""


class Unit(NamedTuple):
    """Samples that stay together: one, or a whole batch."""

    identity: tuple[Any, ...]
    """What the batch that begins with it keys its random numbers by."""
    after: Where
    found: Found | None
    """The one sample, not made yet."""
    kept: Any
    samples: list[Any]
    lane: str = ""
    """Which lane it is from, where units of several come together."""

    def made(self) -> list[Any]:
        if self.found is None:
            return self.samples
        maker = self.found.maker
        sample = maker.kept(self.found) if self.kept is LEFT_OUT else self.kept
        return [maker.transformed(self.found, sample)]


class Group(abc.ABC):
    """How samples are grouped."""

    name: str
    """Says all that the position depends on: another one is another order."""
    makes_batches = False
    """Whether a unit is a batch."""

    @abc.abstractmethod
    def units(self, records: Records, where: Where, *, batch_size: int, key: tuple[Any, ...]) -> Iterator[Unit]:
        """The units of a lane from ``where`` on. ``key`` is that of the order."""


@final
class Samples(Group):
    """Units are samples."""

    name = "samples"

    def units(self, records: Records, where: Where, *, batch_size: int, key: tuple[Any, ...]) -> Iterator[Unit]:
        for found in records(where):
            if found.maker.filter is None:  # decoded when it is known that this rank takes it
                yield Unit(found.identity, found.after, found, LEFT_OUT, [])
                continue
            kept = found.maker.kept(found)
            if kept is not LEFT_OUT:
                yield Unit(found.identity, found.after, found, kept, [])


def samples_of(records: Records, where: Where) -> Iterator[tuple[Found, Any]]:
    """The samples, made, with the records that they come from."""
    for found in records(where):
        kept = found.maker.kept(found)
        if kept is not LEFT_OUT:
            yield found, found.maker.transformed(found, kept)
