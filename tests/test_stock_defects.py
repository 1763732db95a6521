"""Each defect of stock Lightning's resume is absent here: one test each, some of which show the stock one beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_resume import CheckpointSaveError, ResumeCallback, UnsafeCheckpointError
from tests.harness import Zygote, zygote
from tests.runs import CPUFSDPStrategy, shard
from tests.toy_data import BATCH, Noisy, Stateful, reseed
from tests.toy_fabric import Toy, assert_equal, fabric, launch
from tests.toy_trainer import Journal, Killed, Points, Quiet, Saver, assert_same, every_step, files, fit, trainer

BATCHES = 4  # of one epoch of 14 samples


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


class Samples(L.Callback):
    """Notes the samples of each batch, and ends the run at batch number ``kill``."""

    def __init__(self, kill: int = 10**6) -> None:
        self.seen: list[Any] = []
        self.kill = kill

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if len(self.seen) == self.kill:
            raise Killed
        self.seen.append((trainer.current_epoch, batch[0].tolist()))


def samples(
    folder: Path, *, ours: bool = True, kill: int = 10**6, seed: int = 1, path: Any = None, **options: Any
) -> list[Any]:
    """The samples of a run with or without our callback, which saves every step."""
    reseed(seed)
    module, data = options.pop("module", Quiet)(), options.pop("data", lambda: None)()
    own = [ResumeCallback(folder / "run", every_n_train_steps=1, keep=None)] if ours else []
    noted = Samples(kill)
    made = trainer(folder, [noted, *own], enable_checkpointing=True, **options)
    with contextlib.suppress(Killed):
        made.fit(module, data, ckpt_path=path)
    return noted.seen


def in_two_parts(folder: Path, kill: int, **options: Any) -> tuple[list[Any], list[Any]]:
    """The samples of a run that was killed after ``kill`` batches and went on by itself; those of a whole run."""
    whole = samples(folder / "whole", **options)
    parts = samples(folder / "parts", kill=kill, **options)
    return parts + samples(folder / "parts", seed=2, **options), whole


def stock_in_two_parts(folder: Path, kill: int, **options: Any) -> tuple[list[Any], list[Any]]:
    """The same without us: what stock Lightning does."""
    whole = samples(folder / "whole", ours=False, **options)
    saver = lambda: [Saver(folder / "files", "on_train_batch_end")]  # noqa: E731
    seen = []
    for number, path in enumerate((None, folder / f"files/{kill - 1:03}.ckpt")):
        reseed(number + 1)
        noted = Samples(10**6 if path else kill)
        made = trainer(folder, [noted, *([] if path else saver())], **{k: v for k, v in options.items() if k != "data"})
        with contextlib.suppress(Killed):
            made.fit(Quiet(), options.get("data", lambda: None)(), ckpt_path=path)
        seen += noted.seen
    return seen, whole


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_an_epoch_does_not_restart_at_its_first_sample(tmp_path: Path) -> None:
    resumed, whole = in_two_parts(tmp_path, kill=2)
    assert resumed == whole
    stock, whole = stock_in_two_parts(tmp_path / "stock", kill=2)
    assert stock != whole


@pytest.mark.parametrize("kill", [2, BATCHES, BATCHES + 1])
def test_with_workers_the_resumed_epoch_has_its_own_order_also_from_its_end(kill: int, tmp_path: Path) -> None:
    data = lambda: DataLoader(Points(), BATCH, shuffle=True, num_workers=2)  # noqa: E731
    resumed, whole = in_two_parts(tmp_path, kill=kill, data=data)
    assert resumed == whole
    assert [ids for epoch, ids in resumed if epoch == 1] != [ids for epoch, ids in resumed if epoch == 0]


def test_an_unsized_stateful_loader_loses_no_batch_at_any_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": lambda: StatefulDataLoader(Floats(), BATCH), "max_epochs": 1}
    whole = samples(tmp_path / "whole", **options)
    parts: list[Any] = []
    for number in range(BATCHES):
        parts += samples(tmp_path / "parts", kill=1, seed=number + 1, **options)
    assert parts == whole
    assert [i for _, ids in whole for i in ids] == list(range(14))


class Floats(Stateful):
    def _items(self) -> Iterator[Any]:
        for index, value in super()._items():
            yield index, value.float() * torch.ones(4)


@pytest.mark.parametrize("kill", [1, 3, BATCHES, 6])
def test_random_numbers_go_on(kill: int, tmp_path: Path) -> None:
    whole = fit(tmp_path, module=Quiet, callbacks=[Saver(tmp_path / "files", "on_train_batch_end")])
    path = files(tmp_path / "files")[kill - 1]
    assert_same(
        fit(tmp_path, module=Quiet, seed=2, ckpt_path=path), whole, kill
    )  # dropout, noise and draws of the journal


@pytest.mark.filterwarnings("ignore:This checkpoint is saved inside a gradient accumulation window")
def test_gradients_of_an_open_accumulation_window_are_not_lost(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "module": lambda: Quiet("none", length=24)}
    whole = fit(tmp_path, **options)
    fit(tmp_path, callbacks=[Saver(tmp_path / "files", "on_train_batch_end")], **options)
    run = fit(tmp_path, seed=2, ckpt_path=tmp_path / "files/002.ckpt", **options)
    assert sorted(run.state) == sorted(whole.state)
    assert all(torch.equal(tensor, whole.state[name]) for name, tensor in run.state.items())


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_start", "on_validation_end"])
def test_a_validation_due_at_the_checkpoints_batch_is_done_once(hook: str, tmp_path: Path) -> None:
    whole = fit(tmp_path, callbacks=[Saver(tmp_path / "files", hook)], val_check_interval=2)
    number = 1 if hook == "on_train_batch_end" else 0  # the checkpoint in or just before the first validation
    path = tmp_path / f"files/{number:03}.ckpt"
    run = fit(tmp_path, seed=2, callbacks=[Saver(tmp_path / "again", hook)], val_check_interval=2, ckpt_path=path)
    assert sum(line.startswith("validated 2 ") for line in run.lines) == 1
    assert run.lines == whole.lines


class Estimating(Quiet):
    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 2 * BATCHES
        return super().configure_optimizers()


def test_estimated_stepping_batches_in_configure_optimizers_does_not_drop_the_loaders_state(tmp_path: Path) -> None:
    resumed, whole = in_two_parts(tmp_path, kill=2, module=Estimating)
    assert resumed == whole
    data = lambda: StatefulDataLoader(Points(), BATCH)  # noqa: E731
    resumed, whole = in_two_parts(tmp_path / "stateful", kill=2, module=Estimating, data=data)
    assert resumed == whole


def test_progress_counts_in_batches_of_the_new_size(tmp_path: Path) -> None:
    data = lambda size: lambda: DataLoader(Points(16), size, shuffle=True)  # noqa: E731
    whole = samples(tmp_path / "whole", data=data(4), max_epochs=1)
    parts = samples(tmp_path / "parts", kill=2, data=data(4), max_epochs=1)
    parts += samples(tmp_path / "parts", seed=2, data=data(2), max_epochs=1)
    assert [len(ids) for _, ids in parts] == [4, 4, 2, 2, 2, 2]
    assert [i for _, ids in parts for i in ids] == [i for _, ids in whole for i in ids]


class Odd:
    """On no allow-list."""


class Silent(Quiet):
    """Logs nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)


