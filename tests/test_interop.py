"""Stock Lightning reads what we saved, and we read what it saved, with a warning of what is missing."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lightning_resume import ResumeCallback, consolidate
from tests.harness import Zygote, zygote
from tests.runs import shard
from tests.test_stock_defects import Plain, Samples, sharded_trainer
from tests.toy_data import reseed
from tests.toy_fabric import Toy, assert_equal, fabric, launch, position
from tests.toy_trainer import Killed, Net, Quiet, every_step, fit, trainer

FOREIGN = "position in the data and no random number generators"


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


class StockFSDP(FSDPStrategy):
    """Stock Lightning gives FSDP the index of the device, which a CPU has not."""

    def setup_module(self, module: Any) -> Any:
        module = FullyShardedDataParallel(module, device_id=torch.device("cpu"), **self._fsdp_kwargs)
        return super().setup_module(module)


def stock(name: str) -> L.Fabric:
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    strategy = StockFSDP(state_dict_type="sharded") if name == "fsdp" else ModelParallelStrategy(shard, **sizes)
    return fabric(strategy=strategy)


KEYS = ("model", "optimizer", "step", "own")


def asked(run: Toy) -> dict[str, Any]:
    return {key: run.state[key] for key in KEYS}


def check_fabric(folder: Path, *, name: str) -> None:
    """Each way between stock Fabric and ours."""
    run = Toy(fabric(name), 1)
    run.train(3)
    run.fabric.save(folder / "ours", asked(run))
    theirs = Toy(stock(name), 2)
    theirs.fabric.load(folder / "ours", state := asked(theirs))
    assert state["step"] == 3
    assert_equal(parts(theirs), parts(run), "stock reads ours")

    theirs.fabric.save(folder / "stock", state)
    again = Toy(fabric(name), 4)
    where, drawn = position(again), torch.get_rng_state()
    with expecting(FOREIGN if again.fabric.global_rank == 0 else None):
        again.fabric.load(folder / "stock", state := asked(again))
    assert state["step"] == 3
    assert_equal(parts(again), parts(run), "we read the stock one")
    assert position(again) == where
    assert torch.equal(torch.get_rng_state(), drawn)


def parts(run: Toy) -> list[torch.Tensor]:
    """Weights and moments: stock Lightning keeps no rank's own BatchNorm statistics."""
    buffers = len(list(run.model.module.buffers()))
    weights = len(list(run.model.module.parameters()))
    return [tensor for i, tensor in enumerate(run.tensors()) if not weights <= i < weights + buffers]


@contextlib.contextmanager
def expecting(text: str | None) -> Iterator[None]:
    """Inside, we warn of ``text``, once; what torch and stock Lightning say is theirs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [str(one.message) for one in caught if "lightning-resume" in str(one.message)]
    assert len(ours) == (text is not None), ours
    assert all(text in message for message in ours if text is not None)


@pytest.mark.parametrize("name", ["fsdp", "mp"])
def test_stock_fabric_and_ours_read_each_others_folders(name: str, ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_fabric, tmp_path, name=name)


def check_trainer(folder: Path, *, name: str) -> None:
    """Each way between a stock Trainer and ours, under a sharded strategy."""

    def run(seed: int, callbacks: list[Any], epochs: int, path: Any = None) -> tuple[Any, list[torch.Tensor]]:
        reseed(seed)
        module = Plain(name)
        made = sharded_trainer(folder, name, callbacks, max_epochs=epochs)
        noted = Start()
        made.callbacks.append(noted)
        made.fit(module, ckpt_path=path)
        return made, noted.tensors

    ours = ResumeCallback(folder / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, _ = run(1, [ours], 1)
        ended = Start.of(made)
        (saved,) = (folder / "run").glob("step-*")
        _, begun = run(2, [], 2, saved)
        assert_equal(begun, ended, "the stock Trainer reads ours")
        made, _ = run(1, [], 1)
        ended = Start.of(made)
        made.save_checkpoint(folder / "stock")
        torch.distributed.barrier()
    with expecting(FOREIGN if made.global_rank == 0 else None):
        _, begun = run(3, [ResumeCallback(folder / "other", resume="never")], 2, folder / "stock")
    assert_equal(begun, ended, "we read the stock Trainer's")


class Start(L.Callback):
    """This rank's parts of the weights when training starts."""

    tensors: list[torch.Tensor]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.tensors = self.of(trainer)

    @staticmethod
    def of(trainer: Any) -> list[torch.Tensor]:
        parameters = trainer.strategy.model.parameters()
        return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in parameters]


