"""``CheckpointManager``: one call to save and load, tags, user content, policies, with Fabric and without."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_resume import (
    CheckpointManager,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    KeepBest,
    KeepEvery,
    KeepLast,
    ResumableDataLoader,
    ResumeCallback,
    list_checkpoints,
)
from lightning_resume.checkpoint.layout import step_name
from lightning_resume.checkpoint.manifest import read_manifest
from tests.runs import Augmented
from tests.toy_data import reseed
from tests.toy_fabric import Toy, assert_equal, fabric


class Plain:
    """A run without Lightning; ``seed`` is what it begins with, unless it is loaded."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.loader = ResumableDataLoader(Augmented(30), batch_size=4, shuffle=True, seed=1)
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "note": seed,
        }
        self.batches: Any = None
        reseed(seed)

    def train(self, steps: int) -> list[tuple[Any, ...]]:
        done = []
        self.batches = self.batches or iter(self.loader)
        for _ in range(steps):
            index, x = next(self.batches)
            loss = self.model(x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            done.append((index.tolist(), loss.item().hex(), torch.rand(()).item()))
        return done


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def steps(*numbers: int) -> list[str]:
    return [step_name(number) for number in numbers]


def small(value: float = 1.0) -> dict[str, Any]:
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, value)
    return {"model": model}


def test_one_call_brings_back_a_run_without_lightning(tmp_path: Path) -> None:
    first = Plain(1)
    first.train(3)
    CheckpointManager(tmp_path).save(first.state, step=3, user_content={"words": [1, 2]})
    whole = first.train(4)
    again, manager = Plain(2), CheckpointManager(tmp_path)
    assert manager.load(again.state) == {"words": [1, 2]}
    assert manager.loaded is not None
    assert (manager.loaded.step, again.state["note"]) == (3, 1)
    assert again.train(4) == whole


def test_one_call_brings_back_a_fabric_run_with_loaders_and_generators(tmp_path: Path) -> None:
    first = Toy(fabric(), seed=1)
    first.train(3)
    with CheckpointManager(tmp_path, fabric=first.fabric) as manager:
        manager.save(first.state, step=3, user_content="words")
        saved, whole = first.tensors(), first.train(6)
    again = Toy(fabric(), seed=2)
    with CheckpointManager(tmp_path, fabric=again.fabric) as manager:
        assert manager.load(again.state) == "words"
        assert_equal(again.tensors(), saved)
        assert again.train(6) == whole


def test_with_fabric_it_saves_folders_whatever_the_strategy_saves(tmp_path: Path) -> None:
    toy = Toy(fabric(form="file"))
    toy.train(1)
    CheckpointManager(tmp_path, fabric=toy.fabric).save(toy.state, step=1)
    assert read_manifest(tmp_path / step_name(1)).step == 1
    toy.fabric.save(tmp_path / "file.ckpt", toy.state)
    assert (tmp_path / "file.ckpt").is_file()


def test_a_fabric_whose_strategy_is_stock_is_refused() -> None:
    import lightning

    with pytest.raises(TypeError, match="ResumableDDPStrategy"):
        CheckpointManager("run", fabric=lightning.Fabric(accelerator="cpu", devices=1))


def test_the_first_start_loads_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run")
    assert manager.load({"step": 7}) is None
    assert (manager.loaded, manager.latest(), manager.list(), manager.best("loss")) == (None, None, [], None)


