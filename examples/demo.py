"""Kills a training run, resumes it, and proves that it is the same run: `make demo`.

The training script is demo_train.py: a small Transformer that learns Python's standard library byte by byte, sharded by
FSDP2 over two CPU processes. This driver runs it, kills it, and compares what it wrote down with an uninterrupted run;
it exits with 1 if anything differs. It does not import Lightning: in the end the model is loaded in plain PyTorch.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from byte_lm import ByteTransformer

RANKS = 2
BATCH_SIZE = 8  # of each rank
TIME_LIMIT = 600  # seconds, for one run
Record = dict[str, Any]  # what a rank wrote down of a step


@dataclass(frozen=True, kw_only=True)
class Plan:
    folder: Path
    steps_per_epoch: int
    save_every: int
    kill_after: int

    @property
    def steps(self) -> int:
        return 2 * self.steps_per_epoch

    @property
    def samples(self) -> int:
        """Of an epoch; half as many as would fill its last step."""
        return self.steps_per_epoch * RANKS * BATCH_SIZE - BATCH_SIZE

    def checkpoint(self, run: str, step: int) -> Path:
        return self.folder / run / f"step-{step:08d}"

    def journal(self, name: str, rank: int) -> list[Record]:
        """What a rank wrote down, in the order of time; a line that a kill cut short does not count."""
        path = self.folder / f"{name}.rank{rank}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass
class Proof:
    """What has been shown, with its figures."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, exact: bool, claim: str, figures: str) -> None:
        self.rows.append(("yes" if exact else "NO", claim, figures))
        print(f"   {'ok' if exact else 'FAILED'}: {claim}: {figures}", flush=True)

    @property
    def failed(self) -> list[str]:
        return [claim for exact, claim, _ in self.rows if exact == "NO"]

    def table(self) -> str:
        rows = [("exact", "what was proven", "figures"), *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * len(max(lines, key=len)), *lines[1:]])


# -- running the training script


@contextlib.contextmanager
def training(plan: Plan, name: str, *options: object, run: str) -> Iterator[subprocess.Popen[bytes]]:
    """Starts the training script in a session of its own; the ranks that Lightning starts are in that session too."""
    script, journal = Path(__file__).with_name("demo_train.py"), plan.folder / name
    fixed = ("--journal", journal, "--samples", plan.samples, "--steps", plan.steps)
    command = [str(part) for part in (sys.executable, script, plan.folder / run, *fixed, *options)]
    with open(f"{journal}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to all processes of a run: none of them can tidy up or save."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(plan: Plan, name: str, *options: object, run: str) -> None:
    with training(plan, name, *options, run=run) as process:
        # a gloo process may abort while its interpreter exits, its work done; that it is done is checked below
        if process.wait(timeout=TIME_LIMIT) not in (0, -signal.SIGABRT):
            give_up(plan, name, f"ended with {process.returncode}")


def kill_after(step: int, plan: Plan, name: str, *options: object, run: str) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    with training(plan, name, *options, run=run) as process:
        while len(plan.journal(name, rank=0)) < step:
            if process.poll() is not None or time.monotonic() > deadline:
                give_up(plan, name, f"never came to step {step}")
            time.sleep(0.005)
        kill(process)


def give_up(plan: Plan, name: str, why: str) -> NoReturn:
    log = plan.folder / f"{name}.log"
    raise SystemExit(f"{log.read_text()}\nDEMO FAILED: the run {name!r} {why}. Its output is above, and in {log}.")


# -- what is proven


def reference(plan: Plan, _proof: Proof) -> None:
    """An uninterrupted run on two processes, to compare with"""
    finish(plan, "reference", "--save-every", plan.steps, run="reference")


def killed_and_resumed(plan: Plan, proof: Proof) -> None:
    """The same run, killed with SIGKILL in the middle of an epoch, then started again by the same command"""
    kill_after(plan.kill_after, plan, "killed", "--save-every", plan.save_every, run="killed")
    finish(plan, "resumed", "--save-every", plan.save_every, run="killed")
    compare(plan, proof)


def compare(plan: Plan, proof: Proof) -> None:
    before, after = ([plan.journal(name, rank) for rank in range(RANKS)] for name in ("killed", "resumed"))
    last, first = min(records[-1]["step"] for records in before), after[0][0]["step"]
    proof.add(
        1 < first <= last + 1 and all([r["step"] for r in a] == list(range(first, plan.steps + 1)) for a in after),
        "a killed run goes on by itself",
        f"killed after step {last} of {plan.steps} (an epoch has {plan.steps_per_epoch}), went on after {first - 1}",
    )
    expected = [{record["step"]: record for record in plan.journal("reference", rank)} for rank in range(RANKS)]
    compared = [(r, expected[rank][r["step"]]) for rank in range(RANKS) for r in before[rank] + after[rank]]
    claims = {
        "loss": "the same losses, to the last bit",
        "samples": "the same samples, in the same order",
        "text": "the same random augmentation",
        "lr": "the same learning rates",
    }
    for name, claim in claims.items():
        different = sum(record[name] != wanted[name] for record, wanted in compared)
        twice = len(compared) - RANKS * plan.steps
        figures = f"{different} of {len(compared)} differ ({plan.steps} steps on {RANKS} ranks, {twice} done twice)"
        proof.add(different == 0, claim, figures)


def same_weights(plan: Plan, proof: Proof) -> None:
    """Both runs' last checkpoints, each consolidated into one file and loaded in plain PyTorch"""
    for run in ("reference", "killed"):
        target = plan.folder / f"{run}.ckpt"
        command = [sys.executable, "-m", "lightning_resume", "consolidate", plan.checkpoint(run, plan.steps)]
        subprocess.run(
            [*map(str, command), "--output", str(target)], check=True, timeout=TIME_LIMIT, capture_output=True
        )
    wanted, found = (torch.load(plan.folder / f"{run}.ckpt") for run in ("reference", "killed"))
    for name, claim in (("state_dict", "the same weights"), ("optimizer_states", "the same optimizer state")):
        pairs = list(zip(tensors(wanted[name]), tensors(found[name]), strict=True))
        different = sum(not torch.equal(one, other) for one, other in pairs)
        values = sum(one.numel() for one, _ in pairs)
        proof.add(different == 0, claim, f"{different} of {len(pairs)} tensors differ ({values:,} values)")


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for part in parts for tensor in tensors(part)]