@pytest.mark.parametrize("name", ["mp", "fsdp"])
def test_a_stock_sharded_trainer_and_ours_read_each_others_folders(name: str, ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_trainer, tmp_path, name=name)


def stock_run(folder: Path, *, path: Any = None, kill: int = 10**6, seed: int = 2, callbacks: Any = ()) -> Any:
    """A stock Trainer's run."""
    reseed(seed)
    module, noted = Quiet("none"), Start()
    made = trainer(folder, [Samples(kill), noted, *callbacks])
    with contextlib.suppress(Killed):
        made.fit(module, ckpt_path=path)
    return made, noted


def test_our_callback_reads_a_stock_file_and_warns_of_what_is_missing(tmp_path: Path) -> None:
    made, _ = stock_run(tmp_path, kill=3)
    ended = Start.of(made)
    made.save_checkpoint(tmp_path / "stock.ckpt")
    start = Start()
    run = [Samples(), start, ResumeCallback(tmp_path / "run")]
    resumed = trainer(tmp_path, run)
    with pytest.warns(UserWarning, match=FOREIGN), warnings.catch_warnings():  # noqa: PT031  # what stock Lightning says beside it
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create")
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
        resumed.fit(Quiet("none"), ckpt_path=tmp_path / "stock.ckpt")
    assert_equal(start.tensors, ended)
    assert resumed.global_step == 8


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_stock_trainer_reads_the_file_of_model_checkpoint_beside_us(tmp_path: Path) -> None:
    fit(tmp_path, module=lambda: Quiet("none"), callbacks=[every_step(tmp_path)])
    path = tmp_path / "files" / "step=3-epoch=0.ckpt"
    content = torch.load(path)
    _, noted = stock_run(tmp_path, path=path, callbacks=[every_step(tmp_path)])
    names = [name for name, _ in Quiet("none").named_parameters()]
    assert_equal(noted.tensors, [content["state_dict"][name] for name in names])


class WithArguments(Net):
    def __init__(self, schedule: str = "none", width: int = 5) -> None:
        super().__init__(schedule)
        self.save_hyperparameters()
        self.net[0], self.net[1] = torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width)
        self.net[3] = torch.nn.Linear(width, 1)


def test_a_consolidated_trainer_folder_is_a_file_that_torch_and_lightning_load(tmp_path: Path) -> None:
    run = fit(tmp_path, module=lambda: WithArguments(width=7), resume=ResumeCallback(tmp_path / "run"))
    path = consolidate(max((tmp_path / "run").glob("step-*")), tmp_path / "whole.ckpt")
    content = torch.load(path, weights_only=True)
    assert_equal([*content["state_dict"].values()], [*run.module.state_dict().values()])
    loaded = WithArguments.load_from_checkpoint(path)
    assert_equal([*loaded.state_dict().values()], [*run.module.state_dict().values()])
    assert content["global_step"] == run.trainer.global_step
    assert os.fspath(path) == os.fspath(tmp_path / "whole.ckpt")


def check_saved_by_a_sharded_trainer(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = sharded_trainer(folder, "mp", [ResumeCallback(folder / "run")], max_epochs=1)
        made.fit(module := Plain("mp"))
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in module.state_dict().items()}
    if made.global_rank == 0:
        torch.save(whole, folder / "whole.pt")


def test_a_consolidated_folder_of_fsdp2_loads_on_one_process(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_saved_by_a_sharded_trainer, tmp_path)
    path = consolidate(next((tmp_path / "run").glob("step-*")))
    whole = torch.load(tmp_path / "whole.pt")
    loaded = Plain.load_from_checkpoint(path, name="single").state_dict()
    assert loaded.keys() == whole.keys()
    assert_equal(list(loaded.values()), [whole[name] for name in loaded])
