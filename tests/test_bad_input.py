"""Bad input: the error names the component, both values and what to do; nothing given or saved before is changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_resume import (
    CheckpointIncompleteError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    CheckpointVersionError,
    FallBackWarning,
    ResumeCallback,
    make_resumable,
)
from tests.runs import Augmented
from tests.toy_data import BATCH, reseed
from tests.toy_fabric import Toy, assert_equal, fabric, network, position, unchanged
from tests.toy_trainer import KillAt, Points, Quiet, fit, trainer

FORMS = ("folder", "file")


def saved(path: Path, form: str = "folder", **options: Any) -> Toy:
    run = Toy(fabric("single", form), 1, **options)
    run.train(3)
    run.fabric.save(path, run.state)
    return run


def manifest(path: Path) -> Path:
    """The file that makes a folder a complete checkpoint."""
    (found,) = (file for file in path.rglob("*.json") if "version" in file.read_text())
    return found


def not_a_checkpoint(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "notes.txt").write_text("no checkpoint")


def missing(path: Path) -> None:
    shutil.rmtree(path)


def incomplete(path: Path) -> None:
    manifest(path).unlink()


def newer(path: Path) -> None:
    file = manifest(path)
    content = json.loads(file.read_text())
    (key,) = (key for key in content if "version" in key and isinstance(content[key], int))
    content[key] += 1
    file.write_text(json.dumps(content))


FOLDERS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no checkpoint": (not_a_checkpoint, CheckpointNotFoundError, "no checkpoint"),
    "missing": (missing, CheckpointNotFoundError, "no checkpoint"),
    "incomplete": (incomplete, CheckpointIncompleteError, r"(?i)manifest(.|\n)*(load|copy)"),
    "newer": (newer, CheckpointVersionError, r"(?i)version(.|\n)*(update|upgrade|newer)"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_fabric_rejects_a_folder_that_it_cannot_load(case: str, tmp_path: Path) -> None:
    spoil, error, text = FOLDERS[case]
    saved(path := tmp_path / "c")
    spoil(path)
    other = Toy(fabric(), 2)
    with unchanged(other), pytest.raises(error, match=text) as caught:
        other.fabric.load(path, other.state)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("case", FOLDERS)
def test_the_trainer_rejects_a_folder_that_it_cannot_load(case: str, tmp_path: Path) -> None:
    spoil, error, text = FOLDERS[case]
    path = trained(tmp_path)
    spoil(path)
    module = Quiet("none")
    before = [tensor.clone() for tensor in module.state_dict().values()]
    with pytest.raises(error, match=text) as caught:
        trainer(tmp_path, [ResumeCallback(tmp_path / "new")]).fit(module, ckpt_path=path)
    assert path.name in str(caught.value)
    assert_equal(list(module.state_dict().values()), before)


def trained(folder: Path, **options: Any) -> Path:
    """The checkpoint of a Trainer's run that was killed in its first epoch."""
    resume = ResumeCallback(folder / "run", every_n_train_steps=1)
    settings = {"module": lambda: Quiet("none")} | options
    fit(folder, resume=resume, callbacks=[KillAt(2)], **settings)
    return folder / "run" / "step-00000002"


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec:FutureWarning")  # pytest.warns raises it anew
def test_auto_resume_passes_an_incomplete_checkpoint_by_and_says_so(tmp_path: Path) -> None:
    incomplete(trained(tmp_path))
    module = lambda: Quiet("none")  # noqa: E731
    with pytest.warns(FallBackWarning, match="step-00000002 has lost its manifest"):
        run = fit(tmp_path, module=module, seed=2, resume=ResumeCallback(tmp_path / "run", every_n_train_steps=1))
    assert run.lines == fit(tmp_path, module=module).lines


def test_auto_resume_rejects_a_newer_version_instead_of_starting_from_an_older_checkpoint(tmp_path: Path) -> None:
    newer(trained(tmp_path))
    with pytest.raises(CheckpointVersionError, match="step-00000002"):
        fit(tmp_path, module=lambda: Quiet("none"), resume=ResumeCallback(tmp_path / "run"))


class Bigger(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))


def renamed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


