"""A Fabric training script that can be killed and started again at any moment.

    python examples/fabric_train.py                                          # one process
    python examples/fabric_train.py --devices 2 --strategy model_parallel    # FSDP2 on two

Run it, press Ctrl-C or kill it, and run it again: it goes on after its last checkpoint, at the next sample, with any of
the strategies and any number of devices.
"""

import argparse
from typing import Any

import lightning as L
import torch
from byte_lm import ByteTransformer, PythonSources
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_resume import (
    CheckpointNotFoundError,
    ResumableDDPStrategy,
    ResumableFSDPStrategy,
    ResumableModelParallelStrategy,
    ResumableSingleDeviceStrategy,
)


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2: each block of the model is a unit of its own."""
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh["data_parallel"])
    return model


def make_strategy(name: str, devices: int) -> Any:
    if name == "single":
        return ResumableSingleDeviceStrategy("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "ddp":
        return ResumableDDPStrategy()
    if name == "fsdp":
        return ResumableFSDPStrategy(auto_wrap_policy={nn.TransformerEncoderLayer})
    return ResumableModelParallelStrategy(shard, data_parallel_size=devices, tensor_parallel_size=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", choices=["single", "ddp", "fsdp", "model_parallel"], default="ddp")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the whole run")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8, help="of one device")
    parser.add_argument("--run", default="runs/fabric", help="where the checkpoints are")
    args = parser.parse_args()

    fabric = L.Fabric(devices=args.devices, strategy=make_strategy(args.strategy, args.devices))
    fabric.launch()
    fabric.seed_everything(1)

    model = fabric.setup_module(ByteTransformer(width=64, layers=2))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=3e-3))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, T_max=args.steps)
    loader = fabric.setup_dataloaders(DataLoader(PythonSources(300), batch_size=args.batch_size, shuffle=True))

    # the loader may be in here or not: its position, and the random number generators, are saved and restored anyway
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0}
    try:
        fabric.load(args.run, state)  # a run folder stands for its newest checkpoint
        fabric.print(f"Resuming after step {state['step']}.")
    except CheckpointNotFoundError:
        fabric.print("A fresh run.")

    while state["step"] < args.steps:
        for _, text in loader:  # after a load, the first of these loops goes on in the middle of the epoch
            logits = model(text[:, :-1])
            loss = nn.functional.cross_entropy(logits, text[:, 1:].flatten())
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            state["step"] += 1
            fabric.print(f"step {state['step']} loss {loss.item():.9f}", flush=True)
            if state["step"] % args.save_every == 0:
                fabric.save(f"{args.run}/step-{state['step']:08d}", state)
            if state["step"] == args.steps:
                break

    if torch.distributed.is_initialized():  # without this, a gloo process may abort while the interpreter exits
        fabric.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