class Holder(Silent):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["odd"] = Odd()


def check_weights_only(folder: Path, *, name: str) -> None:
    """``fit(weights_only=...)`` counts: by default an unknown class is refused, and with False it is loaded."""
    torch.serialization.clear_safe_globals()

    def run(number: int, **arguments: Any) -> Any:
        made = sharded_trainer(folder, name, [ResumeCallback(folder / "run", resume="never")], max_epochs=number)
        made.fit(Sharded(name), **arguments)
        return made

    made = run(1)
    for path in (folder / "saved", next((folder / "run").glob("step-*"))):
        if path.name == "saved":
            made.save_checkpoint(path)
        with pytest.raises(UnsafeCheckpointError, match=r"Odd(.|\n)*weights_only=False"):
            run(2, ckpt_path=path)
        assert run(2, ckpt_path=path, weights_only=False).current_epoch == 2


class Sharded(Holder):
    """Under FSDP2."""

    def __init__(self, name: str) -> None:
        super().__init__("none")
        self.name = name

    def configure_model(self) -> None:
        from torch.distributed.tensor import DTensor

        if self.name == "mp" and not isinstance(next(self.net.parameters()), DTensor):
            shard(self.net, self.device_mesh)


def sharded_trainer(folder: Path, name: str, callbacks: list[Any], **options: Any) -> Any:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    mp = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    strategy = {"mp": mp, "fsdp": CPUFSDPStrategy(state_dict_type="sharded"), "ddp": "ddp"}[name]
    return trainer(folder, callbacks, strategy=strategy, devices=size, use_distributed_sampler=True, **options)