MODELS: dict[str, tuple[Any, str]] = {
    "names": (
        renamed,
        r"model 'model': not the same parameter names(.|\n)*saved: .*3\.bias(.|\n)*current: .*2\.bias(.|\n)*strict",
    ),
    "shape": (
        Bigger,
        r"model 'model': not the same shape of '3\.(weight|bias)'(.|\n)*saved: .*1(.|\n)*current: .*2(.|\n)*Build",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", MODELS)
def test_fabric_rejects_another_model(case: str, form: str, tmp_path: Path) -> None:
    net, text = MODELS[case]
    saved(tmp_path / "c", form)
    other = Toy(fabric("single", form), 2, net=net)
    with unchanged(other), pytest.raises(CheckpointMismatchError, match=text):
        other.fabric.load(tmp_path / "c", other.state)


class Wide(Quiet):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__("none")
        self.net = nn.Sequential(*(layers or (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2))))


@pytest.mark.parametrize("layers", [(), (nn.Linear(4, 6),)])
def test_the_trainer_rejects_another_model(layers: tuple[Any, ...], tmp_path: Path) -> None:
    path = trained(tmp_path)
    module = Wide(*layers)
    before = [tensor.clone() for tensor in module.state_dict().values()]
    with pytest.raises((CheckpointMismatchError, RuntimeError), match=r"net\.3\.weight"):
        trainer(tmp_path, [ResumeCallback(tmp_path / "new")]).fit(module, ckpt_path=path)
    assert_equal(list(module.state_dict().values()), before)


@pytest.mark.parametrize("form", FORMS)
def test_fabric_rejects_keys_that_were_not_saved(form: str, tmp_path: Path) -> None:
    saved(tmp_path / "c", form)
    other = Toy(fabric("single", form), 2)
    other.state["teacher"] = other.fabric.setup_module(network())
    with (
        unchanged(other),
        pytest.raises(CheckpointMismatchError, match=r"keys(.|\n)*'counter'(.|\n)*'teacher'(.|\n)*strict"),
    ):
        other.fabric.load(tmp_path / "c", other.state)


@pytest.mark.parametrize("form", FORMS)
def test_fabric_returns_keys_that_were_not_asked_for(form: str, tmp_path: Path) -> None:
    saved(tmp_path / "c", form)
    other = Toy(fabric("single", form), 2)
    assert other.fabric.load(tmp_path / "c", {"model": other.model})["step"] == 3


DATASETS: dict[str, tuple[Any, str]] = {
    "length": (Augmented(31), r"loader: .*length(.|\n)*saved: +30\n +current: +31\n(.|\n)*strict"),
    "class": (Points(30), r"loader: .*fingerprint(.|\n)*saved: +Augmented\n +current: +Points\n(.|\n)*strict"),
    "tensors": (TensorDataset(torch.arange(30)), r"loader: .*fingerprint(.|\n)*TensorDataset"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", DATASETS)
def test_fabric_rejects_another_dataset(case: str, form: str, tmp_path: Path) -> None:
    dataset, text = DATASETS[case]
    saved(tmp_path / "c", form)
    other = Toy(fabric("single", form), 2, dataset=dataset)
    with unchanged(other), pytest.raises(CheckpointMismatchError, match=text):
        other.fabric.load(tmp_path / "c", other.state)


@pytest.mark.parametrize("dataset", [Points(16), Augmented(14)])
def test_the_trainer_rejects_another_dataset(dataset: Any, tmp_path: Path) -> None:
    path = trained(tmp_path)
    module = Quiet("none")
    before = [tensor.clone() for tensor in module.state_dict().values()]
    data = DataLoader(dataset, BATCH, shuffle=True)
    with pytest.raises(CheckpointMismatchError, match=r"loader: .*(length|fingerprint)(.|\n)*saved(.|\n)*current"):
        trainer(tmp_path, [ResumeCallback(tmp_path / "new")]).fit(module, data, ckpt_path=path)
    assert_equal(list(module.state_dict().values()), before)
    assert len(list((tmp_path / "run").iterdir())) > 0


def test_a_changed_sampler_seed_is_rejected(tmp_path: Path) -> None:
    def run(seed: int) -> tuple[Any, Any]:
        made = fabric()
        return made, made.setup_dataloaders(make_resumable(DataLoader(Augmented(30), 4, shuffle=True), seed=seed))

    made, loader = run(3)
    made.save(tmp_path / "c", {"loader": loader})
    again, other = run(4)
    with pytest.raises(CheckpointMismatchError, match=r"loader: not the same seed(.|\n)*saved: +3\n +current: +4\n"):
        again.load(tmp_path / "c", {"loader": other})


def test_the_trainer_rejects_a_changed_sampler_seed(tmp_path: Path) -> None:
    data = lambda seed: lambda: make_resumable(DataLoader(Points(), BATCH, shuffle=True), seed=seed)  # noqa: E731
    path = trained(tmp_path, data=data(3))
    with pytest.raises(CheckpointMismatchError, match=r"loader: not the same seed(.|\n)*saved: +3\n +current: +4\n"):
        fit(tmp_path, module=lambda: Quiet("none"), data=data(4), ckpt_path=path)


def test_shuffle_turned_off_is_rejected(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    other = Toy(fabric(), 2, shuffle=False)
    with unchanged(other), pytest.raises(CheckpointMismatchError, match=r"loader: .*(shuffle|order)"):
        other.fabric.load(tmp_path / "c", other.state)


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_without_its_model_in_state_is_saved_all_the_same(form: str, tmp_path: Path) -> None:
    run = Toy(fabric("single", form), 1)
    run.train(3)
    run.fabric.save(tmp_path / "c", {"optimizer": run.optimizer})
    other = Toy(fabric("single", form), 2)
    weights = [p.detach().clone() for p in other.model.parameters()]
    other.fabric.load(tmp_path / "c", {"optimizer": other.optimizer})
    assert_equal(list(other.model.parameters()), weights)
    assert position(other) == position(run)


@pytest.mark.parametrize("form", FORMS)
def test_another_optimizers_param_groups_are_rejected(form: str, tmp_path: Path) -> None:
    saved(tmp_path / "c", form)
    other = Toy(fabric("single", form), 2)
    one, *rest = other.model.parameters()
    groups = torch.optim.Adam([{"params": [one]}, {"params": rest}])
    other.optimizer = other.state["optimizer"] = other.fabric.setup_optimizers(groups)
    before = [p.detach().clone() for p in other.model.parameters()]
    with pytest.raises(
        CheckpointMismatchError,
        match=r"optimizer 'optimizer': not the same param_groups(.|\n)*saved: +1 gr(.|\n)*current: +2(.|\n)*Create",
    ):
        other.fabric.load(tmp_path / "c", other.state)
    assert_equal(list(other.model.parameters()), before)
    assert other.state["step"] == 0


class Grouped(Quiet):
    def configure_optimizers(self) -> Any:
        one, *rest = self.parameters()
        return torch.optim.Adam([{"params": [one]}, {"params": rest}])


def test_the_trainer_rejects_another_optimizers_param_groups(tmp_path: Path) -> None:
    path = trained(tmp_path)
    with pytest.raises(
        CheckpointMismatchError, match=r"optimizer 'optimizer_0': not the same param_groups(.|\n)*1 gr(.|\n)*2 gr"
    ):
        fit(tmp_path, module=lambda: Grouped("none"), ckpt_path=path)


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_raises_and_leaves_older_checkpoints(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path / "c", form)
    tensors = run.tensors()
    run.train(1)
    for name in ("c", "new"):
        with monkeypatch.context() as patch, unchanged(run):
            patch.setattr(os, "fsync", full_disk)
            with pytest.raises((CheckpointSaveError, OSError), match=r"No space left") as caught:
                run.fabric.save(tmp_path / name, run.state)
        assert name in str(caught.value)
    other = Toy(fabric("single", form), 2)
    other.fabric.load(tmp_path / "c", other.state)
    assert_equal(other.tensors(), tensors)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_stops_the_trainer_and_leaves_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises((CheckpointSaveError, OSError), match=r"No space left"):
            fit(tmp_path, module=lambda: Quiet("none"), resume=ResumeCallback(tmp_path / "run", max_attempts=None))
    reseed(3)
    run = fit(tmp_path, module=lambda: Quiet("none"), resume=ResumeCallback(tmp_path / "run"))
    assert run.lines == fit(tmp_path, module=lambda: Quiet("none")).lines
    assert path.name == "step-00000002"


@pytest.mark.parametrize("form", FORMS)
def test_an_unwritable_folder_raises(form: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")  # also refuses root, which permissions do not
    run = Toy(fabric("single", form), 1)
    with unchanged(run), pytest.raises((CheckpointSaveError, OSError), match="file"):
        run.fabric.save(tmp_path / "file" / "c", run.state)
    with pytest.raises((CheckpointSaveError, OSError), match="file"):
        fit(tmp_path, module=lambda: Quiet("none"), resume=ResumeCallback(tmp_path / "file" / "run"))
