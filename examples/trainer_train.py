"""A Trainer script that can be killed and started again at any moment; `ResumeCallback` is all it takes.

    python examples/trainer_train.py                                          # one process
    python examples/trainer_train.py --devices 2 --strategy model_parallel    # FSDP2 on two

Run it, press Ctrl-C or kill it, and run it again: it goes on after its last checkpoint, at the next sample, with any of
the strategies and any number of devices.
"""

import argparse
from typing import Any

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
        self.model = ByteTransformer(width=64, layers=2)

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # ModelParallelStrategy: FSDP2, each block a unit of its own
            for part in (*self.model.blocks, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        _, text = batch
        return self.model.loss(text)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, text = batch
        self.log("val_loss", self.model.loss(text), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class PrintLoss(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero:
            print(f"step {trainer.global_step} loss {outputs['loss'].item():.9f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", choices=["auto", "ddp", "fsdp", "model_parallel"], default="auto")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the whole run")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8, help="of one device")
    parser.add_argument("--run", default="runs/trainer", help="where the checkpoints are")
    args = parser.parse_args()

    L.seed_everything(1, verbose=False)
    strategy: Any = args.strategy
    if strategy == "model_parallel":
        strategy = ModelParallelStrategy(data_parallel_size=args.devices, tensor_parallel_size=1)
    trainer = L.Trainer(
        devices=args.devices,
        strategy=strategy,
        max_steps=args.steps,
        callbacks=[ResumeCallback(args.run, every_n_train_steps=args.save_every), PrintLoss()],
        logger=False,
        enable_progress_bar=False,
    )
    train = DataLoader(PythonSources(300), batch_size=args.batch_size, shuffle=True)
    validation = DataLoader(PythonSources(40), batch_size=args.batch_size)
    trainer.fit(LanguageModel(args.steps), train, validation)
    if torch.distributed.is_initialized():  # without this, a gloo process may abort while the interpreter exits
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
