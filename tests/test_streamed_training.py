"""Streams in a Trainer and in Fabric: alone, and on ranks whose lanes are of unequal length."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule

from lightning_resume import ResumableDDPStrategy, ResumeCallback, ShardedDataset
from tests import runs
from tests.harness import Launch, zygote
from tests.streams import write
from tests.toy_data import draw, reseed
from tests.toy_trainer import KillAt, Quiet, assert_same, fit, trainer

BATCH = 2
LENGTH = 24  # BatchNorm wants a last batch of two


def features(sample: dict[str, Any]) -> tuple[int, torch.Tensor]:
    return sample["id"], torch.full((4,), sample["id"] / LENGTH) + 0.1 * draw()


def loader(folder: Path, **options: Any) -> Any:
    settings = {"format": "jsonl", "batch_size": BATCH, "shuffle": True, "seed": 3, "window": 3, **options}
    return ShardedDataset.create_dataloader(
        folder, transform=features, collate_fn=torch.utils.data.default_collate, **settings
    )[0]


@pytest.fixture(scope="module", autouse=True)
def _zygote_lives_on() -> None:
    zygote()  # started here, it is not taken for something that a test left behind


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data", "jsonl", (7, 1, 11, LENGTH - 19))


# -- one process


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_trainer_goes_on_from_any_batch(tmp_path: Path, data: Path, accumulate: int) -> None:
    options: dict[str, Any] = {
        "module": lambda: Quiet("none"),
        "data": lambda: loader(data, lanes=3),
        "accumulate_grad_batches": accumulate,
    }
    whole = fit(tmp_path / "whole", **options)
    batches = sum(line.startswith("batch") for line in whole.lines)
    assert batches == 2 * 12
    for killed in (3, 5, 11, 12, 13, 20, 23):  # the first of them after the first save
        folder = tmp_path / str(killed)
        save = lambda folder=folder: ResumeCallback(folder / "r", every_n_train_steps=1)  # noqa: E731
        fit(folder, resume=save(), callbacks=[KillAt(killed)], **options)
        assert_same(fit(folder, seed=killed + 5, resume=save(), **options), whole)


def test_a_trainer_with_workers_leaves_none_behind(tmp_path: Path, data: Path) -> None:
    options = {"module": lambda: Quiet("none")}
    alone = fit(tmp_path / "a", data=lambda: loader(data, lanes=2), **options)
    workers = fit(tmp_path / "b", data=lambda: loader(data, lanes=2, num_workers=2), **options)
    assert_same(workers, alone)


def test_a_validation_loader_and_predict_work(tmp_path: Path, data: Path) -> None:

    class Counting(Quiet):
        seen = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen += len(batch[0])

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch[0]

        def val_dataloader(self) -> Any:
            return loader(data, shuffle=False)

    module = Counting("none")
    made = trainer(tmp_path, [ResumeCallback(tmp_path / "r")])
    made.fit(module, loader(data))
    assert module.seen == 2 * LENGTH
    predicted = made.predict(module, loader(data, shuffle=False))
    assert sorted(torch.cat(predicted).tolist()) == list(range(LENGTH))  # type: ignore[arg-type]


# -- several ranks


def launch(folder: Path, function: str, world_size: int, **arguments: Any) -> None:
    function = f"tests.test_streamed_training:{function}"
    zygote().run(Launch(function=function, arguments=arguments, world_size=world_size, folder=folder, seconds=120))


def journaled(folder: Path) -> list[int]:
    """The samples of all ranks and runs."""
    lines = [line for path in folder.glob("ids-*") for line in path.read_text().splitlines()]
    return [number for line in lines for number in json.loads(line)]


def journal(folder: Path, name: str, numbers: Any) -> None:
    with (folder / f"ids-{name}").open("a") as file:
        file.write(json.dumps(torch.as_tensor(numbers).tolist()) + "\n")


def through_fabric(*, folder: Path, data: str, steps: int | None, name: str, workers: int, batch_size: int) -> None:
    """Goes on for so many steps, or to the end of the epoch."""
    fabric = L.Fabric(accelerator="cpu", devices=dist_size(), strategy=ResumableDDPStrategy())
    made = loader(Path(data), num_workers=workers, batch_size=batch_size)  # before there is a process group
    fabric.launch()
    reseed(len(name))
    model = fabric.setup_module(torch.nn.Linear(4, 1))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    wrapped = fabric.setup_dataloaders(made)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": wrapped}
    if (folder / "checkpoint").exists():
        fabric.load(folder / "checkpoint", state)
    for number, (ids, x) in enumerate(wrapped, 1):
        fabric.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        journal(folder, f"{name}-{fabric.global_rank}", ids)
        if number == steps:
            break
    fabric.save(folder / "checkpoint", state)
    runs.end_processes()


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def test_fabric_holds_every_sample_once_at_2_1_and_3_ranks(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    common = {"data": str(data)}
    launch(folder, "through_fabric", 2, steps=2, name="a", workers=1, batch_size=2, **common)
    launch(folder, "through_fabric", 1, steps=3, name="b", workers=0, batch_size=1, **common)
    launch(folder, "through_fabric", 3, steps=None, name="c", workers=0, batch_size=2, **common)
    assert sorted(journaled(folder)) == list(range(LENGTH))


class Net(LightningModule):
    def __init__(self, folder: Path, name: str) -> None:
        super().__init__()
        self.folder, self.name, self.net = folder, name, torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        journal(self.folder, f"{self.current_epoch}-{self.name}-{self.global_rank}", batch[0])
        return self.net(batch[1]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def through_trainer(*, folder: Path, data: str, steps: int, name: str, workers: int) -> None:
    reseed(len(name))
    callback = ResumeCallback(folder / "checkpoints", every_n_train_steps=1)
    made = trainer(
        folder, [callback], devices=dist_size(), strategy="ddp" if dist_size() > 1 else "auto", max_steps=steps
    )
    made.fit(Net(folder, name), loader(Path(data), num_workers=workers))
    if dist.is_initialized():
        runs.end_processes()


def test_a_trainer_holds_every_sample_once_an_epoch_at_2_1_and_3_ranks(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    common = {"data": str(data)}
    launch(folder, "through_trainer", 2, steps=4, name="a", workers=0, **common)
    launch(folder, "through_trainer", 1, steps=6, name="b", workers=1, **common)
    launch(folder, "through_trainer", 3, steps=100, name="c", workers=0, **common)
    seen = journaled(folder)
    assert len(seen) > LENGTH
    epochs = {path.name.split("-")[1] for path in folder.glob("ids-*")}
    assert epochs == {"0", "1"}
    for epoch in epochs:
        lines = [line for path in folder.glob(f"ids-{epoch}-*") for line in path.read_text().splitlines()]
        assert sorted(number for line in lines for number in json.loads(line)) == list(range(LENGTH))


def fails_on_one_rank(*, folder: Path, data: str) -> None:
    assert folder.is_dir()
    dist.init_process_group("gloo")
    made = loader(Path(data), batch_size=1)
    if dist.get_rank() == 1:
        made._reader.collate = lambda _: 1 / 0
    error = ZeroDivisionError if dist.get_rank() == 1 else RuntimeError
    with pytest.raises(error, match=r"division by zero|Another rank failed while it read its samples"):
        list(made)
    runs.end_processes()


def ends_together(*, folder: Path, data: str) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for given in ({}, {"rank": rank, "world_size": world_size}):
        made = loader(Path(data), **given)
        for epoch in range(2):
            steps = 0
            for ids, _ in made:
                journal(folder, f"{len(given)}-{epoch}-{rank}", ids)
                dist.all_reduce(torch.ones(1))  # hangs where another rank has ended
                steps += 1
            told: list[Any] = [None] * world_size
            dist.all_gather_object(told, steps)
            assert set(told) == {steps}
    runs.end_processes()


def test_ranks_of_a_process_group_end_together_and_fail_together(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    launch(folder, "ends_together", 2, data=str(data))
    assert sorted(journaled(folder)) == sorted(list(range(LENGTH)) * 4)
    launch(tmp_path / "fails", "fails_on_one_rank", 2, data=str(data))
