"""What lanes are lanes of: files, and what a state says of them."""

from __future__ import annotations

import abc
import bisect
import dataclasses
import functools
import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, final

from lightning_resume.data.randomness import keyed_seed
from lightning_resume.data.sharded import listing
from lightning_resume.data.sharded.files import Files, Shard, difference, fingerprint
from lightning_resume.data.sharded.formats.format import Format, Piece
from lightning_resume.data.sharded.lanes import Cursor, Lane, deal
from lightning_resume.data.sharded.records import FileLane, LaneReader
from lightning_resume.errors import CheckpointMismatchError

_LARGEST = 2**30
"""Bytes that a saved table of files may unpack to."""


_EPOCHS_KEPT = 2
"""Of which it is known how the files are dealt: an epoch may take up what another has left."""


class LaneSource(abc.ABC):
    """Divides an epoch into lanes, in the main process."""

    kind: str
    """What a checkpoint is compared by: another kind is another order."""
    resume_cost: str
    reader: LaneReader

    @abc.abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What has to be the same for a position to mean the same, by the name of the argument."""

    @abc.abstractmethod
    def data(self) -> Mapping[str, str]:
        """What tells the data from other data, in words."""

    def agree(self, *, fresh: bool) -> None:
        """Takes rank 0's view of what ranks may see differently: files. A collective.

        ``fresh`` says that no position depends on it yet.
        """

    @abc.abstractmethod
    def lane(self, lane: Lane, lanes: int, cursor: Cursor) -> Any:
        """What a reading process is told of a lane of ``lanes``, to go on from ``cursor``: plain values."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abc.abstractmethod
    def check(self, state: Mapping[str, Any]) -> None:
        """Raises :class:`CheckpointMismatchError` when ``state`` is of other data; changes nothing."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def grow(self, epoch: int) -> None:
        """Takes in, from ``epoch`` on, what has come since the state was saved."""


@final
class FileSource(LaneSource):
    """The files of a dataset.

    Args:
        files: As they were listed.
        format: Of all of them.
        reader: Reads their lanes.
        shuffle: Whether files, and records within windows, are permuted.
        seed: Key of the order.
        window: Records in a window.
        append_files: Whether there may be files that a saved state does not know.
    """

    def __init__(
        self,
        files: Files,
        format: Format,
        reader: LaneReader,
        *,
        shuffle: bool,
        seed: int,
        window: int,
        append_files: bool = False,
    ) -> None:
        self.files, self.reader, self._format = files, reader, format
        self._shuffle, self._seed, self._window, self._append = shuffle, seed, window, append_files
        self.kind = f"streamed {format.name}, {'shuffled' if shuffle else 'sequential'}"
        self.resume_cost = format.resume_cost
        self._listed = files.shards
        self._warned = False
        self._adopt(files.shards, [(0, len(files.shards))])

    def _adopt(self, shards: Sequence[Shard], grown: list[tuple[int, int]]) -> None:
        self._shards, self._grown = tuple(shards), grown
        self._packed: bytes | None = None
        self._dealt: dict[tuple[int, int], list[tuple[Piece, ...]]] = {}

    def facts(self) -> Mapping[str, Any]:
        return {"window": self._window, "seed": self._seed}

    def data(self) -> Mapping[str, str]:
        return {"files": f"{len(self._shards)}, of fingerprint {fingerprint(self._shards)}", "grown": str(self._grown)}

    def agree(self, *, fresh: bool) -> None:
        mine = dataclasses.replace(self.files, shards=tuple(self._listed))
        of_all = listing.of_all_ranks(lambda: mine)
        if fresh and of_all.shards != tuple(self._listed):
            self._adopt(of_all.shards, [(0, len(of_all.shards))])
        self._listed = of_all.shards

    def lane(self, lane: Lane, lanes: int, cursor: Cursor) -> FileLane:
        if (lane.epoch, lanes) not in self._dealt:
            while len(self._dealt) >= _EPOCHS_KEPT:
                del self._dealt[next(iter(self._dealt))]
            self._dealt[lane.epoch, lanes] = self._deal(lane.epoch, lanes)
        pieces = self._dealt[lane.epoch, lanes][lane.number]
        first = cursor.place[0] if cursor.place else 0
        return FileLane(lane.epoch, first, pieces[first:])

    def _deal(self, epoch: int, lanes: int) -> list[tuple[Piece, ...]]:
        shards = self._shards[: self._shards_of(epoch)]
        seed = keyed_seed("shards", self._seed)
        can_split = self._format.can_split
        dealt = deal(shards, lanes=lanes, seed=seed, epoch=epoch, shuffle=self._shuffle, can_split=can_split)
        if not all(can_split(shard.path) for shard in shards):
            self._warn_of_empty(dealt, len(shards))
        return dealt

    def _warn_of_empty(self, dealt: Sequence[Sequence[Piece]], shards: int) -> None:
        empty = sum(not pieces for pieces in dealt)
        if empty and not self._warned:
            self._warned = True
            warnings.warn(
                f"{empty} of {len(dealt)} lanes have nothing to read: there are {shards} {self._format.name} files,"
                " which cannot be split. The processes that read these lanes are idle, and ranks read what is left"
                " together. Write more files, or use fewer workers or `lanes`.",
                stacklevel=2,
            )

    def _shards_of(self, epoch: int) -> int:
        return self._grown[max(0, bisect.bisect([first for first, _ in self._grown], epoch) - 1)][1]

    def state_dict(self) -> dict[str, Any]:
        if self._packed is None:
            self._packed = _to_bytes(self._shards)
        return {"files": self._packed, "grown": [list(entry) for entry in self._grown]}

    def check(self, state: Mapping[str, Any]) -> None:
        saved = _from_bytes(state["files"])
        changed = difference(saved, self._listed)
        if not changed or (changed.only_added and self._append):
            return
        if changed.only_added:
            advice = (
                "Files have come since. Pass `append_files=True` to finish this epoch without them and read them from"
                " the next one on, or take them away."
            )
        else:
            advice = (
                "Another set of files is another order: samples would repeat or be lost. Put the files back as they"
                " were, or start anew. (`fabric.load(..., strict=False)` leaves this loader's position out.)"
            )
        raise CheckpointMismatchError(
            "loader",
            "files",
            saved=f"{len(saved)} files",
            current=f"{len(self._listed)} files below {self.files.root}: {changed}",
            advice=advice,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        grown = [(int(epoch), int(shards)) for epoch, shards in state["grown"]]
        self._adopt(_from_bytes(state["files"]), grown)

    def grow(self, epoch: int) -> None:
        known = {shard.path for shard in self._shards}
        new = tuple(shard for shard in self._listed if shard.path not in known)
        if new:
            shards = (*self._shards, *new)
            self._adopt(shards, [*self._grown, (epoch, len(shards))])


def _to_bytes(shards: Sequence[Shard]) -> bytes:
    content = [[shard.path, shard.size] for shard in shards]
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 6)


@functools.lru_cache(maxsize=4)
def _from_bytes(data: bytes) -> tuple[Shard, ...]:
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(data, _LARGEST)
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise ValueError("it does not end where it should")
        return tuple(Shard(path=str(path), size=int(size)) for path, size in json.loads(content))
    except (zlib.error, TypeError, ValueError) as error:
        raise ValueError(f"The saved list of files is damaged ({error}): load another checkpoint.") from error
