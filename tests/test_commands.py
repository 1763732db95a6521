"""The commands ``list``, ``verify`` and ``prune``: each prints what one public function returns."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lightning_resume import CheckpointManager, list_checkpoints
from lightning_resume.checkpoint.layout import step_name
from lightning_resume.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints, the second of them best by loss and the third by accuracy, and a tag."""
    manager = CheckpointManager(tmp_path / "run", keep=None)
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), start=1):
        model = torch.nn.Linear(2, 1)
        metrics = {"loss": loss, "accuracy": -abs(step - 3.0)}
        manager.save({"model": model}, step=step, metrics=metrics)
    manager.save({"model": torch.nn.Linear(2, 1)}, step=4, tag="good")
    return tmp_path / "run"


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_list_prints_the_checkpoints_newest_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "list", run).splitlines()
    assert [line.split()[0] for line in lines] == [str(run / name) for name in ("good", *map(step_name, (4, 3, 2, 1)))]
    assert "loss=1" in lines[3]
    printed = json.loads(output(capsys, "list", run, "--json"))
    assert [entry["step"] for entry in printed] == [4, 4, 3, 2, 1]
    assert printed[3]["metrics"] == {"loss": 1.0, "accuracy": -1.0}


def test_list_of_a_folder_without_checkpoints_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert output(capsys, "list", tmp_path / "absent") == ""
    assert json.loads(output(capsys, "list", tmp_path, "--json")) == []


def test_list_marks_weights_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, torch.nan)
    with pytest.warns(UserWarning, match="not finite"):
        CheckpointManager(tmp_path).save({"model": model}, step=1)
    assert "NOT FINITE" in output(capsys, "list", tmp_path)


def test_verify_says_that_a_checkpoint_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{run / step_name(2)} is whole: 5 files" in output(capsys, "verify", run / step_name(2))
    assert json.loads(output(capsys, "verify", run / step_name(2), "--json"))["files"] == 5


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / "meta.pt").unlink(), r"file meta\.pt: expected the file, found nothing"),
        (lambda folder: os.truncate(folder / "meta.pt", 7), r"file meta\.pt: expected \d+ bytes, found 7 bytes"),
        (lambda folder: (folder / "__7_0.distcp").touch(), r"file __7_0\.distcp: expected no file of this name"),
        (lambda folder: (folder / "manifest.json").unlink(), "has lost its manifest|not saved by lightning-resume"),
        (lambda folder: os.replace(folder.parent / "good" / "__0_0.distcp", folder / "__0_0.distcp"), "item 'model."),
    ],
    ids=["missing", "truncated", "foreign", "no manifest", "of another checkpoint"],
)
def test_verify_names_what_is_wrong(run: Path, capsys: pytest.CaptureFixture[str], harm: object, told: str) -> None:
    import re

    harm(run / step_name(2))  # type: ignore[operator]
    assert main(["verify", str(run / step_name(2))]) == 1
    assert re.search(told, capsys.readouterr().err)


def test_verify_of_a_run_folder_names_its_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 1
    assert "Name one of its checkpoints, newest first" in capsys.readouterr().err


def test_verify_shows_a_bar_where_it_is_asked_to(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_resume import verify

    verify(run / step_name(1), progress=True)
    assert "100%" in capsys.readouterr().err


def test_prune_removes_leftovers_and_nothing_else_by_default(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = run / f".{step_name(9)}.tmp-0123456789abcdef"
    left.mkdir()
    assert output(capsys, "prune", run, "--dry-run") == f"{left}\n"
    assert left.exists()
    assert output(capsys, "prune", run) == f"{left}\n"
    assert len(list_checkpoints(run)) == 5
    assert json.loads(output(capsys, "prune", run, "--json")) == {"deleted": [], "dry_run": False}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--keep-last", "1"], [4]),
        (["--keep-best", "1:loss"], [2, 4]),
        (["--keep-best", "1:accuracy:max"], [3, 4]),
        (["--keep-every", "2"], [2, 4]),
        (["--keep-last", "2", "--keep-best", "1:loss:min"], [2, 3, 4]),
    ],
)
def test_prune_keeps_what_it_is_told_to(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], left: list[int]
) -> None:
    deleted = output(capsys, "prune", run, *options).splitlines()
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["good", *map(step_name, left)]
    assert [Path(path).name for path in deleted] == [step_name(step) for step in (1, 2, 3, 4) if step not in left]


@pytest.mark.parametrize("options", [["--keep-last", "0"], ["--keep-best", "loss"], ["--keep-best", "0:loss"]])
def test_prune_refuses_what_makes_no_sense(run: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert main(["prune", str(run), *options]) == 1
    assert "pass" in capsys.readouterr().err
    assert len(list_checkpoints(run)) == 5
