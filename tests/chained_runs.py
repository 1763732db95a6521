"""Chains of runs at changing topologies, and the account of the samples that they saw."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(kw_only=True)
class Account:
    """The samples of each epoch in the order in which they were seen, and the topology that each epoch ended at."""

    epochs: list[list[Any]] = dataclasses.field(default_factory=lambda: [[]])
    ended_at: list[Topology] = dataclasses.field(default_factory=list)
    resumes: int = 0

    def take(self, run: Ranks, topology: Topology, samples: Callable[[Any], list[Any]]) -> None:
        """Takes a step of all ranks, or comes to the end of the epoch."""
        batches = run.step()
        if batches is None:
            self.epochs.append([])
            self.ended_at.append(topology)
        for batch in batches or []:  # of rank 0 first: together the window of the step
            self.epochs[-1] += samples(batch)

    @property
    def all(self) -> list[Any]:
        return [sample for epoch in self.epochs for sample in epoch]


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


def check(seen: Account, whole: Account, legs: Sequence[Leg], capabilities: Capabilities, tail: Tail) -> None:
    """Compares what a chain saw with ``whole``, an uninterrupted run at its first topology that went further.

    Raises:
        AssertionError: More was lost or repeated than is declared, or the order is another than is declared.
    """
    unchanged = all(leg.topology == legs[0].topology for leg in legs)
    exact = capabilities.lost == capabilities.repeated == 0 and capabilities.order is Order.GLOBAL
    if unchanged or exact:
        _check_order(seen, whole, tail)
    elif whole.ended_at:
        _check_counts(seen, whole, capabilities, tail)


def _check_order(seen: Account, whole: Account, tail: Tail) -> None:
    """The steps, one after another, are those of the uninterrupted run; what a tail leaves is less than a step."""
    if not seen.ended_at:  # without an end
        assert seen.all == whole.all[: len(seen.all)]
        return
    if tail is Tail.DROP:  # how many are dropped is the topology's doing
        for mine, others, topology in zip(seen.epochs, whole.epochs, seen.ended_at, strict=False):
            both = min(len(mine), len(others))
            assert mine[:both] == others[:both]
            assert len(mine) > len(others) - topology.step_size
        return
    assert seen.all == whole.all[: len(seen.all)]
    left = len([sample for epoch in whole.epochs[:EPOCHS] for sample in epoch]) - len(seen.all)
    first, last = whole.ended_at[0], seen.ended_at[-1]
    if tail is Tail.EVEN:  # fewer samples than ranks may be left to open the next epoch
        assert 0 <= left < last.world_size
    else:  # CARRY: either run may have taken some of the next epoch's first samples
        assert -last.step_size < left < first.step_size


def _check_counts(seen: Account, whole: Account, capabilities: Capabilities, tail: Tail) -> None:
    """Whatever the order: how often each sample of the uninterrupted run was seen."""
    mine, others = Counter(seen.all), Counter(sample for epoch in whole.epochs[:EPOCHS] for sample in epoch)
    lost, repeated = (others - mine).total(), (mine - others).total()
    dropped = 0
    if tail is Tail.DROP:  # the two runs may drop other samples, and more of them
        dropped = sum(topology.step_size - 1 for topology in (*seen.ended_at, *whole.ended_at[:EPOCHS]))
    assert lost <= seen.resumes * capabilities.lost + dropped, f"{lost} lost in {seen.resumes} resumes"
    assert repeated <= seen.resumes * capabilities.repeated + dropped, f"{repeated} repeated in {seen.resumes} resumes"
