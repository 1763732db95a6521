"""The benchmarks run, in their smallest setting, and what they time is right: no figure is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parent.parent
LOSSY = "Hugging Face iterable, shuffle(), 0 workers"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the report prints, and what is in its file."""
    folder = tmp_path_factory.mktemp("benchmarks")
    output = folder / "benchmarks.json"
    command = [sys.executable, "benchmarks/report.py", "--tiny", f"--folder={folder}", f"--output={output}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert process.returncode == 0, process.stderr
    assert output.with_suffix(".png").stat().st_size > 0
    return process.stdout, json.loads(output.read_text())


def test_each_ratio_is_in_the_table_beside_what_is_to_be_reached(told: tuple[str, dict[str, Any]]) -> None:
    printed, content = told
    assert len(content["ratios"]) > 18
    for ratio in content["ratios"]:
        [line] = [line for line in printed.splitlines() if line.startswith(f"| {ratio['what']} |")]
        assert ("**" in line) == (not ratio["reached"]) == (ratio["ours"] > ratio["most"])
        assert f"≤ {ratio['most']:g}" in line


def test_each_way_gives_an_epoch_and_all_but_the_lossy_one_go_on_with_the_right_batch(
    told: tuple[str, dict[str, Any]],
) -> None:
    printed, content = told
    ways = {way["name"]: way for way in content["found"]["loaders"]["ways"]}
    assert {"ShardedDataset, parquet, 0 workers", "make_resumable, map-style, 0 workers"} <= ways.keys()
    assert all(way["epoch_is_whole"] for way in ways.values())
    for name, way in ways.items():
        right = list(way["first_batch_is_right"].values()) == [True] * 3
        assert (way["lost"] == way["repeated"] == 0) == right == (name != LOSSY)
    if LOSSY in ways:
        [line] = [line for line in printed.splitlines() if line.startswith(LOSSY)]
        assert line.endswith("ANOTHER BATCH after 10 %, 50 %, 90 %")


def test_saves_and_loads_are_of_one_rank_and_of_two(told: tuple[str, dict[str, Any]]) -> None:
    found = told[1]["found"]["checkpoints"]
    for ranks in (1, 2):
        assert all({"raw", "ours"} <= found[f"{ranks} ranks"][what]["ratio"].keys() for what in ("save", "load"))
    assert found["2 ranks"]["reshard"]["bytes read of those needed"]["ours"] < 1.1


def test_planning_is_measured_for_each_number_of_ranks(told: tuple[str, dict[str, Any]]) -> None:
    by_ranks = told[1]["found"]["planning"]["by_ranks"]
    assert by_ranks.keys() == {"4", "64"}
    assert all("failed" not in of_ranks for of_ranks in by_ranks.values())


def test_saves_in_the_background_are_beside_those_of_others(told: tuple[str, dict[str, Any]]) -> None:
    ways = told[1]["found"]["async_save"]["ways"]
    assert {"ours, process, deferred", "ours, thread, now", "dcp.async_save, thread"} <= ways.keys()
