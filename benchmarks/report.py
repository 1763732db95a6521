"""Runs every benchmark and compares what it finds with what is to be reached: figures, tables and a plot.

    python benchmarks/report.py                    # three quarters of an hour
    python benchmarks/report.py --quick            # under three, and rougher
    python benchmarks/report.py --write            # puts the tables and the plot into docs/performance.md
    python benchmarks/report.py --write --of benchmarks.json --only planning  # of an earlier run, but for one part

``--output`` (``benchmarks.json``) holds the ratios by name and all that each benchmark has found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE, PLOT = HERE.parent / "docs" / "performance.md", HERE.parent / "docs" / "performance.png"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

LARGE = {
    "checkpoints": ["--mib=1024", "--rounds=5"],
    "async_save": ["--mib=512", "--rounds=5"],
    "iteration": ["--rounds=7", "--batches=2000"],
    "planning": ["--ranks", "256", "1024"],
    "loaders": ["--rounds=3"],
}
QUICK = {
    "checkpoints": ["--mib=128", "--rounds=3"],
    "async_save": ["--mib=96", "--rounds=2"],
    "iteration": ["--rounds=2", "--batches=400"],
    "planning": ["--ranks", "64"],
    "loaders": ["--rows=30000", "--rounds=1", "--only=parquet", "--only=map-style, 0"],
}
TINY = {
    "checkpoints": ["--mib=48", "--rounds=1"],
    "async_save": ["--mib=1", "--batch=4", "--rounds=1", "--only", "ours", "thread"],
    "iteration": ["--rounds=1", "--batches=30", "--workers", "0"],
    "planning": ["--small"],
    "loaders": [
        *("--rows=6000", "--files=4", "--row-group=300", "--batch-size=32", "--rounds=1"),
        *(
            "--only=ShardedDataset, parquet, 0",
            "--only=make_resumable, map-style, 0",
            "--only=Hugging Face iterable, sh",
        ),
    ],
}
"""To see that all of it runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a ratio of ours, what it should be, and what a user would have otherwise."""

    what: str
    ours: float
    most: float
    stock: float | None = None
    stock_name: str = ""

    @property
    def reached(self) -> bool:
        return self.ours <= self.most


# -- what is read out of the figures


def rows(found: dict[str, Any]) -> Iterator[Row]:
    if "checkpoints" in found:
        yield from _checkpoints(found["checkpoints"])
    if "async_save" in found:
        yield from _background(found["async_save"]["ways"])
    if "iteration" in found:
        yield from _iteration(found["iteration"])
    if "planning" in found:
        yield from _planning(found["planning"]["by_ranks"])


def _checkpoints(checkpoints: dict[str, Any]) -> Iterator[Row]:
    for ranks in (1, 2):
        name = f"{ranks} rank{'s' * (ranks > 1)}"
        of_ranks = checkpoints[f"{ranks} ranks"]
        save, load = of_ranks["save"]["ratio"], of_ranks["load"]["ratio"]
        yield Row(
            what=f"blocking save, hashed and fsynced ÷ raw write and fsync, {name}",
            ours=save["ours"],
            most=1.10,
            stock=save["dcp.save"],
            stock_name="`dcp.save`",
        )
        yield Row(
            what=f"warm verified load ÷ raw read, {name}",
            ours=load["ours"],
            most=1.3,
            stock=load["dcp.load"],
            stock_name="`dcp.load`",
        )
    extra = checkpoints["1 ranks"]["load"]["extra MiB"]
    yield Row(
        what="extra memory of a load, MiB",
        ours=extra["ours"],
        most=16,
        stock=extra["dcp.load"],
        stock_name="`dcp.load`",
    )
    read = checkpoints["2 ranks"]["reshard"]["bytes read of those needed"]
    yield Row(
        what="bytes read ÷ bytes needed, 1 rank's checkpoint on 2",
        ours=read["ours"],
        most=1.05,
        stock=read["dcp.load"],
        stock_name="`dcp.load`",
    )


def _background(ways: dict[str, list[dict[str, Any]]]) -> Iterator[Row]:
    blocking = statistics.median(one["call"] for one in ways["ours, blocking"])
    stalls = {
        name: statistics.median(one["call"] + one["fence"] for one in of_way) / blocking
        for name, of_way in ways.items()
    }
    for staging, most in (("deferred", 0.02), ("now", 0.10)):
        for where in ("thread", "process"):
            yield Row(
                what=f"stall of a save in a {where} ÷ blocking save, copied {staging}",
                ours=stalls[f"ours, {where}, {staging}"],
                most=most,
                stock=stalls["dcp.async_save, thread"],
                stock_name="`dcp.async_save`",
            )
    for where in ("thread", "process"):
        yield Row(
            what=f"steps beside a save in a {where} ÷ without",
            ours=_slowdown(ways[f"ours, {where}, now"]),
            most=1.10,
            stock=_slowdown(ways["dcp.async_save, thread"]),
            stock_name="`dcp.async_save`",
        )


def _slowdown(of_way: list[dict[str, Any]]) -> float:
    return statistics.median(
        statistics.median([one["beside"][0] - one["fence"], *one["beside"][1:]]) / statistics.median(one["before"])
        for one in of_way
    )


def _iteration(found: dict[str, Any]) -> Iterator[Row]:
    for what, measured in found.items():
        ratio = measured["ratio"]
        if "workers" in what and "ours" in ratio and "DataLoader" in ratio:
            yield Row(
                what=f"iteration ÷ plain `DataLoader`: {what}",
                ours=ratio["ours"],
                most=1.03,
                stock=ratio["StatefulDataLoader"],
                stock_name="`StatefulDataLoader`",
            )
    yield Row(
        what="first batch after a resume at 90 % of 10^9 samples ÷ at 0 %",
        ours=found["first batch of 10^9 samples, resumed"]["ratio"]["at 90 %"],
        most=1.1,
    )
    for what, measured in found.items():
        if what.startswith("Trainer"):
            yield Row(
                what=f"{what}, with the callback ÷ without", ours=measured["ratio"]["with ResumeCallback"], most=1.01
            )


def _planning(by_ranks: dict[str, Any]) -> Iterator[Row]:
    planned = {ranks: figures for ranks, figures in by_ranks.items() if "failed" not in figures}
    for ranks, figures in planned.items():
        yield Row(
            what=f"one rank opens a checkpoint of {ranks} ranks and 1000 tensors and finds its part, s",
            ours=figures["one rank opens ours"] + figures["one rank finds its shards in ours"],
            most=0.5,
            stock=figures["one rank unpickles .metadata"],
            stock_name="`.metadata`",
        )
    if len(planned) > 1:
        few, many = next(iter(planned)), next(reversed(planned))
        read = {ranks: planned[ranks]["MB manifest.json"] + planned[ranks][_INDEX_READ] for ranks in (few, many)}
        yield Row(
            what=f"what it reads before it loads, of a checkpoint of {many} ranks ÷ of {few} ranks",
            ours=read[many] / read[few],
            most=1.1,
            stock=planned[many]["MB .metadata"] / planned[few]["MB .metadata"],
            stock_name="`.metadata`",
        )


_INDEX_READ = "MB of .index that one rank reads"


# -- the table and the plot


def table(found: Sequence[Row]) -> str:
    lines = ["| what | ours | to reach | what a user would have otherwise |", "|---|---|---|---|"]
    for row in found:
        ours = f"{row.ours:.2f}" if row.most > 0.1 else f"{row.ours:.3f}"
        stock = "" if row.stock is None else f"{row.stock:.2f} {row.stock_name}"
        lines.append(f"| {row.what} | {ours if row.reached else f'**{ours}**'} | ≤ {row.most:g} | {stock} |")
    return "\n".join(lines)


def loaders_table(loaders: dict[str, Any]) -> str:
    """The first batch after a resume: ours and each anchor, beside the first line."""
    settings, ways = loaders["settings"], [way for way in loaders["ways"] if way["first_batch"]]
    points = list(ways[0]["first_batch"])
    medians = [[statistics.median(way["first_batch"][point]) for point in points] for way in ways]
    head = [f"first batch after {point} %" for point in points]
    lines = [
        f"Seconds to the first batch after a resume, of {settings['rows']:,} rows in {settings['files']} files, in"
        f" batches of {settings['batch_size']}; in brackets ÷ the first line.",
        "",
        f"| loader | {' | '.join(head)} | rows lost | repeated | |",
        f"|---|{'---|' * len(points)}---|---|---|",
    ]
    for way, of_way in zip(ways, medians, strict=True):
        cells = [f"{taken:.3f} ({taken / first:.1f})" for taken, first in zip(of_way, medians[0], strict=True)]
        wrong = [f"{point} %" for point, right in way["first_batch_is_right"].items() if not right]
        remarks = [way["remark"], f"another batch after {', '.join(wrong)}" if wrong else ""]
        cells += [str(way["lost"]), str(way["repeated"]), "; ".join(filter(None, remarks))]
        lines.append(f"| {way['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Sequence[Row], path: Path) -> None:
    """What ours and stock take, as parts of what is to be reached."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = found[::-1]
    figure, axes = pyplot.subplots(figsize=(11, 0.38 * len(shown) + 1.2))
    places = range(len(shown))
    axes.barh([place + 0.2 for place in places], [row.ours / row.most for row in shown], 0.4, label="lightning-resume")
    stock = [(place - 0.2, row.stock / row.most) for place, row in enumerate(shown) if row.stock is not None]
    axes.barh([place for place, _ in stock], [part for _, part in stock], 0.4, label="stock", color="0.75")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(list(places), [row.what.replace("`", "") for row in shown], fontsize=8)
    axes.set_xlabel("÷ what is to be reached (left of the line: reached)")
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def machine() -> dict[str, Any]:
    import torch

    return {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# -- running


def run(
    settings: dict[str, list[str]], folder: str | None, tell: Callable[[str], None]
) -> tuple[dict[str, Any], list[str]]:
    """What each benchmark has found, and what failed."""
    found, failed = {}, []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, options in settings.items():
            output = Path(scratch) / f"{name}.json"
            place = [] if name == "iteration" else [f"--folder={scratch}"]
            command = [sys.executable, str(HERE / f"{name}.py"), *options, *place, f"--output={output}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            tell(done.stdout)
            if done.returncode:
                failed.append(f"{' '.join(command)} failed with exit status {done.returncode}")
            else:
                found[name] = json.loads(output.read_text())
    return found, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true")
    size.add_argument("--tiny", action="store_true", help="only to see that all of it runs")
    parser.add_argument("--folder", help="where to save (default: the folder for temporary files)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.json"))
    parser.add_argument("--write", action="store_true", help="put the tables and the plot into docs/performance.md")
    parser.add_argument("--of", type=Path, help="take the figures from the file of an earlier run")
    parser.add_argument("--only", nargs="+", choices=LARGE, default=[], help="run only these, also with --of")
    options = parser.parse_args()
    settings = QUICK if options.quick else TINY if options.tiny else LARGE
    if options.only or options.of:
        settings = {name: settings[name] for name in settings if name in options.only}
    earlier = json.loads(options.of.read_text()) if options.of else {"found": {}, "about": {"settings": {}}}
    found, failed = run(settings, options.folder, lambda text: print(text, flush=True))
    about = {**earlier["about"], **machine(), "settings": earlier["about"]["settings"] | settings}
    found = earlier["found"] | found
    compared = list(rows(found))
    ratios = [dataclasses.asdict(row) | {"reached": row.reached} for row in compared]
    options.output.write_text(json.dumps({"about": about, "ratios": ratios, "found": found}, indent=1))
    tables = [table(compared)] + ([loaders_table(found["loaders"])] if "loaders" in found else [])
    print("\n\n".join(tables))
    print(f"{sum(row.reached for row in compared)} of {len(compared)} reached; figures in {options.output}")
    plot(compared, PLOT if options.write else options.output.with_suffix(".png"))
    if options.write:
        text = PAGE.read_text()
        told = "\n\n".join([f"{BEGIN}\n{_said(about)}", *tables]) + f"\n{END}"
        PAGE.write_text(text[: text.index(BEGIN)] + told + text[text.index(END) + len(END) :])
    if failed:
        sys.exit("\n".join(failed))


def _said(about: dict[str, Any]) -> str:
    return (
        f"Measured on {about['date']}: {about['cores']} cores, {about['platform']}, Python {about['python']}, torch"
        f" {about['torch']}. **Bold**: not reached."
    )


if __name__ == "__main__":
    main()
