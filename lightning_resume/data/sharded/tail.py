"""The end of an epoch, where what is left does not fill a batch of every lane: all ranks read it, each takes its part.

So ranks end together, and every sample is seen once, whatever the number of lanes, ranks and workers. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lightning_resume.data.order import rank_slice
from lightning_resume.data.sharded.grouping import Unit


class Step(NamedTuple):
    """One step over all ranks."""

    units: list[Unit]
    """All that it consumes."""
    parts: list[list[Unit]]
    """What each rank gets; nothing where the units are too few for a step, and left over."""


def sample_steps(units: Iterable[Unit], *, world_size: int, batch_size: int, drop_last: bool) -> Iterator[Step]:
    """Divides samples into steps of ``world_size * batch_size``.

    The last step may hold fewer, but at least one for each rank, or, where that many are not left, up to one less than
    that more. Samples are only ever left over where they are fewer than ranks and nothing came before, or
    (``drop_last``) where they fill no step.
    """
    size = world_size * batch_size
    enough = size if drop_last else size + world_size
    waiting: list[Unit] = []
    for unit in units:
        waiting.append(unit)
        if len(waiting) == enough:
            yield Step(waiting[:size], _divided(waiting[:size], world_size))
            waiting = waiting[size:]
    if drop_last or len(waiting) < world_size:
        if waiting:
            yield Step(waiting, [])
    else:
        yield Step(waiting, _divided(waiting, world_size))


def batch_steps(units: Iterable[Unit], *, world_size: int, drop_last: bool) -> Iterator[Step]:
    """Divides units that are batches: one for each rank. The last ones, fewer than ranks, are divided by sample."""
    waiting: list[Unit] = []
    for unit in units:
        waiting.append(unit)
        if len(waiting) == (world_size if drop_last else 2 * world_size):
            yield _of_batches(waiting[:world_size])
            waiting = waiting[world_size:]
    whole, rest = waiting[:world_size], waiting[world_size:]
    if len(whole) < world_size:
        whole, rest = [], whole
    if drop_last or not rest:
        if whole:
            yield _of_batches(whole)
        if rest:
            yield Step(rest, [])
        return
    yield from _last_of_batches(whole, rest, world_size)


def _last_of_batches(whole: list[Unit], rest: list[Unit], world_size: int) -> Iterator[Step]:
    samples = [sample for unit in rest for sample in unit.samples]
    if len(samples) >= world_size:
        if whole:
            yield _of_batches(whole)
        yield Step(rest, [[_of_samples(rest[0], part)] for part in _divided(samples, world_size)])
    elif whole:
        more = [*([one] for one in samples), *([] for _ in range(world_size - len(samples)))]
        parts = [[_of_samples(unit, unit.samples + extra)] for unit, extra in zip(whole, more, strict=True)]
        yield Step(whole + rest, parts)
    else:
        yield Step(rest, [])


def _of_batches(units: list[Unit]) -> Step:
    return Step(units, [[unit] for unit in units])


def _of_samples(unit: Unit, samples: list[object]) -> Unit:
    return unit._replace(samples=samples)


def _divided(step: list, world_size: int) -> list[list]:  # type: ignore[type-arg]
    """Contiguous parts, even to one; as ``order.rank_slice`` has it."""
    edges = [rank_slice(0, len(step), rank=rank, world_size=world_size) for rank in range(world_size)]
    return [step[first:stop] for first, stop in edges]