@pytest.mark.parametrize("name", ["mp", "fsdp"])
def test_sharded_strategies_obey_weights_only_of_fit(name: str, ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_weights_only, tmp_path, name=name)


def test_the_newest_checkpoint_is_found_whatever_it_is_called(tmp_path: Path) -> None:
    samples(tmp_path, kill=3)
    newest = max((tmp_path / "run").glob("step-*"))
    os.utime(newest, (0, 0))  # stock Lightning goes by this time, and by names that begin with "last"
    assert len(samples(tmp_path, seed=2)) == 2 * BATCHES - 3


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_sharded_load_hands_their_state_to_schedulers_and_stateful_loaders(form: str, tmp_path: Path) -> None:
    def make(seed: int) -> tuple[Toy, Any]:
        run = Toy(fabric("mp", form), seed)
        data = run.fabric.setup_dataloaders(StatefulDataLoader(Noisy(), BATCH))
        run.state["data"] = data
        return run, data

    with one_rank_group():
        run, data = make(1)
        batches = iter(data)
        run.train(3)
        next(batches)
        run.optimizer.step()
        expected = run.scheduler.state_dict()
        run.fabric.save(tmp_path / "c", run.state)
        other, again = make(2)
        other.fabric.load(tmp_path / "c", other.state)
        assert other.state["scheduler"] is other.scheduler
        assert other.state["data"] is again
        assert other.scheduler.state_dict() == expected
        assert next(iter(again))[0].tolist() == [4, 5, 6, 7]


@contextlib.contextmanager
def one_rank_group() -> Iterator[None]:
    """Takes the process group of ModelParallelStrategy away again."""
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def check_values_of_every_rank(folder: Path) -> None:
    """What each rank has for itself comes back on that rank: stock Lightning's meta.pt has rank 0's alone."""
    for name in ("ddp", "mp"):
        run = Toy(fabric(name), 1)
        rank = run.fabric.global_rank
        run.fabric.save(folder / name, {"own": rank, "state": {"nested": [rank, torch.tensor(rank)]}, "both": 7})
        state: dict[str, Any] = {"own": None, "state": None, "both": None}
        run.fabric.load(folder / name, state)
        assert (state["own"], state["state"]["nested"], state["both"]) == (rank, [rank, rank], 7)


def test_what_is_not_a_tensor_comes_back_from_every_rank(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_values_of_every_rank, tmp_path)


