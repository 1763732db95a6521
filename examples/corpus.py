"""Text in parquet files, made of what every machine has: the sources of Python's standard library and packages.

    python examples/corpus.py corpus --megabytes 300

The same sources give the same files. A row is a piece of one source file, of whole lines where they are short enough:
`id` (rows are numbered from 0 over all files), `path` and `text`.
"""

import argparse
import itertools
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".md", ".rst", ".txt"}
SCHEMA = pa.schema({"id": pa.int64(), "path": pa.string(), "text": pa.string()})


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What was written."""

    files: int
    row_groups: int
    rows: int
    text_bytes: int
    file_bytes: int


def write_corpus(
    folder: Path, *, megabytes: float, row_bytes: int = 4096, row_group: int = 256, file_megabytes: float = 16
) -> Corpus:
    """Writes so many megabytes of text into parquet files below `folder`; where sources run out, it begins again.

    Args:
        folder: Where to; it is made.
        megabytes: How much text, as UTF-8.
        row_bytes: The most that a row holds.
        row_group: Rows of a row group.
        file_megabytes: Text of a file.

    Raises:
        FileExistsError: There are parquet files in `folder`, which would become a part of the corpus.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.parquet")):
        raise FileExistsError(f"There are parquet files in {folder}. Remove them, or name another folder.")
    rows = limited(itertools.chain.from_iterable(pieces(row_bytes) for _ in itertools.count()), megabytes * 1e6)
    files = row_groups = first = text_bytes = 0
    while batch := list(limited(rows, file_megabytes * 1e6)):
        paths, texts = zip(*batch, strict=True)
        table = pa.table([range(first, first + len(batch)), paths, texts], schema=SCHEMA)
        pq.write_table(table, folder / f"part-{files:05d}.parquet", row_group_size=row_group)
        files, row_groups, first = files + 1, row_groups - len(batch) // -row_group, first + len(batch)
        text_bytes += sum(len(text.encode()) for text in texts)
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.parquet"))
    return Corpus(files=files, row_groups=row_groups, rows=first, text_bytes=text_bytes, file_bytes=file_bytes)


def limited(rows: Iterator[tuple[str, str]], size: float) -> Iterator[tuple[str, str]]:
    """Rows until their text has `size` bytes; takes none from `rows` that it does not give."""
    taken = 0
    while taken < size and (row := next(rows, None)) is not None:
        taken += len(row[1].encode())
        yield row


def pieces(row_bytes: int) -> Iterator[tuple[str, str]]:
    """The path and text of each piece of each source."""
    for root in roots():
        for file in sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
            name = str(file.relative_to(root))
            for text in cut(file.read_text(encoding="utf-8", errors="replace"), row_bytes):
                yield name, text


def roots() -> list[Path]:
    """The folders of the standard library and of the installed packages, each once."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")))


def cut(text: str, row_bytes: int) -> Iterator[str]:
    """Pieces of at most `row_bytes`, cut at the ends of lines but for lines that are longer."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        for part in broken(line, row_bytes):
            length = len(part.encode())
            if size + length > row_bytes:
                yield "".join(lines)
                lines, size = [], 0
            lines.append(part)
            size += length
    if lines:
        yield "".join(lines)


def broken(line: str, row_bytes: int) -> list[str]:
    """The line, in parts that are surely not longer than `row_bytes`: a character has up to four bytes."""
    if len(line.encode()) <= row_bytes:
        return [line]
    step = row_bytes // 4
    return [line[at : at + step] for at in range(0, len(line), step)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--megabytes", type=float, default=300, help="how much text")
    parser.add_argument("--row-bytes", type=int, default=4096, help="the most that a row holds, at least 4")
    parser.add_argument("--row-group", type=int, default=256, help="rows of a row group")
    parser.add_argument("--file-megabytes", type=float, default=16, help="text of a file")
    args = parser.parse_args()
    made = write_corpus(**vars(args))
    print(
        f"{made.rows:,} rows in {made.files} files, {made.row_groups} row groups: {made.text_bytes / 1e6:.1f} MB of"
        f" text, {made.file_bytes / 1e6:.1f} MB on disk."
    )


if __name__ == "__main__":
    main()
