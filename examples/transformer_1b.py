"""A Transformer of one billion parameters, sharded by FSDP over several devices, saved and loaded as shards.

    python examples/transformer_1b.py --devices 4    # on GPUs; weights, gradients and optimizer take 16 GB in all
    python examples/transformer_1b.py --small        # a small model on two CPU processes

Run it a second time, on any number of devices, and it goes on from `runs/transformer-1b/checkpoint`.
"""

import argparse
import os
import time

import lightning as L
import torch
from byte_lm import ByteTransformer, PythonSources
from torch import nn
from torch.utils.data import DataLoader

from lightning_resume import CheckpointNotFoundError, ResumableFSDPStrategy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a small model on CPU processes")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps from here")
    parser.add_argument("--save-every", type=int, default=5, help="in optimizer steps")
    parser.add_argument("--checkpoint", default="runs/transformer-1b/checkpoint")
    args = parser.parse_args()

    # 1. Select the strategy: the arguments of Lightning's FSDPStrategy; `state_dict_type="full"` would save one file
    strategy = ResumableFSDPStrategy(auto_wrap_policy={nn.TransformerEncoderLayer}, state_dict_type="sharded")
    if args.small:
        fabric = L.Fabric(accelerator="cpu", devices=args.devices, strategy=strategy)
        sizes, batch_size = {"width": 64, "layers": 2, "heads": 4, "context": 64}, 4
    else:
        fabric = L.Fabric(accelerator="cuda", devices=args.devices, strategy=strategy, precision="bf16-mixed")
        sizes, batch_size = {"width": 2048, "layers": 20, "heads": 16, "context": 1024}, 4
    fabric.launch()
    fabric.seed_everything(1)

    # 2. Define the model, the optimizer, the loader and the other state of the loop
    model = ByteTransformer(**sizes)
    fabric.print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = fabric.setup(model, optimizer)
    data = PythonSources(1000, context=sizes["context"])
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=batch_size, shuffle=True))
    state = {"model": model, "optimizer": optimizer, "loader": loader, "iteration": 0}

    # 3. Load what an earlier run saved, on whatever number of devices
    start = time.perf_counter()
    try:
        fabric.load(args.checkpoint, state)
        fabric.print(f"Loaded iteration {state['iteration']} in {time.perf_counter() - start:.2f} s.")
    except CheckpointNotFoundError:
        fabric.print("A fresh run.")

    # 4. Train; the loader goes on where it was
    end = state["iteration"] + args.steps
    while state["iteration"] < end:
        for _, text in loader:
            loss = nn.functional.cross_entropy(model(text[:, :-1]), text[:, 1:].flatten())
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            state["iteration"] += 1
            fabric.print(f"iteration {state['iteration']} loss {loss.item():.9f}", flush=True)
            # 5. Save: every device writes its own shard
            if state["iteration"] % args.save_every == 0 or state["iteration"] == end:
                start = time.perf_counter()
                fabric.save(args.checkpoint, state)
                files = ", ".join(sorted(os.listdir(args.checkpoint)))
                fabric.print(f"Saved in {time.perf_counter() - start:.2f} s: {files}", flush=True)
            if state["iteration"] == end:
                break

    fabric.barrier()
    torch.distributed.destroy_process_group()  # without this, a gloo process may abort while the interpreter exits


if __name__ == "__main__":
    main()
