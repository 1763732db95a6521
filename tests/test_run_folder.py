"""Which checkpoint a run goes on from: the newest that is whole and does not crash it, on all ranks the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_resume import (
    CheckpointCorruptError,
    CheckpointManager,
    CheckpointMismatchError,
    CheckpointSaveError,
    FallBackWarning,
    ReplicaMismatchError,
    ResumeCallback,
    ResumeWarning,
)
from lightning_resume.checkpoint.indexed import IndexedContent
from lightning_resume.checkpoint.layout import step_name
from lightning_resume.checkpoint.reader import CheckpointReader
from tests.harness import Zygote, zygote
from tests.toy_data import reseed
from tests.toy_fabric import Toy, assert_equal, fabric, launch
from tests.toy_trainer import KillAt, Quiet, assert_same, fit


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


def damage(checkpoint: Path, name: str = "__0_0.distcp") -> None:
    """Flips a bit in the middle of the file ``name``, of shards in the first tensor."""
    content = bytearray((checkpoint / name).read_bytes())
    content[_first_tensor(checkpoint, name) if name.endswith(".distcp") else len(content) // 2] ^= 4
    (checkpoint / name).write_bytes(content)


def _first_tensor(checkpoint: Path, name: str) -> int:
    """Where its data begin: not every byte of a file of shards is one that a load reads."""
    content = CheckpointReader(checkpoint)._content
    assert isinstance(content, IndexedContent)
    placed = [one for key in content.keys for one in content._index.items(key)]
    mine = [one.item for one in placed if content._index.files[one.file] == name]
    return min(item.offset + item.head for item in mine if item.head and item.data)


def saved(root: Path, steps: int, **options: Any) -> Toy:
    """A run that was saved after every step, the position after each known by its ``step``."""
    toy = Toy(fabric(**options))
    with CheckpointManager(root, fabric=toy.fabric, keep=None) as manager:
        for step in range(1, steps + 1):
            toy.train(1)
            manager.save(toy.state, step=step)
    return toy


def callback(folder: Path, **options: Any) -> ResumeCallback:
    return ResumeCallback(folder / "run", every_n_train_steps=1, keep=None, **options)


def module() -> Quiet:
    return Quiet("none")


# --- damaged checkpoints ---


@pytest.mark.parametrize("name", ["__0_0.distcp", ".index", "meta.pt", "manifest.json"])
def test_the_manager_falls_back_from_a_damaged_checkpoint(tmp_path: Path, name: str) -> None:
    saved(tmp_path, 3)
    damage(tmp_path / step_name(3), name)
    whole = Toy(fabric())
    whole.train(2)
    tensors, rest = whole.tensors(), whole.train(5)
    again = Toy(fabric(), seed=2)
    manager = CheckpointManager(tmp_path, fabric=again.fabric)
    with pytest.warns(FallBackWarning, match=rf"{step_name(3)}.* damaged"):
        manager.load(again.state)
    assert manager.loaded is not None
    assert (manager.loaded.step, again.state["step"]) == (2, 2)
    assert_equal(again.tensors(), tensors)
    assert again.train(5) == rest


def test_a_checkpoint_named_explicitly_never_falls_back(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    damage(tmp_path / step_name(2))
    again = Toy(fabric(), seed=2)
    with pytest.raises(CheckpointCorruptError, match=rf"{step_name(2)} is damaged: file __0_0(.|\n)*filled in part"):
        CheckpointManager(tmp_path, fabric=again.fabric).load(again.state, path=tmp_path / step_name(2))
    with pytest.raises(CheckpointCorruptError, match="filled in part"):
        again.fabric.load(tmp_path / step_name(2), again.state)


def test_a_fabric_that_loads_a_run_folder_falls_back(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    damage(tmp_path / step_name(2))
    again = Toy(fabric(), seed=2)
    with pytest.warns(FallBackWarning, match="Going back to"):
        again.fabric.load(tmp_path, again.state)
    assert again.state["step"] == 1


def test_verify_first_changes_nothing_when_it_fails(tmp_path: Path) -> None:
    from lightning_resume import ResumableSingleDeviceStrategy

    saved(tmp_path, 1)
    damage(tmp_path / step_name(1))
    again = Toy(fabric(strategy=ResumableSingleDeviceStrategy(verify="first")), seed=2)
    tensors = again.tensors()
    with pytest.raises(CheckpointCorruptError, match="item") as caught:
        again.fabric.load(tmp_path / step_name(1), again.state)
    assert "filled in part" not in str(caught.value)
    assert_equal(again.tensors(), tensors)


def test_nothing_is_started_afresh_where_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    damage(tmp_path / step_name(1))
    damage(tmp_path / step_name(2))
    again = Toy(fabric(), seed=2)
    manager = CheckpointManager(tmp_path, fabric=again.fabric)
    with pytest.warns(FallBackWarning), pytest.raises(CheckpointCorruptError, match="None of 2 checkpoints"):
        manager.load(again.state)
    for step in (1, 2):
        damage(tmp_path / step_name(step), "manifest.json")
    with pytest.warns(FallBackWarning), pytest.raises(CheckpointCorruptError, match="start a fresh run"):
        manager.load(again.state)


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec:FutureWarning")  # pytest.warns raises it anew
@pytest.mark.parametrize("name", ["__0_0.distcp", ".index", "meta.pt", "manifest.json"])
def test_the_trainer_falls_back_and_is_the_same_run(tmp_path: Path, name: str) -> None:
    whole = fit(tmp_path / "whole", module=module)
    fit(tmp_path, module=module, resume=callback(tmp_path), callbacks=[KillAt(2)])
    damage(tmp_path / "run" / step_name(2), name)
    with pytest.warns(FallBackWarning, match=step_name(2)):
        again = fit(tmp_path, module=module, seed=2, resume=callback(tmp_path))
    assert_same(again, whole)


def test_the_trainer_does_not_fall_back_from_a_path_that_it_was_given(tmp_path: Path) -> None:
    fit(tmp_path, module=module, resume=callback(tmp_path), callbacks=[KillAt(2)])
    damage(tmp_path / "run" / step_name(2))
    with pytest.raises(CheckpointCorruptError, match=step_name(2)):
        fit(tmp_path, module=module, ckpt_path=tmp_path / "run" / step_name(2))


# --- checkpoints that crash the run ---


def attempts(root: Path) -> dict[str, int]:
    return {name: entry["count"] for name, entry in json.loads((root / "attempts.json").read_text()).items()}


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec:FutureWarning")  # pytest.warns raises it anew
def test_a_checkpoint_that_crashed_the_run_twice_is_set_aside(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", module=module)
    fit(tmp_path, module=module, resume=callback(tmp_path), callbacks=[KillAt(2)])
    for count in (1, 2):
        fit(tmp_path, module=module, seed=5, resume=callback(tmp_path), callbacks=[KillAt(0)])
        assert attempts(tmp_path / "run") == {step_name(2): count}
    with pytest.warns(FallBackWarning, match=rf"{step_name(2)} is set aside: .* 2 times"):
        again = fit(tmp_path, module=module, seed=2, resume=callback(tmp_path))
    assert_same(again, whole)
    assert step_name(1) not in attempts(tmp_path / "run")


def test_a_crash_while_restoring_counts(tmp_path: Path) -> None:
    saved(tmp_path, 2)

    class Dies:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            raise KeyError("as if the process had died here")

    for _ in range(2):
        again = Toy(fabric(), seed=2)
        again.state["counter"] = Dies()
        with pytest.raises(KeyError):
            CheckpointManager(tmp_path, fabric=again.fabric).load(again.state)
    again = Toy(fabric(), seed=2)
    manager = CheckpointManager(tmp_path, fabric=again.fabric)
    with pytest.warns(FallBackWarning, match="set aside"):
        manager.load(again.state)
    assert again.state["step"] == 1


def test_some_good_steps_take_the_attempt_back(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for steps, left in ((9, {step_name(1): 1}), (10, {})):
        again = Toy(fabric(), seed=2)
        CheckpointManager(tmp_path, fabric=again.fabric).load(again.state)
        again.train(steps)
        assert attempts(tmp_path) == left
        (tmp_path / "attempts.json").unlink()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(0), CheckpointSaveError("full")])
def test_what_says_nothing_against_the_checkpoint_is_no_crash(tmp_path: Path, error: BaseException) -> None:
    saved(tmp_path, 1)
    again = Toy(fabric(), seed=2)
    manager = CheckpointManager(tmp_path, fabric=again.fabric)
    manager.load(again.state)
    assert attempts(tmp_path) == {step_name(1): 1}
    with pytest.raises(type(error)), manager:
        raise error
    assert attempts(tmp_path) == {}


@pytest.mark.parametrize("error", [ValueError("nan"), SystemExit(1)])
def test_a_crash_counts_also_where_the_manager_is_closed(tmp_path: Path, error: BaseException) -> None:
    saved(tmp_path, 1)

    def run(close: bool) -> None:
        again = Toy(fabric(), seed=2)
        manager = CheckpointManager(tmp_path, fabric=again.fabric)
        try:
            manager.load(again.state)
            raise error
        finally:
            if close:
                manager.close()

    for count in (1, 2):
        with pytest.raises(type(error)):
            run(close=count == 1)
        assert attempts(tmp_path) == {step_name(1): count}


def test_a_short_run_that_ends_well_and_an_evaluation_are_no_crashes(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    for _ in range(3):
        again = Toy(fabric(), seed=2)
        manager = CheckpointManager(tmp_path, fabric=again.fabric)
        manager.load(again.state)
        again.train(1)
        manager.close()
    for _ in range(3):
        CheckpointManager(tmp_path, fabric=again.fabric).load({"model": again.model})
    other = Toy(fabric(), seed=2, net=lambda: torch.nn.Linear(3, 1))  # type: ignore[arg-type,return-value]
    for _ in range(3):
        with pytest.raises(CheckpointMismatchError):
            CheckpointManager(tmp_path, fabric=other.fabric).load(other.state)
    assert attempts(tmp_path) == {}


def test_folders_of_other_tools_are_not_taken_for_checkpoints(tmp_path: Path) -> None:
    for name, content in (("web", '{"name": "app"}'), ("newer", '{"format_version": 2}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(content)
    again = Toy(fabric(), seed=2)
    manager = CheckpointManager(tmp_path, fabric=again.fabric)
    assert (manager.load(again.state), manager.loaded, manager.list()) == (None, None, [])
    saved(tmp_path, 1)
    manager.load(again.state)
    assert again.state["step"] == 1


def test_where_every_checkpoint_crashes_the_run_the_newest_is_tried_again(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for _ in range(2):
        again = Toy(fabric(), seed=2)
        CheckpointManager(tmp_path, fabric=again.fabric).load(again.state)
    with pytest.warns(ResumeWarning, match="may not be the checkpoints"):
        CheckpointManager(tmp_path, fabric=again.fabric).load(again.state)


def test_a_newer_save_of_the_same_name_starts_with_no_attempts(tmp_path: Path) -> None:
    toy = saved(tmp_path, 2)
    for _ in range(2):
        again = Toy(fabric(), seed=2)
        CheckpointManager(tmp_path, fabric=again.fabric).load(again.state)
    manager = CheckpointManager(tmp_path, fabric=toy.fabric)
    manager.save(toy.state, step=2)
    manager.load(toy.state)
    assert manager.loaded is not None
    assert manager.loaded.step == 2


def test_an_attempts_file_that_is_not_understood_is_ignored_with_a_warning(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for content in ("{", "[]", '{"step-00000001": 3}', '{"step-00000001": {"count": "x"}}'):
        (tmp_path / "attempts.json").write_text(content)
        again = Toy(fabric(), seed=2)
        with pytest.warns(ResumeWarning, match="not understood"):
            CheckpointManager(tmp_path, fabric=again.fabric).load(again.state)
        assert again.state["step"] == 1


# --- several ranks ---


def check_ranks_fall_back_together(folder: Path, *, name: str) -> None:
    """Damage in the part that only one rank reads sends all ranks back, and a later run goes on exactly."""
    import warnings

    from lightning_resume import _distributed

    whole = saved(folder / "run", 3, name=name)
    files = sorted((folder / "run" / step_name(3)).glob("*.distcp"))
    if _distributed.on_rank_zero("damaging", lambda: True) and whole.fabric.global_rank == 0:
        damage(folder / "run" / step_name(3), files[-1].name)
    whole.fabric.barrier()
    again = Toy(fabric(name), seed=2)
    manager = CheckpointManager(folder / "run", fabric=again.fabric)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager.load(again.state)
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, FallBackWarning)]
    assert (again.state["step"], len(texts)) == (2, 1 if again.fabric.global_rank == 0 else 0)
    reseed(0)
    expected = Toy(fabric(name))
    expected.train(2)
    manager.load(again.state, path=folder / "run" / step_name(2))
    assert_equal(again.tensors(), expected.tensors())
    with pytest.raises(CheckpointCorruptError, match=step_name(3)):
        again.fabric.load(folder / "run" / step_name(3), again.state)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "mp"])
def test_all_ranks_fall_back_together(ranks: Zygote, tmp_path: Path, name: str) -> None:
    launch(ranks, check_ranks_fall_back_together, tmp_path, name=name)


def check_replicas_are_compared(folder: Path) -> None:
    import torch

    from lightning_resume import ResumableDDPStrategy

    for how in ("quick", "full"):
        toy = Toy(fabric(strategy=ResumableDDPStrategy(validate=how)))
        toy.train(2)
        toy.fabric.save(folder / how, toy.state)
        if toy.fabric.global_rank == 1:
            with torch.no_grad():
                toy.model.module[3].bias += 1e-7
        with pytest.raises(
            ReplicaMismatchError, match=r"1 tensors.*\n  model\.3\.bias: ranks \[0\]: \w{32}; ranks \[1\]"
        ):
            toy.fabric.save(folder / how, toy.state)
        again = Toy(fabric("ddp"), seed=2)
        again.fabric.load(folder / how, again.state)
        assert again.state["step"] == 2
        optimizer = toy.optimizer.optimizer
        with torch.no_grad():
            toy.model.module[3].bias.fill_(0.5)
            if toy.fabric.global_rank == 1:
                optimizer.state[toy.model.module[0].weight]["exp_avg"][0, 0] = 9
        with pytest.raises(ReplicaMismatchError, match=r"optimizer\.state\.0\.weight\.exp_avg"):
            CheckpointManager(folder / "run", fabric=toy.fabric, validate=how).save(toy.state, step=3)
        assert not list((folder / "run").glob("step-*"))


def test_replicas_that_differ_are_named_before_anything_is_saved(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_replicas_are_compared, tmp_path)


def test_a_checkpoint_that_does_not_fit_is_no_crash_of_the_trainer(tmp_path: Path) -> None:
    fit(tmp_path, module=module, resume=callback(tmp_path), callbacks=[KillAt(2)])

    class Wider(Quiet):
        def __init__(self) -> None:
            super().__init__("none")
            self.more = torch.nn.Linear(2, 2)

    for _ in range(3):
        with pytest.raises(CheckpointMismatchError):
            fit(tmp_path, module=Wider, resume=callback(tmp_path))
    assert attempts(tmp_path / "run") == {}
