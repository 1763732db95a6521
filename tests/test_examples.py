"""Runs the examples as a user does, in processes of their own, and checks what they say."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SECONDS = 280


def run_example(script: str, *options: object, folder: Path) -> str:
    """Returns what ``script`` prints."""
    with started(script, *options, folder=folder) as process:
        output, _ = process.communicate(timeout=SECONDS)
    # a gloo process may abort while its interpreter exits, with its work done
    assert process.returncode in (0, -signal.SIGABRT), output
    return output


def kill_example(script: str, *options: object, after: str, folder: Path) -> str:
    """Kills ``script`` as soon as it prints a line that begins with ``after``; returns what it printed."""
    with started(script, *options, folder=folder) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(after):
                return "".join(lines)
    raise AssertionError(f"No line began with {after!r}:\n{''.join(lines)}")


@contextlib.contextmanager
def started(script: str, *options: object, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def losses(output: str) -> dict[int, str]:
    """By step, the last loss printed."""
    found = re.findall(r"^(?:step|iteration) (\d+) loss (\S+)$", output, re.MULTILINE)
    return {int(step): loss for step, loss in found}


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("fabric_train.py", ("--devices", 2, "--strategy", "model_parallel")),
        ("trainer_train.py", ("--devices", 1, "--strategy", "auto")),
    ],
)
def test_a_killed_example_goes_on_as_the_same_run(script: str, options: tuple[object, ...], tmp_path: Path) -> None:
    options = (*options, "--steps", 12, "--save-every", 4)
    whole = losses(run_example(script, *options, "--run", "whole", folder=tmp_path))
    killed = losses(kill_example(script, *options, "--run", "killed", after="step 7", folder=tmp_path))
    resumed = losses(run_example(script, *options, "--run", "killed", folder=tmp_path))
    assert list(whole) == list(range(1, 13))
    assert min(resumed) == 5
    assert killed | resumed == whole


def test_the_corpus_holds_the_sources_whole_in_pieces_that_are_short_enough(tmp_path: Path) -> None:
    sizes = ("--megabytes", 0.5, "--row-bytes", 1000, "--file-megabytes", 0.1)
    run_example("corpus.py", "corpus", *sizes, folder=tmp_path)
    table = pq.read_table(tmp_path / "corpus")
    texts: dict[str, str] = {}
    for path, text in zip(table["path"].to_pylist(), table["text"].to_pylist(), strict=True):
        texts[path] = texts.get(path, "") + text
    assert table["id"].to_pylist() == list(range(len(table)))
    assert all(0 < len(text.encode()) <= 1000 for text in table["text"].to_pylist())
    assert sum(len(text.encode()) for text in texts.values()) == pytest.approx(0.5e6, abs=1000)
    stdlib = Path(sysconfig.get_paths()["stdlib"]).resolve()
    whole = list(texts)[:-1]  # the last one is cut off where it was enough
    assert len(whole) > 5
    assert [texts[path] for path in whole] == [read(stdlib / path) for path in whole]


def read(source: Path) -> str:
    return source.read_text(encoding="utf-8", errors="replace")


def test_a_corpus_is_not_written_into_another(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine.parquet").touch()
    with started("corpus.py", "corpus", "--megabytes", 0.1, folder=tmp_path) as process:
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "There are parquet files in corpus. Remove them, or name another folder." in output


def test_the_large_example_goes_on_with_another_number_of_devices(tmp_path: Path) -> None:
    options = ("--small", "--steps", 3)
    first = run_example("transformer_1b.py", *options, "--devices", 2, folder=tmp_path)
    second = run_example("transformer_1b.py", *options, "--devices", 1, folder=tmp_path)
    assert list(losses(first)) == [1, 2, 3]
    assert "__0_0.distcp, __1_0.distcp, manifest.json, meta.pt" in first
    assert "Loaded iteration 3" in second
    assert second.count("Saved in") == 2  # after the fifth, and at the end
    assert list(losses(second)) == [4, 5, 6]


def test_the_demo_proves_the_run_the_same_and_would_notice_if_it_were_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run_example("demo.py", "--quick", "--output", "out", folder=tmp_path)
    assert "The resumed run is the same run." in output
    assert re.findall(r"^(yes|NO) ", output, re.MULTILINE) == ["yes"] * 10
    assert (tmp_path / "out" / "loss.png").stat().st_size > 10_000

    demo = demo_module(monkeypatch)
    plan = demo.Plan(folder=tmp_path / "out", steps_per_epoch=12, save_every=5, kill_after=0)
    change_one_bit_of_a_loss(tmp_path / "out" / "resumed.rank1.jsonl")
    proof = demo.Proof()
    demo.compare(plan, proof)
    assert proof.failed == ["the same losses, to the last bit"]


def demo_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("demo", "byte_lm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("demo")


def change_one_bit_of_a_loss(journal: Path) -> None:
    lines = journal.read_text().splitlines()
    record = json.loads(lines[-1])
    record["loss"] = (float.fromhex(record["loss"]) * (1 + 2**-52)).hex()
    journal.write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")
