"""The training script of the demo, as a user would write it: FSDP2 in a Trainer, and one callback that resumes it.

python examples/demo_train.py runs/demo              # start; and, after a crash, go on
python examples/demo_train.py runs/demo --devices 1  # go on with another number of processes
"""

import argparse
import json
import zlib
from typing import Any, TextIO

import lightning as L
import torch
from byte_lm import ByteTransformer, PythonSources
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_resume import ResumeCallback


class LanguageModel(L.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.model = ByteTransformer()

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # ModelParallelStrategy: FSDP2 shards each block, then the rest
            for part in (*self.model.blocks, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        _, text = batch
        return self.model.loss(text)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=self.steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Journal(L.Callback):
    """Writes down what each rank did in each step: the loss to its last bit, each sample's text by its checksum."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: TextIO | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.file is None:
            self.file = open(f"{self.path}.rank{trainer.global_rank}.jsonl", "a", buffering=1)  # noqa: SIM115
        index, text = batch
        record = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "samples": index.tolist(),
            "text": [zlib.crc32(sample.numpy()) for sample in text],
            "loss": outputs["loss"].item().hex(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"].hex(),
        }
        self.file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run folder, for checkpoints")
    parser.add_argument("--journal", help="write down every step in files that begin with this name")
    parser.add_argument("--devices", type=int, default=2, help="number of processes")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of one process in one step")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each process")
    parser.add_argument("--samples", type=int, default=760, help="length of an epoch")
    parser.add_argument("--steps", type=int, default=96, help="when to stop")
    parser.add_argument("--save-every", type=int, default=10, help="steps from one checkpoint to the next")
    parser.add_argument("--checkpoint", help="go on from this checkpoint, not from the newest of the run folder")
    args = parser.parse_args()

    torch.set_num_threads(1)
    L.seed_everything(7, verbose=False)
    sharded = args.devices > 1
    callbacks: list[L.Callback] = [ResumeCallback(args.run, every_n_train_steps=args.save_every, keep=None)]
    if args.journal:
        callbacks.append(Journal(args.journal))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy=ModelParallelStrategy(data_parallel_size=args.devices, tensor_parallel_size=1) if sharded else "auto",
        max_steps=args.steps,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(PythonSources(args.samples), batch_size=args.batch_size, shuffle=True, num_workers=args.workers)
    trainer.fit(LanguageModel(args.steps), data, ckpt_path=args.checkpoint)
    if torch.distributed.is_initialized():  # without this, a gloo process may abort while the interpreter exits
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