def one_process(plan: Plan, proof: Proof) -> None:
    """The killed run again, from a checkpoint in the middle of its second epoch, now on one process without FSDP"""
    step = plan.steps_per_epoch * 3 // 2 // plan.save_every * plan.save_every
    options = ("--devices", 1, "--batch-size", RANKS * BATCH_SIZE, "--workers", 0, "--save-every", plan.steps)
    finish(plan, "one-process", *options, "--checkpoint", plan.checkpoint("killed", step), run="one-process")

    whole = [record for rank in range(RANKS) for record in plan.journal("reference", rank) if record["epoch"] == 1]
    first = [record for record in whole if record["step"] <= step]
    rest = plan.journal("one-process", 0)
    seen = Counter(sample for record in first + rest for sample in record["samples"])
    counts = Counter(seen[sample] for sample in range(plan.samples))
    taken = sum(len(record["samples"]) for record in first)
    proof.add(
        counts == {1: plan.samples} and seen.total() == plan.samples,
        "an epoch begun on two processes, ended on one",
        f"{taken} + {seen.total() - taken} samples: {counts[1]} of {plan.samples} seen once, "
        f"{counts[0]} never, {plan.samples - counts[0] - counts[1]} again",
    )
    same = sum(contents(record) == contents(*(r for r in whole if r["step"] == record["step"])) for record in rest)
    proof.add(
        same == len(rest) == plan.steps - step,
        "the same samples in each step, augmented alike",
        f"{len(rest) - same} of {len(rest)} steps on one process differ from those on two",
    )


def contents(*records: Record) -> Counter[tuple[int, int]]:
    """The samples that a step was made of on all ranks, each with the checksum of its text."""
    return Counter(pair for record in records for pair in zip(record["samples"], record["text"], strict=True))