def test_an_overwrite_that_fails_half_way_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Toy(fabric())
    run.train(2)
    run.fabric.save(tmp_path / "c", run.state)
    saved = run.tensors()
    run.train(2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, after=1))
        with pytest.raises((CheckpointSaveError, OSError), match="No space"):
            run.fabric.save(tmp_path / "c", run.state)
    other = Toy(fabric(), 2)
    other.fabric.load(tmp_path / "c", other.state)
    assert_equal(other.tensors(), saved)
    run.fabric.save(tmp_path / "c", run.state)  # and the next one is not hindered by what was left
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def failing(stock: Callable[..., Any], *, after: int) -> Callable[..., Any]:
    """``stock`` until it was called ``after`` times, then a full disk."""
    calls = 0

    def act(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(28, "No space left on device")
        return stock(*args)

    return act


def check_save(folder: Path) -> None:
    run = Toy(fabric("mp"), 1)
    run.train(2)
    run.fabric.save(folder / "c", run.state)


def test_fewer_ranks_over_an_older_save_leave_no_shard_of_it(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_save, tmp_path)
    assert {path.name for path in (tmp_path / "c").glob("*_*.distcp")} > {"__0_0.distcp"}
    run = Toy(fabric(), 3)
    run.fabric.save(tmp_path / "c", run.state)
    assert not [path for path in (tmp_path / "c").rglob("*.distcp") if path.name.startswith("__1_")]
    other = Toy(fabric(), 2)
    other.fabric.load(tmp_path / "c", other.state)
    assert_equal(other.tensors(), run.tensors())


def test_numpys_random_state_in_state_loads(tmp_path: Path) -> None:
    run = fabric()
    run.save(tmp_path / "c", {"numpy": (saved := np.random.get_state())})
    state: dict[str, Any] = {"numpy": None}
    run.load(tmp_path / "c", state)
    assert [np.array_equal(a, b) for a, b in zip(saved, state["numpy"], strict=True)] == [True] * 5


@pytest.mark.parametrize("in_state", [True, False])
def test_the_epoch_of_fabrics_loaders_is_saved(in_state: bool, tmp_path: Path) -> None:
    run = Toy(fabric())
    orders = [[batch[0].tolist() for batch in run.loader] for _ in range(3)]
    run = Toy(fabric())
    for _ in range(2):
        for batch in run.loader:
            run.step(batch)
    run.fabric.save(tmp_path / "c", run.state if in_state else {"optimizer": run.optimizer, "model": run.model})
    other = Toy(fabric(), 2)
    other.fabric.load(tmp_path / "c", other.state if in_state else {"optimizer": other.optimizer})
    assert [batch[0].tolist() for batch in other.loader] == orders[2]
    assert orders[2] != orders[0]


class Huge(Noisy):
    """Refuses to be pickled."""

    def __reduce__(self) -> Any:
        raise AssertionError("the dataset is not part of a checkpoint")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_loader_in_state_is_saved_as_its_position_not_pickled(form: str, tmp_path: Path) -> None:
    run = fabric("single", form)
    loader = run.setup_dataloaders(DataLoader(Huge(), BATCH))
    next(iter(loader))
    run.save(tmp_path / "c", {"loader": loader})
    again = fabric("single", form)
    other = again.setup_dataloaders(DataLoader(Huge(), BATCH))
    again.load(tmp_path / "c", {"loader": other})
    assert next(iter(other))[0].tolist() == [4, 5, 6, 7]


def check_sequential(folder: Path) -> None:
    """Step by step, the ranks together see the samples in the order in which one device would."""
    noted = Samples()
    own = ResumeCallback(folder / "run")
    data = DataLoader(Points(16), BATCH)
    sharded_trainer(folder, "ddp", [noted, own], max_epochs=1).fit(Silent("none"), data)
    (folder / f"seen{os.environ['RANK']}").write_text(str([ids for _, ids in noted.seen]))


def test_without_shuffle_ddp_keeps_the_order_of_one_device(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_sequential, tmp_path)
    seen = [eval((tmp_path / f"seen{rank}").read_text()) for rank in range(2)]
    steps = [sorted(one + other) for one, other in zip(*seen, strict=True)]
    assert steps == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_dataloader_saved_at_an_epochs_last_batch_does_not_skip_the_next_epoch(
    workers: int, tmp_path: Path
) -> None:
    data = lambda: StatefulDataLoader(Points(), BATCH, num_workers=workers)  # noqa: E731
    resumed, whole = in_two_parts(tmp_path, kill=BATCHES, data=data)
    assert resumed == whole
    assert [epoch for epoch, _ in resumed] == [0] * BATCHES + [1] * BATCHES


def check_model_checkpoint(folder: Path, *, name: str) -> None:
    """ModelCheckpoint writes folders in our format, each of which resumes exactly."""

    def run(seed: int, kill: int = 10**6, **arguments: Any) -> tuple[list[str], Any]:
        reseed(seed)
        module = Plain(name)
        journal = Journal()
        callbacks = [
            journal,
            Samples(kill),
            every_step(folder, save_last=True),
            ResumeCallback(folder / "run", resume="never"),
        ]
        made = sharded_trainer(folder, name, callbacks, max_epochs=2)
        with contextlib.suppress(Killed):
            made.fit(module, **arguments)
        return journal.lines, made

    whole, _ = run(1)
    paths = sorted((folder / "files").glob("step=*"))
    assert len(paths) == 2 * 2
    for path in paths[:3]:
        assert path.is_dir()
        assert (path / "meta.pt").is_file()
        torch.distributed.barrier()
        lines, _ = run(2, ckpt_path=path)
        assert lines == whole, path


class Plain(Sharded):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("name", ["mp", "fsdp"])
def test_model_checkpoint_under_sharded_strategies_resumes_exactly(name: str, ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_model_checkpoint, tmp_path, name=name)
    assert dcp.FileSystemReader(next((tmp_path / "files").glob("step=*"))).read_metadata().state_dict_metadata
