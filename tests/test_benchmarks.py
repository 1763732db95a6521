"""The benchmarks run, and what they time is a correct resume: in their smallest settings, as scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("ShardedDataset, parquet", "ShardedDataset, jsonl, 0", "ShardedDataset, tar, 0", "make_resumable, map-style")
WHAT = ("save", "load")
OTHERS = ("map-style, 0 workers", "stateless iterable, 0", "Hugging Face", "pyarrow")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]]]:
    """What the benchmark of loaders prints, and its figures by the name of the way."""
    figures = tmp_path_factory.mktemp("benchmark") / "loaders.json"
    sizes = ("--rows=6000", "--files=4", "--row-group=300", "--batch-size=32", "--rounds=1", f"--output={figures}")
    command = [sys.executable, "benchmarks/loaders.py", *sizes, *(f"--only={name}" for name in (*OURS, *OTHERS))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert process.returncode == 0, process.stderr
    return process.stdout, {way["name"]: way for way in json.loads(figures.read_text())["ways"]}


def test_each_way_gives_an_epoch_and_all_but_the_lossy_one_go_on_with_the_right_batch(
    output: tuple[str, dict[str, dict[str, Any]]],
) -> None:
    ways = output[1]
    assert sum(name.startswith(OURS) for name in ways) == 5
    assert all(way["epoch_is_whole"] for way in ways.values())
    right = {name: way for name, way in ways.items() if way["lost"] == way["repeated"] == 0}
    assert ways.keys() - right.keys() <= {"Hugging Face iterable, shuffle(), 0 workers", "pyarrow iter_batches"}
    assert all(list(way["first_batch_is_right"].values()) == [True] * 3 for way in right.values())


def test_a_way_that_loses_samples_is_marked_in_the_table(output: tuple[str, dict[str, dict[str, Any]]]) -> None:
    pytest.importorskip("datasets")
    printed, ways = output
    lossy = "Hugging Face iterable, shuffle(), 0 workers"
    assert ways[lossy]["lost"] > 0
    [line] = [line for line in printed.splitlines() if line.startswith(lossy)]
    assert line.endswith("ANOTHER BATCH after 10 %, 50 %, 90 %")


def test_planning_is_measured_for_each_number_of_ranks(tmp_path: Path) -> None:
    figures = tmp_path / "planning.json"
    command = [sys.executable, "benchmarks/planning.py", "--small", f"--output={figures}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert process.returncode == 0, process.stderr
    by_ranks = json.loads(figures.read_text())["by_ranks"]
    assert by_ranks.keys() == {"4", "64"}
    assert all("failed" not in of_ranks for of_ranks in by_ranks.values())
    assert "one rank finds its shards in ours" in process.stdout


def test_the_benchmark_of_saves_in_the_background_runs(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/async_save.py", "--mib=1", "--batch=4", "--rounds=1", f"--folder={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert process.returncode == 0, process.stderr
    assert {"ours, process, deferred", "dcp.async_save, thread"} <= {
        line[:28].strip() for line in process.stdout.splitlines()
    }


def test_the_benchmark_of_checkpoints_runs_on_one_rank_and_on_two(tmp_path: Path) -> None:
    figures = tmp_path / "checkpoints.json"
    sizes = ("--mib=48", "--rounds=1", f"--folder={tmp_path}", f"--output={figures}")
    command = [sys.executable, "benchmarks/checkpoints.py", *sizes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert process.returncode == 0, process.stderr
    found = json.loads(figures.read_text())
    assert all({"raw", "ours"} <= found[f"{ranks} ranks"][what]["ratio"].keys() for ranks in (1, 2) for what in WHAT)
    assert found["2 ranks"]["reshard"]["bytes read of those needed"]["ours"] < 1.1
