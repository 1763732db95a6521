"""The elastic order as a batch sampler: exactly once through changes of world size, whoever counts the epochs."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_resume import ElasticSampler
from lightning_resume.data.order import Tail

LENGTH = 14


class Run:
    """All ranks, in one process, through some epochs; a state between any two steps."""

    def __init__(self, world_size: int, batch_size: int, state: Any = None, *, told: bool = False, **options: Any):
        self.told, self.epoch = told, 0 if state is None else state["order"]["epoch"] + state["finished"]
        self.ranks = [
            ElasticSampler(range(LENGTH), batch_size, rank=rank, world_size=world_size, seed=3, **options)
            for rank in range(world_size)
        ]
        for rank in self.ranks:
            if state is not None:
                rank.load_state_dict(state)

    def epoch_of_samples(self, steps: int = 1000) -> list[int]:
        """The samples of up to so many steps of an epoch, rank by rank."""
        if self.told:
            for rank in self.ranks:
                rank.set_epoch(self.epoch)
        self.epoch += 1
        iterators = [iter(rank) for rank in self.ranks]
        windows = []
        while len(windows) < steps and (window := [next(iterator, []) for iterator in iterators])[0]:
            windows.append([index for part in window for index in part])
        return [index for window in windows for index in window]

    @property
    def state(self) -> dict[str, Any]:
        states = [rank.state_dict() for rank in self.ranks]
        assert states == states[:1] * len(states)
        return states[0]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("tail", [Tail.EVEN, Tail.CARRY])
def test_the_epochs_follow_each_other_without_a_gap(tail: Tail, told: bool) -> None:
    expected = Run(1, 1)
    samples = [index for _ in range(4) for index in expected.epoch_of_samples()]
    run = Run(2, 4, tail=tail, told=told)
    seen = [index for _ in range(3) for index in run.epoch_of_samples()]
    assert seen == samples[: len(seen)]
    assert len(seen) >= 3 * LENGTH


@pytest.mark.parametrize("told", [False, True])
def test_samples_too_few_for_all_ranks_open_the_next_epoch_of_any_world_size(told: bool) -> None:
    alone = Run(1, 4)
    seen = alone.epoch_of_samples(steps=3)
    three = Run(3, 4, alone.state, told=told)
    seen += three.epoch_of_samples()
    assert len(seen) == 12
    last = Run(1, 4, three.state, told=told)
    seen += last.epoch_of_samples()
    whole = Run(1, 4)
    assert seen == whole.epoch_of_samples() + whole.epoch_of_samples()


def test_an_epoch_that_has_ended_may_be_set_again() -> None:
    sampler = ElasticSampler(range(10), 4, seed=1)
    whole = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == whole
