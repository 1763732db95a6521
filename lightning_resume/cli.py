"""The command ``lightning-resume``: each subcommand parses, calls one public function, prints, returns a code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

from lightning_resume.checkpoint.retention import KeepBest, KeepEvery, KeepLast
from lightning_resume.errors import ResumeError
from lightning_resume.export.consolidate import consolidate
from lightning_resume.manager import list_checkpoints, prune
from lightning_resume.verification import verify

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 with one message on stderr when the command could not do its work."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ResumeError, OSError, ValueError) as error:
        print(f"lightning-resume: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-resume", description="Checkpoints that resume the same run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_list(commands)
    _add_verify(commands)
    _add_prune(commands)
    _add_consolidate(commands)
    return parser


def _add(
    commands: Commands, name: str, about: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=run)
    return command


def _add_list(commands: Commands) -> None:
    command = _add(commands, "list", "list the complete checkpoints of a run, newest first", _run_list)
    command.add_argument("root", metavar="RUN", help="the run folder, a path or URL")


def _run_list(options: argparse.Namespace) -> int:
    found = list_checkpoints(options.root)
    if options.json:
        print(json.dumps([dataclasses.asdict(info) for info in found]))
    if not found:
        print(f"No complete checkpoint in {options.root}.", file=sys.stderr)
    for info in () if options.json else found:
        metrics = " ".join(f"{name}={value:.6g}" for name, value in info.metrics.items())
        print(f"{info.path}  {info.created}  {_size(info.bytes)}  {metrics}{'' if info.finite else '  NOT FINITE'}")
    return 0


def _add_verify(commands: Commands) -> None:
    command = _add(commands, "verify", "compare all of a checkpoint with its hashes", _run_verify)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint folder, a path or URL")


def _run_verify(options: argparse.Namespace) -> int:
    done = verify(options.checkpoint, progress=False if options.json else None)
    text = f"{options.checkpoint} is whole: {done.files} files, {_size(done.bytes)}, {done.seconds:.2f} s"
    print(json.dumps({"checkpoint": options.checkpoint, **dataclasses.asdict(done)}) if options.json else text)
    return 0


def _add_prune(commands: Commands) -> None:
    about = "delete what unfinished saves left in a run folder, and checkpoints not to be kept"
    command = _add(commands, "prune", about, _run_prune)
    command.add_argument("root", metavar="RUN", help="the run folder, a path or URL, into which nothing is being saved")
    command.add_argument("--keep-last", type=int, metavar="N", help="keep the newest N")
    command.add_argument("--keep-best", metavar="K:METRIC[:max]", help="keep the K best by a metric, the least or max")
    command.add_argument("--keep-every", type=int, metavar="STEPS", help="keep one in every so many steps")
    command.add_argument("--dry-run", action="store_true", help="only print what would be deleted")


def _run_prune(options: argparse.Namespace) -> int:
    policies = [
        *([] if options.keep_last is None else [KeepLast(options.keep_last)]),
        *([] if options.keep_best is None else [_keep_best(options.keep_best)]),
        *([] if options.keep_every is None else [KeepEvery(steps=options.keep_every)]),
    ]
    deleted = prune(options.root, keep=policies or None, dry_run=options.dry_run)
    print(json.dumps({"deleted": deleted, "dry_run": options.dry_run}) if options.json else "\n".join(deleted))
    return 0


def _keep_best(text: str) -> KeepBest:
    count, _, rest = text.partition(":")
    monitor, mode = (rest[:-4], rest[-3:]) if rest.endswith((":max", ":min")) else (rest, "min")
    if not count.isdecimal() or not monitor:
        raise ValueError(f"--keep-best is {text!r}; pass for example 2:val_loss or 2:val_accuracy:max.")
    return KeepBest(int(count), monitor, mode)


def _add_consolidate(commands: Commands) -> None:
    command = _add(
        commands, "consolidate", "write a checkpoint folder into one file that torch.load reads", _run_consolidate
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint folder, ours or stock; a path or URL")
    command.add_argument("--output", metavar="FILE", help="the file to write (default: CHECKPOINT.consolidated)")
    command.add_argument("--trust", action="store_true", help="load objects of any class; they can run code")


def _run_consolidate(options: argparse.Namespace) -> int:
    output = str(consolidate(options.checkpoint, options.output, trust=options.trust))
    print(json.dumps({"output": output}) if options.json else output)
    return 0


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
