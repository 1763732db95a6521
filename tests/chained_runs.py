"""Chains of runs at changing topologies, and the account of the samples that they saw."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from lightning_resume.data.capabilities import Capabilities, Order
from lightning_resume.data.order import Tail
from tests.simulated_ranks import Ranks, Topology

EPOCHS = 2
ENDLESS_STEPS = 12
"""How far the chain over a stream without end goes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leg:
    """A part of a chain: so many steps at one topology, the end of an epoch being one, then a save.

    The last leg runs to the end instead.
    """

    topology: Topology
    steps: int


class Account:
    """The samples of each epoch in the order in which they were seen, and the topology that each epoch ended at.

    One stream of all ranks' parts of each step, or one of each rank where each has an order of its own.
    """

    def __init__(self, streams: int = 1) -> None:
        self.streams: list[list[list[Any]]] = [[[]] for _ in range(streams)]
        self.ended_at: list[Topology] = []
        self.resumes = 0

    def take(self, run: Ranks, topology: Topology, samples: Callable[[Any], list[Any]]) -> None:
        """Takes a step of all ranks, or comes to the end of the epoch."""
        batches = run.step()
        if batches is None:
            self.ended_at.append(topology)
            for epochs in self.streams:
                epochs.append([])
        for rank, batch in enumerate(batches or []):  # of rank 0 first: together the window of the step
            self.streams[rank % len(self.streams)][-1] += samples(batch)

    def epochs(self, count: int) -> list[list[Any]]:
        """Of so many epochs, the samples of all streams."""
        return [[sample for stream in self.streams for sample in stream[epoch]] for epoch in range(count)]

    def all(self, epochs: int | None = None) -> list[list[Any]]:
        """Of each stream, the samples of so many epochs."""
        return [[sample for epoch in stream[:epochs] for sample in epoch] for stream in self.streams]


def chains_of(
    capabilities: Capabilities, *, world_sizes: Sequence[int], num_workers: Sequence[int], batch_sizes: Sequence[int]
) -> st.SearchStrategy[list[Leg]]:
    """Chains that change only what may change."""
    topologies = st.builds(
        Topology,
        world_size=st.sampled_from(world_sizes),
        num_workers=st.sampled_from(num_workers),
        batch_size=st.sampled_from(batch_sizes),
    )
    legs = st.lists(st.builds(Leg, topology=topologies, steps=st.integers(0, 8)), min_size=2, max_size=4)
    return legs.map(lambda legs: allowed(legs, capabilities))


def allowed(legs: Sequence[Leg], capabilities: Capabilities) -> list[Leg]:
    """``legs`` with what must stay the same as in the first of them."""
    same = {name: getattr(legs[0].topology, name) for name in capabilities.fixed()}
    return [dataclasses.replace(leg, topology=dataclasses.replace(leg.topology, **same)) for leg in legs]


def check(
    seen: Account,
    whole: Account,
    legs: Sequence[Leg],
    capabilities: Capabilities,
    tail: Tail,
    *,
    evens_out: bool = False,
    piece: int = 1,
) -> None:
    """Compares what a chain saw with ``whole``, an uninterrupted run at its first topology that went further.

    ``evens_out`` is of a loader that repeats samples in every epoch so that the ranks' parts are equal; of ``piece``
    samples, none comes without the others.

    Raises:
        AssertionError: More was lost or repeated than is declared, or the order is another than is declared.
    """
    unchanged = all(leg.topology == legs[0].topology for leg in legs)
    exact = capabilities.lost == capabilities.repeated == 0 and capabilities.order is Order.GLOBAL
    if not (unchanged or exact) and evens_out:
        _check_each_is_seen(seen, whole, capabilities)
    elif not (unchanged or exact):
        _check_counts(seen, whole, capabilities, tail, piece)
    elif tail is Tail.DROP:
        _check_order_of_full_steps(seen, whole)
    else:
        _check_order(seen, whole, tail, largest_step=max(leg.topology.step_size for leg in legs))


def _check_order(seen: Account, whole: Account, tail: Tail, *, largest_step: int) -> None:
    """The steps, one after another, are those of the uninterrupted run."""
    for mine, others, of_epochs in zip(seen.all(), whole.all(), whole.all(EPOCHS), strict=True):
        assert mine == others[: len(mine)]
        left = len(of_epochs) - len(mine)
        if seen.ended_at and tail is Tail.EVEN:  # fewer samples than ranks may be left to open the next epoch
            assert 0 <= left < seen.ended_at[-1].world_size
        elif seen.ended_at:  # CARRY: either run may have taken some of the next epoch's first samples
            assert abs(left) < largest_step


def _check_order_of_full_steps(seen: Account, whole: Account) -> None:
    """In each epoch the steps are those of the uninterrupted run; how many samples are dropped depends on topology."""
    for mine, others in zip(seen.streams, whole.streams, strict=True):
        for epoch, expected, topology in zip(mine, others, seen.ended_at, strict=False):
            both = min(len(epoch), len(expected))
            assert epoch[:both] == expected[:both]
            assert len(epoch) > len(expected) - topology.step_size


def _check_counts(seen: Account, whole: Account, capabilities: Capabilities, tail: Tail, piece: int) -> None:
    """Whatever the order: how often each sample of the uninterrupted run was seen."""
    mine, others = (Counter(itertools.chain(*account.all(EPOCHS))) for account in (seen, whole))
    lost, repeated = (others - mine).total(), (mine - others).total()
    if tail is Tail.DROP:  # the two runs may drop other samples, and more of them
        left = sum(topology.step_size - 1 for topology in (*seen.ended_at, *whole.ended_at[:EPOCHS]))
    else:  # either run may leave to the next epoch what fills no step, or has not a sample for each rank
        last = *seen.ended_at[-1:], *whole.ended_at[EPOCHS - 1 : EPOCHS]
        left = piece * sum((end.step_size if tail is Tail.CARRY else end.world_size) - 1 for end in last)
    assert repeated <= seen.resumes * capabilities.repeated + left, f"{repeated} repeated in {seen.resumes} resumes"
    if whole.ended_at:  # what a stream without end still holds is not lost
        assert lost <= seen.resumes * capabilities.lost + left, f"{lost} lost in {seen.resumes} resumes"


def _check_each_is_seen(seen: Account, whole: Account, capabilities: Capabilities) -> None:
    """In every epoch each sample, and of these no more again than is declared, however often it was gone on with."""
    for mine, others in zip(seen.epochs(EPOCHS), whole.epochs(EPOCHS), strict=True):
        assert set(others) - set(mine) == set()
        assert len(mine) <= len(set(others)) + capabilities.repeated
