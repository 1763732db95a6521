"""``consolidate`` turns a folder, ours or stock, into one file that stock torch and Lightning read; and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule

from lightning_resume.checkpoint.writer import write_checkpoint
from lightning_resume.cli import main
from lightning_resume.errors import CheckpointIncompleteError, CheckpointNotFoundError, UnsafeCheckpointError
from lightning_resume.export.consolidate import consolidate


class Net(LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 2)


class Custom:
    """A class that is on no allow-list."""


TRAINER_META = {
    "pytorch-lightning_version": "2.6.6",
    "epoch": 1,
    "global_step": 4,
    "hyper_parameters": {"width": 5},
    "loops": {},
}


def optimizer_state() -> dict[str, Any]:
    return {"state": {"layer.weight": {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1, "params": ["layer"]}]}


def save_fabric(path: Path) -> Path:
    state = {"model": {"weight": torch.ones(2, 3)}, "optimizer": optimizer_state()}
    write_checkpoint(path, state=state, leaves={"resume.loader": b"x"}, meta={"step": 4, "lightning_resume": {"a": 1}})
    return path


def save_trainer(path: Path, module: Net, *, name: str = "state_dict") -> Path:
    state = {
        name: module.state_dict(),
        "optimizer_0": optimizer_state(),
        "optimizer_10": {"last": 1},
        "optimizer_2": {},
    }
    state["optimizer_2"] = {"second": 1}
    write_checkpoint(path, state=state, leaves={}, meta=TRAINER_META)
    return path


def test_a_fabric_checkpoint_keeps_the_users_names(tmp_path: Path) -> None:
    file = consolidate(save_fabric(tmp_path / "step-00000004"))
    content = torch.load(file, weights_only=True)
    assert file == tmp_path / "step-00000004.consolidated"
    assert list(content) == ["model", "optimizer", "step"]
    assert torch.equal(content["model"]["weight"], torch.ones(2, 3))
    assert content["optimizer"]["param_groups"] == optimizer_state()["param_groups"]


@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_load_from_checkpoint_reads_a_trainer_checkpoint(tmp_path: Path, name: str) -> None:
    module = Net(width=5)
    file = consolidate(save_trainer(tmp_path / "c", module, name=name), tmp_path / "out" / "c.ckpt")
    loaded = Net.load_from_checkpoint(file, map_location="cpu")
    assert loaded.hparams.width == 5
    assert torch.equal(loaded.layer.weight, module.layer.weight)


def test_optimizer_states_become_a_list_in_order(tmp_path: Path) -> None:
    content = torch.load(consolidate(save_trainer(tmp_path / "c", Net())), weights_only=True)
    assert content["optimizer_states"][1:] == [{"second": 1}, {"last": 1}]
    assert content["optimizer_states"][0]["state"]["layer.weight"] == {"step": torch.tensor(4.0)}
    assert content["global_step"] == 4
    assert "optimizer_0" not in content


def test_a_stock_sharded_checkpoint_is_consolidated(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="assuming the intent is to save in a single process"):
        dcp.save({"model": Net().state_dict()}, checkpoint_id=str(tmp_path / "c"))
    torch.save(TRAINER_META, tmp_path / "c" / "meta.pt")
    assert list(torch.load(consolidate(tmp_path / "c"), weights_only=True))[:1] == ["state_dict"]


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(FileExistsError, match="choose another"):
        consolidate(save_fabric(tmp_path / "c"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save_fabric(tmp_path / "c")
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointIncompleteError):
        consolidate(path)
    with pytest.raises(CheckpointNotFoundError):
        consolidate(tmp_path)
    assert os.listdir(tmp_path) == ["c"]


def test_objects_outside_the_allow_list_need_trust(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", state={"w": torch.ones(1)}, leaves={}, meta={"custom": Custom()})
    with pytest.raises(UnsafeCheckpointError, match=r"Custom.*trust=True"):
        consolidate(tmp_path / "c")
    content = torch.load(consolidate(tmp_path / "c", trust=True), weights_only=False)
    assert isinstance(content["custom"], Custom)


def test_the_command_prints_the_file_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_fabric(tmp_path / "c")
    assert main(["consolidate", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}.consolidated\n"
    assert main(["consolidate", str(path), "--output", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(tmp_path / "out")}


def test_the_command_fails_with_one_message_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_resume", "consolidate", str(tmp_path / "absent")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("lightning-resume: There is no checkpoint folder at ")
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""


def test_the_command_reports_an_existing_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_fabric(tmp_path / "c")
    (tmp_path / "c.consolidated").touch()
    assert main(["consolidate", str(path)]) == 1
    assert "exists" in capsys.readouterr().err
