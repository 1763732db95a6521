"""The command ``lightning-resume``: each subcommand parses, calls one public function, prints, returns a code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from lightning_resume.errors import ResumeError
from lightning_resume.export.consolidate import consolidate


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 with one message on stderr when the command could not do its work."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ResumeError, OSError) as error:
        print(f"lightning-resume: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-resume", description="Checkpoints that resume the same run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_consolidate(commands)
    return parser


def _add_consolidate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "write a checkpoint folder into one file that torch.load reads"
    command = commands.add_parser("consolidate", help=about, description=about)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint folder, ours or stock sharded")
    command.add_argument("--output", metavar="FILE", help="the file to write (default: CHECKPOINT.consolidated)")
    command.add_argument("--trust", action="store_true", help="load objects of any class; they can run code")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_run_consolidate)


def _run_consolidate(options: argparse.Namespace) -> int:
    output = str(consolidate(options.checkpoint, options.output, trust=options.trust))
    print(json.dumps({"output": output}) if options.json else output)
    return 0
