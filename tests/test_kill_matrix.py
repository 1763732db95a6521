"""Runs killed at every step are compared, bit by bit, with runs that were not killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import Launch, LaunchError, Zygote, zygote
from tests.kill_matrix import ASYNC_CELLS, CELLS, STEPS, Cell, chain_of, compare, differences, run_killed, run_whole
from tests.runs import SABOTAGES, STACKS, Kill

EVERY_STEP = range(1, STEPS + 1)


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


@pytest.fixture(scope="module")
def whole(ranks: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], Path]:
    """The folder of the run of a cell that nothing interrupts."""
    folders: dict[Cell, Path] = {}

    def of(cell: Cell) -> Path:
        if cell not in folders:
            folders[cell] = tmp_path_factory.mktemp(str(cell))
            run_whole(cell, folders[cell], ranks)
        return folders[cell]

    return of


@pytest.mark.parametrize("cell", [*CELLS, *ASYNC_CELLS], ids=str)
def test_a_run_killed_at_every_step_is_the_run_that_was_not(
    cell: Cell, whole: Callable[[Cell], Path], ranks: Zygote, tmp_path: Path
) -> None:
    kills = chain_of(cell, first=[*CELLS, *ASYNC_CELLS].index(cell))
    run_killed(cell, tmp_path, kills, ranks)
    assert differences(cell, whole(cell), tmp_path, kills) == []


@pytest.mark.parametrize("step", EVERY_STEP)
@pytest.mark.parametrize("stack", STACKS)
def test_a_run_killed_once_is_exact_to_its_very_end(
    stack: str, step: int, whole: Callable[[Cell], Path], ranks: Zygote, tmp_path: Path
) -> None:
    cell = Cell(stack=stack, strategy="mp", workers=2)
    kills = [Kill(step=step, moment="saved")]
    run_killed(cell, tmp_path, kills, ranks)
    assert differences(cell, whole(cell), tmp_path, kills) == []


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    ("sabotage", "rank", "field"),
    [("shift_position", 0, "ids"), ("forget_generators", 0, "draws"), ("share_generators", 1, "draws")],
)
def test_the_comparison_notices_a_resume_that_is_broken_on_purpose(
    stack: str, sabotage: str, rank: int, field: str, whole: Callable[[Cell], Path], ranks: Zygote, tmp_path: Path
) -> None:
    assert sabotage in SABOTAGES
    cell = Cell(stack=stack, strategy="ddp", workers=0)
    kills = [Kill(step=2, moment="saved")]
    run_killed(cell, tmp_path, kills, ranks, sabotage=sabotage)
    first = f"rank {rank}, launch 1, step at step 3: {field} is"
    assert any(text.startswith(first) for text in differences(cell, whole(cell), tmp_path, kills))


def test_the_comparison_notices_a_run_that_starts_over_instead_of_going_on() -> None:
    steps = [{"kind": "step", "step": step, "loss": "0x1.0p+0"} for step in (1, 2, 3)]
    assert list(compare(steps, {0: steps[:2], 1: steps}, [1, 3])) == ["launch 1 goes on at step 1, not 3"]


def test_the_comparison_notices_a_run_that_leaves_out_its_end() -> None:
    steps = [{"kind": "step", "step": step, "loss": "0x1.0p+0"} for step in (1, 2, 3)]
    assert list(compare(steps, {0: steps[:2], 1: []}, [1, 3])) == ["2 records instead of 3"]


def test_a_failed_launch_tells_the_last_lines_of_every_rank(ranks: Zygote, tmp_path: Path) -> None:
    launch = CELLS[2].launch(tmp_path, sabotage="no such sabotage")
    with pytest.raises(LaunchError, match=r"(?s)rank 0\n.*no such sabotage.*rank 1\n.*no such sabotage"):
        ranks.run(launch)


def test_a_cancelled_launch_ends_and_the_next_one_runs(ranks: Zygote, tmp_path: Path) -> None:
    def ring(_signal: int, _frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGUSR1, ring)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(TimeoutError):
            ranks.run(Launch(function="wait_forever", arguments={}, world_size=2, folder=tmp_path))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not ranks.run(CELLS[0].launch(tmp_path))
