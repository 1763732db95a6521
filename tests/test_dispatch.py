"""Rank 0 loads and dispatches: the samples that each rank would have loaded, from data that only rank 0 reaches."""

from __future__ import annotations

import datetime
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_resume import (
    OutOfStepError,
    RankLostError,
    ResumableDDPStrategy,
    ResumableSingleDeviceStrategy,
    ResumeCallback,
    ShardedDataset,
    dispatched,
    make_resumable,
)
from lightning_resume.data.transport import Packed, pack
from tests import runs
from tests.harness import Launch, Zygote, die, zygote
from tests.simulated_ranks import stored
from tests.toy_data import Buckets, Endless, Noisy, Plain, Reversing, Stateful, plain
from tests.toy_shards import TOTAL, write_parquet

SAMPLES = 23

ELASTIC: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(SAMPLES), 3, shuffle=True),
    "workers": lambda: DataLoader(Noisy(SAMPLES), 3, shuffle=True, num_workers=2),
    "drop last": lambda: DataLoader(Noisy(SAMPLES), 3, drop_last=True),
    "no batches": lambda: DataLoader(Noisy(9), batch_size=None, shuffle=True),
    "torch's batch sampler": lambda: DataLoader(
        Noisy(SAMPLES), batch_sampler=BatchSampler(RandomSampler(range(SAMPLES)), 4, False)
    ),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "batch sampler": lambda: DataLoader(Noisy(), batch_sampler=Buckets()),
    "endless sampler": lambda: DataLoader(Noisy(), 2, sampler=Endless()),
    "iterable": lambda: DataLoader(Plain(), 3),  # 5 batches: one is left over for the next epoch
    "iterable, workers": lambda: DataLoader(Plain(), 3, num_workers=2),
    "stateful": lambda: DataLoader(Stateful(), 3),
    "single batch": lambda: DataLoader(Stateful(), 14),  # fewer than ranks: every second epoch has a step
}
KINDS = {**ELASTIC, **OTHERS}
STEPS = 9


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


def launch(ranks: Zygote, check: Callable[..., None], folder: Path, *, world_size: int = 2, **arguments: Any) -> None:
    content = {"name": check.__name__, "arguments": arguments}
    function = "tests.test_dispatch:start"
    ranks.run(Launch(function=function, arguments=content, world_size=world_size, folder=folder, seconds=100))


def start(*, folder: Path, name: str, arguments: dict[str, Any]) -> None:
    globals()[name](folder, **arguments)
    if dist.is_initialized():
        runs.end_processes()


def group(seconds: float = 60) -> tuple[int, int]:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    return dist.get_rank(), dist.get_world_size()


def take(loader: Any, steps: int = STEPS) -> list[Any]:
    """The next batches over as many epochs as it takes, each with its epoch."""
    seen: list[Any] = []
    for _ in range(4 * steps):  # an epoch may have no step at all
        for batch in loader:
            seen.append((loader.epoch, plain(batch)))
            if len(seen) == steps:
                return seen
    return seen


def only_rank_0(make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        assert not dist.is_initialized() or dist.get_rank() == 0, "only rank 0 reaches the data"
        return make()

    return made


# -- alone


@pytest.mark.parametrize("kind", KINDS)
def test_alone_it_gives_what_its_loader_gives(kind: str) -> None:
    loader = dispatched(KINDS[kind], seed=3)
    expected = take(make_resumable(KINDS[kind](), seed=3))
    assert take(loader) == expected
    if kind in ELASTIC:
        assert len(loader) == len(make_resumable(KINDS[kind](), seed=3))


@pytest.mark.parametrize("kind", KINDS)
def test_alone_it_goes_on_from_every_batch(kind: str) -> None:
    whole, states = record(dispatched(KINDS[kind], seed=3))
    for taken, state in enumerate(states, 1):
        again = dispatched(KINDS[kind], seed=3)
        again.load_state_dict(stored(state))
        assert take(again, STEPS - taken) == whole[taken:]


def record(loader: Any) -> tuple[list[Any], list[Any]]:
    """The next batches, and the loader's state after each."""
    seen, states = [], []
    while True:
        for batch in loader:
            seen.append((loader.epoch, plain(batch)))
            states.append(loader.state_dict())
            if len(seen) == STEPS:
                return seen, states


@pytest.mark.parametrize("make", [lambda: DataLoader(Noisy(), 4, shuffle=True), lambda: DataLoader(Plain(), 4)])
def test_alone_an_epoch_that_is_set_begins_at_its_start_unless_it_was_just_loaded(make: Callable[[], Any]) -> None:
    loader = dispatched(make, seed=3)

    def epoch_of(epoch: int) -> list[Any]:
        loader.set_epoch(epoch)
        return list(map(plain, loader))

    whole = epoch_of(0)
    loader.set_epoch(0)
    next(iter(loader))
    state = stored(loader.state_dict())
    assert epoch_of(0) == epoch_of(0) == whole != epoch_of(1)
    loader.load_state_dict(state)
    assert epoch_of(0) == whole[1:]


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"given a DataLoader, but takes a function.*dispatched\(lambda: DataLoader"):
        dispatched(DataLoader([1]))  # type: ignore[arg-type]


