"""Runs that go on with other numbers of ranks, workers and batch sizes, and under other strategies.

Of what is computed, only the state is compared bit by bit: other ranks draw other dropout masks and reduce in another
order, so the losses of another topology are other ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.harness import Zygote, zygote
from tests.kill_matrix import Record, launch_of, read_launches
from tests.runs import STACKS, Kill, Settings

SAMPLES = 53


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leg:
    """One launch of a run; it is killed after the save of step ``until``, or runs to the end of the run."""

    ranks: int
    batch_size: int
    workers: int = 0
    strategy: str
    until: int | None = None


def topologies(strategy: str, sizes: Sequence[tuple[int, int, int]], until: Sequence[int | None]) -> list[Leg]:
    return [
        Leg(ranks=ranks, batch_size=batch_size, workers=workers, strategy=strategy, until=end)
        for (ranks, batch_size, workers), end in zip(sizes, until, strict=True)
    ]


def run_legs(stack: str, legs: Sequence[Leg], folder: Path, ranks: Zygote) -> None:
    for number, leg in enumerate(legs):
        kill = None if leg.until is None else Kill(step=leg.until, moment="saved")
        settings = Settings(
            strategy=leg.strategy,
            workers=leg.workers,
            batch_size=leg.batch_size,
            samples=SAMPLES,
            launch=number,
            scramble=number,
            kill=kill,
            gathers=True,
        )
        killed = ranks.run(launch_of(stack, settings, world_size=leg.ranks, folder=folder))
        assert killed == (kill is not None)


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


@pytest.fixture(scope="module")
def whole(ranks: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[list[Record]]]:
    """The steps of a run of a stack and strategy that nothing interrupts, on two ranks with batches of three."""
    folders: dict[tuple[str, str], Path] = {}

    def of(stack: str, strategy: str) -> list[list[Record]]:
        if (stack, strategy) not in folders:
            folder = folders[stack, strategy] = tmp_path_factory.mktemp(f"{stack}-{strategy}")
            run_legs(stack, [Leg(ranks=2, batch_size=3, strategy=strategy)], folder, ranks)
        return steps_of(folders[stack, strategy])

    return of


def steps_of(folder: Path) -> list[list[Record]]:
    """The records of each step, one for each rank in rank order."""
    logs = [read_launches(folder / f"rank{rank}.jsonl") for rank in range(len(list(folder.glob("rank*.jsonl"))))]
    steps: dict[tuple[int, int], list[Record]] = {}
    for log in logs:
        for number, records in log.items():
            for record in records:
                if record["kind"] == "step":
                    steps.setdefault((number, record["step"]), []).append(record)
    return [steps[key] for key in sorted(steps)]


def order_of(steps: list[list[Record]]) -> list[tuple[int, int]]:
    """Epoch and sample, in the order of the steps and of the ranks within a step."""
    return [(record["epoch"], sample) for step in steps for record in step for sample in record["ids"]]


def bytes_of(steps: list[list[Record]]) -> dict[tuple[int, int], str]:
    data = (digest for step in steps for record in step for digest in record["data"])
    return dict(zip(order_of(steps), data, strict=True))


def seams_of(folder: Path, legs: int) -> Iterator[tuple[Record, Record]]:
    """The last state of each leg but the last, and the first that the next leg has."""
    launches = read_launches(folder / "rank0.jsonl")
    states = [[r for r in launches[number] if r["kind"] == "whole"] for number in range(legs)]
    yield from ((before[-1], after[0]) for before, after in itertools.pairwise(states))


CHANGES = {
    "other batches": (((2, 3, 0), (1, 5, 2), (3, 2, 0), (2, 4, 2)), (2, 5, 7, None)),
    # 53 samples are 9 steps of 6 an epoch: one leg begins where an epoch ends
    "the same global batch": (((2, 3, 2), (1, 6, 0), (3, 2, 2), (2, 3, 0)), (2, 9, 12, None)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("strategy", ["ddp", "mp"])
@pytest.mark.parametrize("stack", STACKS)
def test_ranks_2_1_3_2_see_every_sample_once_in_the_same_order_with_the_same_bytes(
    stack: str,
    strategy: str,
    change: str,
    whole: Callable[[str, str], list[list[Record]]],
    ranks: Zygote,
    tmp_path: Path,
) -> None:
    legs, expected = topologies(strategy, *CHANGES[change]), whole(stack, strategy)
    run_legs(stack, legs, tmp_path, ranks)
    steps = steps_of(tmp_path)
    assert sorted(order_of(steps)) == [(epoch, sample) for epoch in (0, 1) for sample in range(SAMPLES)]
    assert order_of(steps) == order_of(expected)
    assert bytes_of(steps) == bytes_of(expected)
    assert all(before == after for before, after in seams_of(tmp_path, len(legs)))
    if change == "the same global batch":
        assert [set(order_of([step])) for step in steps] == [set(order_of([step])) for step in expected]


@pytest.mark.parametrize("stack", STACKS)
def test_a_run_goes_on_under_every_other_strategy(
    stack: str, whole: Callable[[str, str], list[list[Record]]], ranks: Zygote, tmp_path: Path
) -> None:
    names = ["ddp", "mp", "single", "fsdp", "mp", "ddp", "fsdp", "single", "ddp"]
    legs = [
        Leg(ranks=1 if name == "single" else 2, batch_size=6 if name == "single" else 3, strategy=name, until=until)
        for name, until in zip(names, [1, 3, 4, 6, 7, 8, 10, 11, None], strict=True)
    ]
    run_legs(stack, legs, tmp_path, ranks)
    assert order_of(steps_of(tmp_path)) == order_of(whole(stack, "ddp"))
    assert [before for before, after in seams_of(tmp_path, len(legs)) if before != after] == []
