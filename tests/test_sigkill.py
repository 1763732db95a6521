"""Real processes are killed at random moments; ``python -m tests.sigkill`` does it more often."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Launch, Zygote, zygote
from tests.sigkill import CASES, SABOTAGES, Case, kill_all
from tests.toy_fabric import call

SEED = 0


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


@pytest.fixture(scope="module")
def tallies(ranks: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of one kill of each case."""
    return kill(ranks, tmp_path_factory.mktemp("sigkill"), CASES, kills=len(CASES))


def kill(ranks: Zygote, folder: Path, cases: Sequence[Case], *, kills: int) -> dict[str, dict[str, Any]]:
    """Kills from a process that has imported everything and has no threads, so that it may fork."""
    content = {"check": _write_down, "arguments": {"cases": cases, "kills": kills}}
    ranks.run(Launch(function=call.__name__, arguments=content, world_size=1, folder=folder, seconds=240))
    return dict(json.loads((folder / "tallies.json").read_text()))


def _write_down(folder: Path, *, cases: Sequence[Case], kills: int) -> None:
    tallies = {str(tally.case): {**vars(tally), "case": None} for tally in kill_all(kills, SEED, cases)}
    (folder / "tallies.json").write_text(json.dumps(tallies))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kill_leaves_no_mix_and_loses_nothing(tallies: dict[str, dict[str, Any]], case: Case) -> None:
    tally = tallies[str(case)]
    assert tally["kills"] == 1
    assert tally["wrong"] == []


def test_most_kills_hit_a_save(tallies: dict[str, dict[str, Any]]) -> None:
    assert sum(tally["in_a_save"] for tally in tallies.values()) > len(CASES) / 2


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_kill_finds_a_save_that_is_broken_on_purpose(ranks: Zygote, tmp_path: Path, sabotage: str) -> None:
    case = Case(form="one path", store="disk", ranks=1, victims="all", sabotage=sabotage)
    assert kill(ranks, tmp_path, [case], kills=20)[str(case)]["wrong"] != []