def test_a_loader_that_changes_its_batches_is_dispatched_as_it_is() -> None:
    loader = dispatched(lambda: Reversing(Noisy(), 4), seed=3)
    assert take(loader, 4) == take(make_resumable(Reversing(Noisy(), 4), seed=3), 4)


# -- what is sent


class Pair(NamedTuple):
    name: str
    value: Any


def objects() -> dict[str, Any]:
    shared = torch.arange(3)
    return {
        "tensors": [torch.arange(6).reshape(2, 3).T, torch.tensor(1.5), torch.empty(0, 4), torch.tensor([True, False])],
        "types": [torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.complex64, torch.int8)],
        "arrays": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.array("text"), np.empty(0)],
        "nested": {"pair": Pair("a", shared), "again": shared, "others": (None, "text", 3, {1, 2}, b"bytes")},
        "special": [torch.ones(2, requires_grad=True), torch.eye(3).to_sparse(), nn.Parameter(torch.ones(1))],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        dense = [tensor.to_dense() if tensor.is_sparse else tensor for tensor in (one, other)]
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(*dense)
    if isinstance(one, np.ndarray):
        return bool(
            one.dtype == other.dtype and one.flags.f_contiguous == other.flags.f_contiguous and (one == other).all()
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_anything_comes_back_as_it_was_sent() -> None:
    packed = pack(objects())
    head = packed.messages()[1]
    about = pickle.loads(head.numpy().tobytes())
    received = Packed(**about)
    for buffer, sent in zip(received.buffers, packed.buffers, strict=True):
        buffer.copy_(sent)
    found = received.unpack()
    assert same(found, objects())
    assert found["nested"]["pair"].value is found["nested"]["again"]
    found["arrays"][0][:] = 0  # as writable as it was
    found["tensors"][0].zero_()


def test_the_bytes_of_tensors_and_arrays_are_not_pickled() -> None:
    assert len(pack([torch.ones(10**6), np.ones(10**6)])._content) < 1000


# -- with ranks


def check_ranks(_folder: Path, *, kinds: list[str]) -> None:
    rank, world_size = group()
    for kind in kinds:
        make = KINDS[kind]
        loader = dispatched(only_rank_0(make), seed=3)
        mine, states = [], []
        while len(mine) < STEPS:
            for batch in loader:
                mine.append((loader.epoch, plain(batch)))
                states.append(loader.save_state_global())
                if len(mine) == STEPS:
                    break
        assert [batch for _, batch in mine] == expected(kind, rank, world_size), kind
        for taken in (1, 4, 8):
            again = dispatched(only_rank_0(make), seed=3)
            again.restore_state_global(None if rank else stored(states[taken - 1]))
            assert take(again, STEPS - taken) == mine[taken:], (kind, taken)
        assert (loader.loader is None) == (rank > 0)
        assert loader.capabilities.world_size.value == "elastic"


def expected(kind: str, rank: int, world_size: int) -> list[Any]:
    """What the rank would load by itself, or its turns of what one process does."""
    if kind in ELASTIC:
        alone = make_resumable(KINDS[kind](), rank=rank, world_size=world_size, seed=3, shared=True)
        return [batch for _, batch in take(alone)]
    turns = take(make_resumable(KINDS[kind](), seed=3), STEPS * world_size)
    return [batch for _, batch in turns[rank::world_size]]


def test_every_rank_gets_what_it_would_have_loaded(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_ranks, tmp_path / "2", kinds=list(KINDS))
    without_workers = [kind for kind in KINDS if "workers" not in kind]
    launch(ranks, check_ranks, tmp_path / "3", kinds=without_workers, world_size=3)


class Broken(Noisy):
    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise FileNotFoundError(2, "no such shard", "part-7")
        return super().__getitem__(index)


def unpicklable(_samples: Any) -> Any:
    return lambda: None


def ordinary(_samples: Any) -> Any:
    return objects()


def check_errors(_folder: Path) -> None:
    rank, _ = group()

    def missing() -> Any:
        raise FileNotFoundError(2, "no such folder", "/data")

    with pytest.raises(FileNotFoundError, match="no such folder"):
        iter(dispatched(missing))
    with pytest.raises(ValueError, match="has 1 samples for 2 ranks"):
        len(dispatched(lambda: DataLoader(Noisy(1))))

    loader = dispatched(lambda: DataLoader(Broken(), 2))
    seen = []
    with pytest.raises(FileNotFoundError, match="no such shard"):
        seen.extend(loader)
    assert len(seen) == 1
    with pytest.raises(Exception, match=r"pickle|unpicklable"):
        next(iter(dispatched(lambda: DataLoader(Noisy(), 2, collate_fn=unpicklable))))
    assert same(next(iter(dispatched(lambda: DataLoader(Noisy(), 2, collate_fn=ordinary)))), objects())

    # they still work together
    assert len(list(dispatched(lambda: DataLoader(Noisy(), 2)))) == 4

    # other numbers of batches: the second iteration of rank 1 meets a batch of the first
    loader = dispatched(lambda: DataLoader(Noisy(), 2))
    batches = iter(loader)
    next(batches)
    if rank == 1:
        with pytest.raises(
            OutOfStepError, match="asks for the start of epoch 1 at batch 0, but rank 0 dispatches batch 1 of"
        ):
            iter(loader)
    else:
        next(batches)
        with pytest.raises(RankLostError):
            next(batches)
    os._exit(0)  # the group cannot be ended together any more


def test_errors_reach_all_ranks(ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_errors, tmp_path)


# -- with Fabric and the Trainer, killed and gone on with at 2, 1 and 2 ranks


class Recorded:
    """One line for each batch of each rank."""

    def __init__(self, folder: Path, rank: int, leg: int) -> None:
        self._file = os.open(folder / f"rank{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._rank, self._leg = rank, leg

    def write(self, step: int, batch: Any) -> None:
        line = {"leg": self._leg, "step": step, "rank": self._rank, "batch": plain(batch)}
        os.write(self._file, (json.dumps(line) + "\n").encode())


def make() -> Any:
    return DataLoader(Noisy(SAMPLES), 2, shuffle=True)


def run_fabric(folder: Path, *, leg: int, kill: int | None) -> None:
    devices = int(os.environ["WORLD_SIZE"])
    strategy = ResumableDDPStrategy() if devices > 1 else ResumableSingleDeviceStrategy()
    fabric = L.Fabric(accelerator="cpu", devices=devices, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(7)
    model, optimizer = fabric.setup(net := nn.Linear(1, 1), torch.optim.SGD(net.parameters(), 0.1))
    loader = fabric.setup_dataloaders(dispatched(only_rank_0(make)))
    state = {"model": model, "optimizer": optimizer, "loader": loader, "step": 0, "epoch": 0}
    if (folder / "checkpoint").exists():
        fabric.load(folder / "checkpoint", state)
    recorded = Recorded(folder, fabric.global_rank, leg)
    for epoch in range(state["epoch"], 2):
        state["epoch"] = epoch
        for batch in loader:
            fabric.backward(model(batch[1][:, None].float()).mean())
            optimizer.step()
            state["step"] += 1
            recorded.write(state["step"], batch)
            fabric.save(folder / "checkpoint", state)
            if state["step"] == kill:
                die_together(devices)


def die_together(devices: int) -> None:
    if devices > 1:
        dist.barrier()
    die()


class Module(L.LightningModule):
    def __init__(self, recorded: Recorded, kill: int | None) -> None:
        super().__init__()
        self.net, self.recorded, self.kill = nn.Linear(1, 1), recorded, kill

    def training_step(self, batch: Any, _index: int) -> Any:
        self.recorded.write(self.trainer.global_step + 1, batch)
        return self.net(batch[1][:, None].float()).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.kill:
            die_together(self.trainer.world_size)

    def validation_step(self, batch: Any, _index: int) -> None:
        assert len(batch[0]) > 0


def run_trainer(folder: Path, *, leg: int, kill: int | None) -> None:
    devices = int(os.environ["WORLD_SIZE"])
    L.seed_everything(7, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=2,
        callbacks=[ResumeCallback(folder / "checkpoints", every_n_train_steps=1, max_attempts=None)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    recorded = Recorded(folder, int(os.environ["RANK"]), leg)
    validating = dispatched(only_rank_0(lambda: DataLoader(Noisy(6), 2)))
    trainer.fit(Module(recorded, kill), dispatched(only_rank_0(make)), validating)


@pytest.mark.parametrize("run", [run_fabric, run_trainer])
def test_a_killed_run_goes_on_at_2_1_and_2_ranks(run: Callable[..., None], ranks: Zygote, tmp_path: Path) -> None:
    for leg, (world_size, kill) in enumerate([(2, 3), (1, 6), (2, 9), (2, None)]):
        launch(ranks, run, tmp_path / "chain", world_size=world_size, leg=leg, kill=kill)
    launch(ranks, run, tmp_path / "whole", leg=0, kill=None)
    chain, whole = (in_order(tmp_path / folder) for folder in ("chain", "whole"))
    assert chain == whole
    indices = [index for index, _ in whole]
    assert sorted(indices[:SAMPLES]) == sorted(indices[SAMPLES:]) == list(range(SAMPLES))


def in_order(folder: Path) -> list[tuple[int, float]]:
    """The samples of all steps in global order; of a step that was done again, the last time."""
    lines = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    steps: dict[int, list[Any]] = {}
    for line in sorted(lines, key=lambda line: (line["step"], line["leg"], line["rank"])):
        known = steps.setdefault(line["step"], [])
        if known and known[0]["leg"] != line["leg"]:
            known.clear()
        known.append(line)
    return [sample for step in steps.values() for line in step for sample in zip(*line["batch"], strict=True)]


def check_sharded(folder: Path) -> None:
    """Rank 0 reads all files, although by default the loader would divide them over the process group."""
    rank, world_size = group()
    for format in ("parquet", "jsonl"):

        def made(format: str = format) -> Any:
            options = {"format": format, "batch_size": 4, "seed": 3, "shuffle": format == "parquet"}
            return ShardedDataset.create_dataloader(folder / format, **options)[0]  # type: ignore[arg-type]

        loader = dispatched(only_rank_0(made))
        seen, states = [], []
        for batch in loader:
            seen.append(batch["id"].tolist())
            states.append(loader.save_state_global())
        of_all: list[Any] = [None] * world_size
        dist.all_gather_object(of_all, sum(seen, []))  # noqa: RUF017
        whole = sum(of_all, [])  # noqa: RUF017
        left_over = 0 if format == "parquet" else 4  # of the batches in turn, one at most opens the next epoch
        assert len(set(whole)) == len(whole) >= TOTAL - left_over
        again = dispatched(only_rank_0(made))
        again.restore_state_global(None if rank else stored(states[2]))
        assert [batch["id"].tolist() for batch in again] == seen[3:]


def test_sharded_files_are_read_by_rank_0_alone(ranks: Zygote, tmp_path: Path) -> None:
    write_parquet(tmp_path / "parquet")
    (tmp_path / "jsonl").mkdir()
    lines = [json.dumps({"id": number}) for number in range(TOTAL)]
    (tmp_path / "jsonl" / "part.jsonl").write_text("\n".join(lines))
    launch(ranks, check_sharded, tmp_path)
