"""The real run in its tiny setting: killed at each stack, resumed at other topologies, every row exactly once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.real_legs import TINY, Data, Kill, make_data
from tests.real_run import STACKS, Run, check, compare, run_legs, whole

OPTIONS: dict[str, Any] = {"save_every": TINY.save_every, "seed": 0, "seconds": 120.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return make_data(tmp_path_factory.mktemp("real") / "data", TINY)


@pytest.fixture(scope="module")
def reference(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupts."""
    return run_legs(data, tmp_path_factory.mktemp("whole") / "run", stack="fabric", legs=whole(TINY), **OPTIONS)


@pytest.mark.parametrize("stack", STACKS)
def test_a_real_run_trains_on_every_row_exactly_once_through_kills_and_topologies(
    data: Data, reference: Run, stack: str, tmp_path: Path
) -> None:
    run = run_legs(data, tmp_path / "run", stack=stack, legs=TINY.legs, **OPTIONS)
    compare(run, reference)
    assert run.wrong == []
    assert [line["killed"] for line in run.table] == [
        kill.value for kill in (Kill.ANY_MOMENT, Kill.IN_A_SAVE, Kill.NEVER)
    ]
    assert all(line["after"] > 0 for line in run.table[1:])


def test_the_count_notices_a_row_that_came_twice_and_one_that_never_came(reference: Run) -> None:
    assert reference.wrong == []
    broken = copy.deepcopy(reference)
    ids = broken.steps[3][1]["ids"]
    ids[0] = ids[1]
    check(broken)
    assert broken.wrong == [f"epoch 0: {broken.data.rows - 2} of {broken.data.rows} rows were trained on once"]


def test_the_comparison_notices_two_rows_in_each_others_place(reference: Run) -> None:
    broken = copy.deepcopy(reference)
    ids = broken.steps[3][1]["ids"]
    ids[0], ids[1] = ids[1], ids[0]
    compare(broken, reference)
    assert broken.wrong == ["2 ids differ from the uninterrupted run's"]