def test_a_part_of_the_state_is_saved_and_loaded(tmp_path: Path) -> None:
    whole, manager = Plain(1), CheckpointManager(tmp_path)
    whole.train(2)
    manager.save(whole.state, step=2)
    other = Plain(2)
    other.train(1)
    moments = other.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    drawn = torch.get_rng_state()
    manager.load({"model": other.model})
    assert torch.equal(other.model[0].weight, whole.model[0].weight)
    assert torch.equal(other.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert torch.equal(torch.get_rng_state(), drawn)
    manager.save({"model": whole.model}, step=3, filter={"model": lambda name, _: name.startswith("0.")})
    with pytest.raises(CheckpointMismatchError, match="parameter names"):
        manager.load({"model": other.model})
    manager.load({"model": other.model}, strict=False)


def test_a_tag_is_a_checkpoint_of_that_name_and_is_never_deleted(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(small(1), step=1, tag="good", user_content="tagged")
        for step in (2, 3):
            manager.save(small(step), step=step, user_content=step)
    assert names(tmp_path) == ["good", *steps(3)]
    state = small()
    assert (manager.load(state), manager.load(state, tag="good")) == (3, "tagged")
    assert state["model"].weight[0, 0] == 1
    assert [(info.tag, info.step) for info in manager.list()] == [(None, 3), ("good", 1)]
    manager.save(small(4), step=4, tag="good", user_content="newest")
    assert manager.load(state) == "newest"


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "../x", ".hidden", "step-00000001", "c:d", "a\\b"])
def test_a_tag_that_is_no_plain_name_is_refused(tmp_path: Path, tag: str) -> None:
    manager = CheckpointManager(tmp_path / "run")
    with pytest.raises(ValueError, match="plain folder name"):
        manager.save(small(), step=1, tag=tag)
    with pytest.raises(ValueError, match="plain folder name"):
        manager.load(small(), tag=tag)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_named_and_missing_is_an_error(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(small(), step=1)
    for how in ({"tag": "x"}, {"path": tmp_path / "x"}):
        with pytest.raises(CheckpointNotFoundError, match="no complete checkpoint"):
            manager.load(small(), **how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="either"):
        manager.load(small(), tag="x", path=tmp_path)


def test_policies_say_what_stays(tmp_path: Path) -> None:
    keep = KeepLast(1) | KeepBest(1, "loss") | KeepEvery(steps=4)
    with CheckpointManager(tmp_path, keep=keep) as manager:
        for step in range(1, 8):
            manager.save(small(step), step=step, metrics={"loss": abs(step - 3)})
    assert names(tmp_path) == steps(3, 4, 7)
    best = manager.best()
    assert best is not None
    assert (best.step, best.metrics) == (3, {"loss": 0.0})
    highest = manager.best("loss", "max")
    assert highest is not None
    assert highest.step == 7


def test_best_asks_by_what_where_nothing_says(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="monitor"):
        CheckpointManager(tmp_path).best()


def test_weights_that_are_not_finite_are_marked_and_never_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=KeepBest(1, "loss"))
    manager.save(small(1), step=1, metrics={"loss": 1})
    with pytest.warns(UserWarning, match=r"not finite: model\.weight"):
        manager.save(small(float("nan")), step=2, metrics={"loss": 0})
    assert read_manifest(tmp_path / step_name(2)).nonfinite == ("model.weight",)
    assert [info.finite for info in manager.list()] == [False, True]
    best = manager.best()
    assert best is not None
    assert best.step == 1
    manager.save(small(3), step=3, metrics={"loss": 2})
    manager.close()
    assert names(tmp_path) == steps(1, 3)


def test_large_finite_weights_and_buffers_of_infinity_are_no_trouble(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    nn.init.constant_(model.weight, 3e38)  # whose sum overflows
    model.register_buffer("mask", torch.full((4,), -torch.inf))
    CheckpointManager(tmp_path).save({"model": model}, step=1)
    assert read_manifest(tmp_path / step_name(1)).nonfinite == ()


def test_a_save_without_any_change_of_weights_warns(tmp_path: Path) -> None:
    manager, state = CheckpointManager(tmp_path), small(1)
    manager.save(state, step=1)
    with pytest.warns(UserWarning, match="No weight has changed between step 1 and step 2"):
        manager.save(state, step=2)
    manager.save(state, step=2, tag="again")  # no step was made
    nn.init.constant_(state["model"].bias, 5.0)
    manager.save(state, step=3)


def test_frozen_weights_may_stay_as_they_are_and_only_they(tmp_path: Path) -> None:
    manager, state = CheckpointManager(tmp_path), small(1)
    state["model"].weight.requires_grad_(False)
    manager.save(state, step=1)
    nn.init.constant_(state["model"].weight, 7.0)
    with pytest.warns(UserWarning, match="No weight has changed"):
        manager.save(state, step=2)


def test_prune_removes_what_crashed_saves_left(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=None)
    for step in (1, 2):
        manager.save(small(step), step=step)
    left = tmp_path / f".{step_name(3)}.tmp-0123456789abcdef"
    left.mkdir()
    (tmp_path / "notes").mkdir()
    assert manager.prune() == [str(left)]
    assert CheckpointManager(tmp_path, keep=1).prune() == [str(tmp_path / step_name(1))]
    assert names(tmp_path) == ["notes", *steps(2)]


def test_a_failed_delete_warns_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_resume import run_folder

    def busy(path: Any) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(small(1), step=1)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="could not be deleted yet"):  # noqa: PT031
        patch.setattr(run_folder, "delete_checkpoint", busy)
        manager.save(small(2), step=2)
        manager.close()
    assert names(tmp_path) == steps(1, 2)
    manager.save(small(3), step=3)
    manager.close()
    assert names(tmp_path) == steps(3)


