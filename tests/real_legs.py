"""What the real run runs: its legs, in a tiny and a large setting, and the text that it trains on."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
EPOCHS = 2
SECONDS = 280  # to write the text


class Kill(enum.Enum):
    ANY_MOMENT = "at a random moment"
    IN_A_SAVE = "while a save was on its way"
    NEVER = "not killed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leg:
    """One start of the run, until it is killed somewhere between two points, in epochs since the run began."""

    ranks: int
    workers: int
    batch_size: int
    kill: Kill = Kill.NEVER
    between: tuple[float, float] = (EPOCHS, EPOCHS)

    def __str__(self) -> str:
        return f"{self.ranks} x {self.workers}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    megabytes: float
    row_bytes: int
    row_group: int
    file_megabytes: float
    save_every: int
    legs: tuple[Leg, ...]


def legs(batch_size: int, *, two_epochs: bool) -> tuple[Leg, ...]:
    """Two kills as in the issue; with ``two_epochs`` a third one in the second epoch, and a fourth topology."""
    third = Leg(ranks=3, workers=0, batch_size=batch_size // 2)
    return (
        Leg(ranks=2, workers=2, batch_size=batch_size, kill=Kill.ANY_MOMENT, between=(0.2, 0.3)),
        Leg(ranks=1, workers=3, batch_size=batch_size, kill=Kill.IN_A_SAVE, between=(0.45, 0.7)),
        *([dataclasses.replace(third, kill=Kill.ANY_MOMENT, between=(1.1, 1.6))] if two_epochs else [third]),
        *([Leg(ranks=2, workers=1, batch_size=batch_size)] if two_epochs else []),
    )


TINY = Setting(
    megabytes=1.5,
    row_bytes=4096,
    row_group=16,
    file_megabytes=0.1,
    save_every=3,
    legs=legs(8, two_epochs=False),
)
LARGE = Setting(
    megabytes=400,
    row_bytes=4096,
    row_group=256,
    file_megabytes=16,
    save_every=25,
    legs=legs(128, two_epochs=True),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    folder: Path
    summary: str
    """What corpus.py says that it has made."""
    first_row: dict[str, int]
    """The number of the first row of each file."""
    rows: int
    row_groups: int

    def names_of(self, ids: set[int]) -> set[str]:
        """The files that hold one of these rows."""
        ends = [*list(self.first_row.values())[1:], self.rows]
        files = zip(self.first_row.items(), ends, strict=True)
        return {name for (name, first), end in files if not ids.isdisjoint(range(first, end))}


def make_data(folder: Path, setting: Setting) -> Data:
    sizes = ("megabytes", "row_bytes", "row_group", "file_megabytes")
    options = [f"--{name.replace('_', '-')}={getattr(setting, name)}" for name in sizes]
    command = [sys.executable, str(EXAMPLES / "corpus.py"), str(folder), *options]
    made = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    footers = {file.name: pq.read_metadata(file) for file in sorted(folder.glob("*.parquet"))}
    starts = itertools.accumulate((footer.num_rows for footer in footers.values()), initial=0)
    return Data(
        folder=folder,
        summary=made.stdout.strip(),
        first_row=dict(zip(footers, starts, strict=False)),
        rows=sum(footer.num_rows for footer in footers.values()),
        row_groups=sum(footer.num_row_groups for footer in footers.values()),
    )