def plain_pytorch(plan: Plan, proof: Proof) -> None:
    """The consolidated file in plain PyTorch: torch.load, load_state_dict, and some text"""
    weights = torch.load(plan.folder / "killed.ckpt")["state_dict"]
    model = ByteTransformer()
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    torch.manual_seed(0)
    text = model.eval().generate("def ", 200)
    print("   " + "\n   ".join(text.splitlines()))
    size = (plan.folder / "killed.ckpt").stat().st_size / 1e6
    imported = sorted({name.split(".")[0] for name in sys.modules} & {"lightning", "lightning_resume"})
    proof.add(
        not imported and len(text) > 100,
        "one file, read without Lightning",
        f"{size:.1f} MB, {len(weights)} tensors, torch.load(weights_only=True)",
    )


# -- the plot


def plot(plan: Plan) -> Path:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    wanted, killed, resumed = (curve(plan, name) for name in ("reference", "killed", "resumed"))
    figure, (top, bottom) = pyplot.subplots(
        2, sharex=True, height_ratios=(4, 1), figsize=(10, 6.5), layout="constrained"
    )
    last, first = max(killed), min(resumed)
    for name, run, color, width in (
        ("uninterrupted", wanted, "#a6cee3", 9),
        ("killed", killed, "#1f4e79", 4),
        ("resumed", resumed, "#f28e2b", 1.8),
    ):
        top.plot(list(run), list(run.values()), color=color, linewidth=width, label=name, solid_capstyle="round")
        if run is not wanted:
            bottom.plot(list(run), [run[step] - wanted[step] for step in run], ".", color=color, markersize=width + 4)
    top.plot(last, killed[last], "x", color="#c00000", markersize=14, markeredgewidth=3, zorder=5)
    height = max(wanted.values()) - min(wanted.values())
    top.annotate(
        f"SIGKILL after step {last},\nresumed from the checkpoint of step {first - 1}",
        (last, killed[last]),
        (last + plan.steps * 0.03, killed[last] + 0.25 * height),
        color="#c00000",
        bbox={"color": "white"},
        arrowprops={"arrowstyle": "->", "color": "#c00000", "shrinkB": 10},
    )
    for axes in (top, bottom):
        axes.axvline(plan.steps_per_epoch + 0.5, color="0.6", linestyle=":")
    top.text(plan.steps_per_epoch + 1, max(wanted.values()), "epoch 2", color="0.4", va="top")
    top.set(ylabel="loss (nats per byte)", title="A run that was killed and resumed, drawn over an uninterrupted one")
    top.legend(frameon=False)
    bottom.set(xlabel="step", ylabel="difference")
    if not any(run[step] != wanted[step] for run in (killed, resumed) for step in run):
        bottom.set(ylim=(-1, 1), yticks=[0])
        bottom.text(plan.steps, 0.35, "0 in every step, to the last bit", ha="right", color="0.3")
    path = plan.folder / "loss.png"
    figure.savefig(path, dpi=150)
    return path


def curve(plan: Plan, name: str) -> dict[int, float]:
    """The mean loss of the ranks, by step."""
    by_rank = [plan.journal(name, rank) for rank in range(RANKS)]
    return {
        records[0]["step"]: statistics.fmean(float.fromhex(record["loss"]) for record in records)
        for records in zip(*by_rank, strict=False)  # one rank may have come a step further than the other
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder to write to; emptied first")
    parser.add_argument("--kill-after", type=int, help="kill after this step (default: any of the first epoch)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the steps")
    args = parser.parse_args()
    epoch, save_every = (12, 5) if args.quick else (48, 10)
    kill_step = args.kill_after or random.randrange(save_every + 1, epoch)
    plan = Plan(folder=args.output, steps_per_epoch=epoch, save_every=save_every, kill_after=kill_step)
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    return prove(plan)


def prove(plan: Plan) -> int:
    proof, start = Proof(), time.monotonic()
    stages = (reference, killed_and_resumed, same_weights, one_process, plain_pytorch)
    for number, stage in enumerate(stages, 1):
        print(f"\n{number}. {stage.__doc__} ...", flush=True)
        stage(plan, proof)
    print(f"\n{proof.table()}\n\nThe loss curves: {plot(plan)}. Time: {time.monotonic() - start:.0f} s.")
    if proof.failed:
        print(f"\nDEMO FAILED. Not exact: {'; '.join(proof.failed)}.")
        return 1
    print("The resumed run is the same run.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