def test_the_list_tells_what_the_manifests_say(tmp_path: Path) -> None:
    CheckpointManager(tmp_path).save(small(), step=5, epoch=2, metrics={"loss": 0.5}, metadata={"git": "abc"})
    (info,) = list_checkpoints(tmp_path)
    assert (info.step, info.epoch, info.metrics, info.finite, info.world_size) == (5, 2, {"loss": 0.5}, True, 1)
    assert info.bytes == sum(file.stat().st_size for file in (tmp_path / step_name(5)).iterdir()) - (
        (tmp_path / step_name(5) / "manifest.json").stat().st_size
    )
    assert read_manifest(info.path).metadata == {"git": "abc"}


def test_the_reserved_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="user_content="):
        CheckpointManager(tmp_path).save({"user_content": 1}, step=1)


@pytest.mark.parametrize("what", [{"step": True}, {"epoch": -1}, {"epoch": 1.5}, {"metrics": {"x": 10**400}}])
def test_what_no_load_would_accept_is_refused_before_anything_is_replaced(tmp_path: Path, what: dict[str, Any]) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(small(1), step=1, tag="c")
    with pytest.raises((CheckpointSaveError, OverflowError)):
        manager.save(small(2), **{"step": 2, "tag": "c"} | what)
    state = small()
    manager.load(state)
    assert state["model"].weight[0, 0] == 1


def test_metadata_comes_back_whatever_its_keys(tmp_path: Path) -> None:
    metadata: Any = {9: 1, 10: 2, "nested": {2: [1], 11: None}}
    CheckpointManager(tmp_path).save(small(1), step=1, metadata=metadata)
    assert read_manifest(tmp_path / step_name(1)).metadata == {"9": 1, "10": 2, "nested": {"2": [1], "11": None}}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantized_tensor_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    model = nn.Linear(1, 1)
    model.register_buffer("q", tensor)
    with pytest.raises(CheckpointSaveError, match="quantized"):
        CheckpointManager(tmp_path).save({"model": model}, step=1)


def test_a_save_to_a_step_that_is_being_deleted_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_resume import run_folder

    go, delete = threading.Event(), run_folder.delete_checkpoint

    def slowly(path: Any) -> None:
        assert go.wait(30)
        delete(path)

    monkeypatch.setattr(run_folder, "delete_checkpoint", slowly)
    manager = CheckpointManager(tmp_path, keep=1)
    for step in (1, 2):
        manager.save(small(step), step=step)
    timer = threading.Timer(0.2, go.set)
    timer.start()
    manager.save(small(7), step=1)
    timer.join()
    manager.close()
    state = small()
    manager.load(state)
    assert state["model"].weight[0, 0] == 7


def test_best_of_the_callback_is_by_its_policy_and_never_not_finite(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=None)
    for step, loss in ((1, 1.0), (2, 2.0)):
        manager.save(small(step), step=step, metrics={"loss": loss})
    with pytest.warns(UserWarning, match="not finite"):
        manager.save(small(float("inf")), step=3, metrics={"loss": 0.0})
    assert Path(ResumeCallback(tmp_path, keep=KeepBest(1, "loss")).best_model_path).name == step_name(1)
    assert Path(ResumeCallback(tmp_path).best_model_path).name == step_name(2)
    assert Path(ResumeCallback(tmp_path).last_model_path).name == step_name(3)


def test_weights_of_eight_bits_are_looked_at(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=True)
    CheckpointManager(tmp_path).save({"model": model}, step=1)
    with torch.no_grad():
        model.weight = nn.Parameter(torch.full((4, 4), torch.nan).to(torch.float8_e4m3fn))
    with pytest.warns(UserWarning, match="not finite"):
        CheckpointManager(tmp_path).save({"model": model}, step=2)
