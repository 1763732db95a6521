"""Trains a small language model on text in parquet files; can be killed and started again at any moment.

    python examples/corpus.py corpus --megabytes 30                           # some text to train on
    python examples/parquet_lm.py corpus --stack fabric --devices 2 --workers 2
    python examples/parquet_lm.py corpus --stack fabric --devices 1 --workers 3 --batch-size 64

Kill it, and start it again with any number of devices and workers and any batch size: every row of an epoch is trained
on once, in the same order, and the piece that is cut out of it at random is the same. `--stack trainer` does the same.
Parquet files of your own need a column `text`, and a column `id` where `--journal` is to write down who was there.
"""

import argparse
import json
import time
import zlib
from typing import Any

import lightning as L
import torch
from byte_lm import ByteTransformer
from torch.utils.data import DataLoader

from lightning_resume import CheckpointNotFoundError, ResumableDDPStrategy, ResumeCallback, ShardedDataset


class Crop:
    """Cuts a piece out of a row's text, at a place chosen at random: the row's own random numbers, whoever reads it."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        text = row["text"].encode()
        start = int(torch.randint(max(1, len(text) - self.length + 1), ()))
        piece = text[start : start + self.length].ljust(self.length)
        return {**row, "text": torch.frombuffer(bytearray(piece), dtype=torch.uint8).long()}


def make_loader(args: argparse.Namespace) -> DataLoader[Any]:
    loader, _ = ShardedDataset.create_dataloader(
        args.data,
        format="parquet",
        columns=["id", "text"] if args.journal else ["text"],
        transform=Crop(args.context + 1),
        batch_size=args.batch_size,
        shuffle=True,
        seed=1,
        num_workers=args.workers,
        window=4,  # row groups that are shuffled together: more of them mix better, and take more memory
    )
    return loader


def make_model(args: argparse.Namespace) -> ByteTransformer:
    return ByteTransformer(width=args.width, layers=args.layers, context=args.context)


class Journal:
    """Writes down what this rank trains on: the rows of each step, and a checksum of the piece of each."""

    def __init__(self, path: str, rank: int, resumed_from: int) -> None:
        # line by line, so that what is written is written whatever kills the process
        self.file = open(f"{path}.rank{rank}.jsonl", "a", buffering=1)  # noqa: SIM115
        self.arrived_at = 0.0
        self.write(resumed_from=resumed_from, time=time.time())

    def write(self, **record: Any) -> None:
        self.file.write(json.dumps(record) + "\n")

    def arrived(self) -> None:
        """A batch has come from the loader."""
        self.arrived_at = time.time()

    def stepped(self, step: int, epoch: int, batch: Any) -> None:
        crops = [zlib.crc32(piece.numpy()) for piece in batch["text"].cpu()]
        self.write(step=step, epoch=epoch, ids=batch["id"].tolist(), crops=crops, time=self.arrived_at)


# -- Trainer


class LanguageModel(L.LightningModule):
    def __init__(self, model: ByteTransformer) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model.loss(batch["text"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Report(L.Callback):
    """Prints the steps, and writes them down where a journal is asked for."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.journal: Journal | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            print(f"Going on after step {trainer.global_step}.", flush=True)
        if self.path:
            self.journal = Journal(self.path, trainer.global_rank, trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.journal:
            self.journal.arrived()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.journal:
            self.journal.stepped(trainer.global_step, trainer.current_epoch, batch)
        if trainer.is_global_zero:
            print(f"step {trainer.global_step} loss {outputs['loss'].item():.9f}", flush=True)


def train_with_trainer(args: argparse.Namespace) -> None:
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        max_epochs=args.epochs,
        callbacks=[ResumeCallback(args.run, every_n_train_steps=args.save_every), Report(args.journal)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModel(make_model(args)), make_loader(args))


# -- Fabric


def train_with_fabric(args: argparse.Namespace) -> None:
    fabric = L.Fabric(devices=args.devices, strategy=ResumableDDPStrategy())
    fabric.launch()
    fabric.seed_everything(1, verbose=False)
    model = fabric.setup_module(make_model(args))
    model.mark_forward_method("loss")
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=3e-3))
    loader = fabric.setup_dataloaders(make_loader(args))

    state = {"model": model, "optimizer": optimizer, "step": 0, "epoch": 0}
    try:
        fabric.load(args.run, state)  # a run folder stands for its newest checkpoint
    except CheckpointNotFoundError:
        fabric.print("A fresh run.")
    fabric.print(f"Going on after step {state['step']}.", flush=True)
    journal = Journal(args.journal, fabric.global_rank, state["step"]) if args.journal else None

    while state["epoch"] < args.epochs:
        for batch in loader:  # after a load, the first of these loops goes on in the middle of the epoch
            if journal:
                journal.arrived()
            loss = model.loss(batch["text"])
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            state["step"] += 1
            if journal:
                journal.stepped(state["step"], state["epoch"], batch)
            fabric.print(f"step {state['step']} loss {loss.item():.9f}", flush=True)
            if state["step"] % args.save_every == 0:
                fabric.save(f"{args.run}/step-{state['step']:08d}", state)
        state["epoch"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder, glob or URL of parquet files")
    parser.add_argument("--stack", choices=["trainer", "fabric"], default="trainer")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="loader processes of one device")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of one device in one step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=50, help="steps from one checkpoint to the next")
    parser.add_argument("--run", default="runs/parquet", help="where the checkpoints are")
    parser.add_argument("--journal", help="write down every step, in files that begin with this name")
    for name, value, what in (("width", 64, "of the model"), ("layers", 2, "of it"), ("context", 128, "bytes it sees")):
        parser.add_argument(f"--{name}", type=int, default=value, help=what)
    args = parser.parse_args()
    (train_with_trainer if args.stack == "trainer" else train_with_fabric)(args)
    if torch.distributed.is_initialized():  # without this, a gloo process may abort while the interpreter exits
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
