"""The order of samples as a pure function of a few integers, so that any topology can go on from any point of it.

A position is an int that counts samples from the start of the current epoch. Positions run on over both ends of the
epoch: ``length`` is the first of the next epoch and ``-1`` the last of the one before. A step takes the next window of
positions, a rank its slice of the window, and a permutation turns positions into dataset indices.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import operator
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "OrderState",
    "Permutation",
    "Tail",
    "advance",
    "indices",
    "next_epoch",
    "rank_slice",
    "steps_left",
    "window",
    "windows",
]

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Value = TypeVar("Value")

_VERSION = 1
_LARGEST_LENGTH = 2**63 - 1
_LARGEST_TABLE = 4096
_CHUNK = 4096
# a round changes one half only, and at 13 bits a half is 6 bits wide: more rounds than the eight that wide halves need
_ROUNDS = 12
_MASK = 2**64 - 1
_DAMAGED = "the saved position is damaged or was edited: load another checkpoint"


class Tail(str, enum.Enum):
    """What becomes of the samples at the end of an epoch that do not fill a step.

    ``EVEN`` divides them over the ranks. Fewer samples than ranks are added to the step before; where no step of the
    epoch is left to add them to, they open the next epoch.
    ``DROP`` leaves them out: ``state.length - state.consumed`` of them once ``steps_left`` is 0.
    ``CARRY`` fills the last step with the first samples of the next epoch.
    """

    EVEN = "even"
    DROP = "drop"
    CARRY = "carry"


@final
class Permutation:
    """Keyed bijection of ``range(length)`` with random access.

    Nothing is computed before the first index is asked for. Up to 4096 items it is a table, sorted by hashed keys.
    Above, it is an alternating Feistel network (Luby and Rackoff, 1988) on the smallest power of two that holds
    ``length``, applied again while it leaves the range (cycle walking: Black and Rogaway, 2002): under two times on
    average, in O(1) memory. Not for cryptography.

    Args:
        length: Number of items, from 1 to 2**63 - 1.
        seed: Any int of at least 0.
        epoch: Any int of at least 0.

    Raises:
        ValueError: An argument is out of its bounds.
    """

    def __init__(self, length: int, *, seed: int, epoch: int) -> None:
        if not 1 <= length <= _LARGEST_LENGTH:
            raise ValueError(f"length is {length}, but a permutation has 1 to {_LARGEST_LENGTH} items")
        if seed < 0 or epoch < 0:
            raise ValueError(f"seed is {seed} and epoch is {epoch}, but both must be at least 0")
        self._length, self._seed, self._epoch = length, seed, epoch
        width = (length - 1).bit_length()
        self._low_bits = (width + 1) // 2
        self._low_mask = (1 << self._low_bits) - 1
        self._chunks: tuple[tuple[int, Indices], ...] = ()
        self._high_mask = (1 << (width - self._low_bits)) - 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        position = operator.index(position)
        if not 0 <= position < self._length:
            raise IndexError(f"position {position} is outside a permutation of {self._length} items")
        if self._length <= _LARGEST_TABLE:
            return int(self._table[position])
        index = self._encrypt(position)
        while index >= self._length:
            index = self._encrypt(index)
        return index

    def take(self, start: int, stop: int) -> Indices:
        """Returns the indices at positions ``[start, stop)``.

        Raises:
            IndexError: The positions are not a part of ``[0, length)``.
        """
        if not 0 <= start <= stop <= self._length:
            raise IndexError(f"positions [{start}, {stop}) are outside a permutation of {self._length} items")
        if self._length <= _LARGEST_TABLE:
            return np.array(self._table[start:stop])
        if stop - start > _CHUNK:
            return self._compute(start, stop)
        # a few positions cost nearly as much as thousands, and the next ones are asked for next
        numbers = range(start // _CHUNK, -(-stop // _CHUNK))
        parts = [self._chunk(n)[max(0, start - n * _CHUNK) : stop - n * _CHUNK] for n in numbers]
        return np.concatenate(parts or [np.empty(0, dtype=np.int64)])

    def _chunk(self, number: int) -> Indices:
        kept = self._chunks  # two: what is asked for may lie across the end of one
        for known, indices in kept:
            if known == number:
                return indices
        indices = self._compute(number * _CHUNK, min(self._length, (number + 1) * _CHUNK))
        self._chunks = ((number, indices), *kept[:1])
        return indices

    def _compute(self, start: int, stop: int) -> Indices:
        words = self._encrypt_all(np.arange(stop - start, dtype=np.uint64) + np.uint64(start))
        outside = np.flatnonzero(words >= self._length)
        while outside.size:
            words[outside] = self._encrypt_all(words[outside])
            outside = outside[words[outside] >= self._length]
        return words.view(np.int64)  # lossless: no length passes 2**63 - 1

    def _encrypt_all(self, words: Words) -> Words:
        # uint64 arrays take every operator of _encrypt with the same result, but numpy types array * int as signed;
        # one definition for both, since two could come to differ
        return cast("Words", self._encrypt(cast("int", words)))

    def _encrypt(self, word: int) -> int:
        high, low = word >> self._low_bits, word & self._low_mask
        for even, odd in self._round_keys:
            high = high ^ (_mix(low, even) & self._high_mask)
            low = low ^ (_mix(high, odd) & self._low_mask)
        return (high << self._low_bits) | low

    @functools.cached_property
    def _round_keys(self) -> list[tuple[int, int]]:
        keys = [int.from_bytes(self._digest("feistel", number, 8), "little") for number in range(_ROUNDS)]
        return list(zip(keys[::2], keys[1::2], strict=True))

    @functools.cached_property
    def _table(self) -> Indices:
        blocks = -(-self._length // 8)
        digests = b"".join(self._digest("table", number, 64) for number in range(blocks))
        # "<u8" and a stable sort: the same table on every platform
        keys = np.frombuffer(digests, dtype="<u8")[: self._length]
        table: Indices = np.argsort(keys, kind="stable").astype(np.int64)
        return table

    def _digest(self, purpose: str, number: int, size: int) -> bytes:
        text = f"lightning_resume.order.v1/{purpose}/seed={self._seed}/epoch={self._epoch}/round={number}"
        return hashlib.blake2b(text.encode(), digest_size=size).digest()


def _mix(word: int, key: int) -> int:
    """Hashes 64-bit words with the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    # the masks keep Python's unbounded ints equal to numpy's, which wrap
    word = (word * 0x9E3779B97F4A7C15 + key) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderState:
    """Position in the data: a few integers, the same on every rank.

    Attributes:
        seed: Key of the order, of any size.
        length: Samples in the dataset.
        epoch: Which permutation of the dataset position 0 belongs to.
        consumed: Position of the next sample, counted over all ranks. Negative while samples are left of earlier
            epochs; above 0 at the start of an epoch whose first samples filled the last step of the one before.
        batches: Batches that each rank was served in this epoch so far, under whatever topologies.
        tail: What becomes of the samples that do not fill a step.
        shuffle: False for the dataset's own order.
        fingerprint: What identifies the dataset; compared by whoever loads the state, never read here.
        version: Of the order: within one version the same integers always mean the same samples.

    Raises:
        ValueError: A field is of the wrong type or out of its bounds.
    """

    seed: int
    length: int
    epoch: int = 0
    # no upper bound: a step under CARRY may pass the end by any number, and the tail may be changed after it
    consumed: int = 0
    batches: int = 0
    tail: Tail = Tail.EVEN
    shuffle: bool = True
    fingerprint: str = ""
    version: int = _VERSION

    def __post_init__(self) -> None:
        values = vars(self)
        _integer(values, "version", 1, _VERSION, "upgrade lightning-resume to read a newer order")
        _integer(values, "seed", 0, None, "pass a seed of at least 0")
        _integer(values, "length", 1, _LARGEST_LENGTH, "check the dataset: an empty one has no order")
        _integer(values, "epoch", 0, None, "epochs are counted from 0")
        _integer(values, "batches", 0, None, "batches are counted from 0 in every epoch")
        _integer(values, "consumed", -self.epoch * self.length, None, "no sample comes before epoch 0")
        _instance(values, "tail", Tail, f"pass one of {[str(tail) for tail in Tail]}")
        _instance(values, "shuffle", bool, "pass True or False")
        _instance(values, "fingerprint", str, "pass text, empty where there is none")

    def to_dict(self) -> dict[str, int | str | bool]:
        """Returns plain values only, for JSON or any other format."""
        return {**vars(self), "tail": self.tail.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> OrderState:
        """Restores what :meth:`to_dict` returned.

        Raises:
            ValueError: A field is missing, unknown, of the wrong type or out of its bounds, or the version is newer
                than this one; the text names the field, its value and what to do.
        """
        _check_version_and_names(values, {field.name for field in dataclasses.fields(cls)})
        return cls(
            seed=_instance(values, "seed", int, _DAMAGED),
            length=_instance(values, "length", int, _DAMAGED),
            epoch=_instance(values, "epoch", int, _DAMAGED),
            consumed=_instance(values, "consumed", int, _DAMAGED),
            batches=_instance(values, "batches", int, _DAMAGED),
            tail=_saved_tail(values["tail"]),
            shuffle=_instance(values, "shuffle", bool, _DAMAGED),
            fingerprint=_instance(values, "fingerprint", str, _DAMAGED),
            version=_instance(values, "version", int, _DAMAGED),
        )


def steps_left(state: OrderState, *, world_size: int, batch_size: int) -> int:
    """Returns how many steps remain in the epoch; 0 can mean that samples remain which the next epoch will open with.

    Args:
        state: Where to count from.
        world_size: Number of ranks that take a slice of every step, R.
        batch_size: Samples of one rank in one step, B.
    """
    step_size = _step_size(world_size, batch_size)
    remaining = max(0, state.length - state.consumed)
    full, rest = divmod(remaining, step_size)
    if state.tail is Tail.DROP:
        return full
    if state.tail is Tail.CARRY:
        return full + (rest > 0)
    # a step of fewer samples than ranks would leave a rank without one, waiting in the next collective for ever
    return full + (rest >= world_size)


def window(state: OrderState, step: int, *, world_size: int, batch_size: int) -> tuple[int, int]:
    """Returns the positions ``[start, stop)`` of a step of this epoch, counted from ``state`` (0 is the next).

    The last step may be shorter or longer than the others under ``EVEN``, and may pass ``length`` under ``CARRY``.

    Raises:
        ValueError: The epoch has no such step.
    """
    left = steps_left(state, world_size=world_size, batch_size=batch_size)
    if not 0 <= step < left:
        raise ValueError(
            f"step {step} was asked for, but epoch {state.epoch} has {left} steps left from sample {state.consumed} "
            f"of {state.length} at world_size {world_size} and batch_size {batch_size}; go on with next_epoch"
        )
    start = state.consumed + step * world_size * batch_size
    if state.tail is Tail.EVEN and step == left - 1:
        return start, state.length
    return start, start + world_size * batch_size


def windows(state: OrderState, *, world_size: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Yields the :func:`window` of each step that is left of this epoch."""
    counts = {"world_size": world_size, "batch_size": batch_size}
    left, size = steps_left(state, **counts), _step_size(**counts)
    for start in range(state.consumed, state.consumed + (left - 1) * size, size):
        yield start, start + size
    if left:
        yield window(state, left - 1, **counts)


def rank_slice(start: int, stop: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """Returns a rank's contiguous part of a window, even to one sample; earlier ranks get the larger parts.

    Raises:
        ValueError: ``rank`` is not one of ``world_size``, or the window is reversed.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, but must be at least 0 and below world_size, {world_size}")
    if start > stop:
        raise ValueError(f"the window [{start}, {stop}) is reversed; pass start <= stop")
    share, larger = divmod(stop - start, world_size)
    first = start + rank * share + min(rank, larger)
    return first, first + share + (rank < larger)


def advance(state: OrderState, steps: int = 1, *, world_size: int, batch_size: int) -> OrderState:
    """Returns the state after that many steps of the same epoch.

    Raises:
        ValueError: The epoch ends before.
    """
    if steps == 0:
        return state
    _, stop = window(state, steps - 1, world_size=world_size, batch_size=batch_size)
    return dataclasses.replace(state, consumed=stop, batches=state.batches + steps)


def next_epoch(state: OrderState, *, world_size: int, batch_size: int) -> OrderState:
    """Returns the state at the start of the following epoch.

    An epoch that is left while it still has steps gives up its remaining samples, as breaking out of a loop over a
    ``DataLoader`` does. One that ran to its end hands over what its tail says: samples left (``EVEN``) or samples
    already taken (``CARRY``).
    """
    abandoned = steps_left(state, world_size=world_size, batch_size=batch_size) > 0
    passed = 0 if abandoned else state.consumed - state.length
    if state.tail is Tail.DROP:
        passed = max(0, passed)
    return dataclasses.replace(state, epoch=state.epoch + 1, consumed=passed, batches=0)


def indices(state: OrderState, start: int, stop: int) -> Indices:
    """Returns the dataset indices at positions ``[start, stop)``, counted from the start of ``state.epoch``.

    Raises:
        ValueError: The window is reversed, or starts before the first sample of epoch 0.
    """
    if start > stop:
        raise ValueError(f"the window [{start}, {stop}) is reversed; pass start <= stop")
    if start < -state.epoch * state.length:
        raise ValueError(
            f"position {start} of epoch {state.epoch} with {state.length} samples comes before epoch 0; "
            "pass a window that starts at state.consumed or later"
        )
    if 0 <= start <= stop <= state.length:
        return _epoch_indices(state, 0, start, stop)
    parts = [_epoch_indices(state, *span) for span in _spans(start, stop, state.length)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _spans(start: int, stop: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yields (epochs from the current one, first offset, end offset) for every epoch that the positions touch."""
    while start < stop:
        ahead, first = divmod(start, length)
        end = min(length, first + stop - start)
        yield ahead, first, end
        start += end - first


def _epoch_indices(state: OrderState, ahead: int, first: int, end: int) -> Indices:
    if not state.shuffle:
        return np.arange(end - first, dtype=np.int64) + first
    return _permutation(state.length, state.seed, state.epoch + ahead).take(first, end)


# a few, so that a window over the end of an epoch, in training and in validation, rebuilds no table at every step
@functools.lru_cache(maxsize=8)
def _permutation(length: int, seed: int, epoch: int) -> Permutation:
    return Permutation(length, seed=seed, epoch=epoch)


def _step_size(world_size: int, batch_size: int) -> int:
    if world_size < 1 or batch_size < 1:
        raise ValueError(f"world_size is {world_size} and batch_size is {batch_size}, but both must be at least 1")
    return world_size * batch_size


def _instance(values: Mapping[str, object], name: str, kind: type[Value], advice: str) -> Value:
    value = values[name]
    # True is an int in Python, but never a count
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"position in the data: {name} is {value!r}, but must be of type {kind.__name__}; {advice}")
    return value


def _integer(values: Mapping[str, object], name: str, least: int, most: int | None, advice: str) -> None:
    value = _instance(values, name, int, "convert it with int()")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"position in the data: {name} is {value}, but must be {bounds}; {advice}")


def _check_version_and_names(values: Mapping[str, object], names: set[str]) -> None:
    # the version comes first: a newer one may well have other fields, and to upgrade is then the only advice that helps
    if "version" in values:
        _integer(values, "version", 1, _VERSION, "it was saved by a newer lightning-resume: upgrade to load it")
    for name in sorted(names - values.keys()):
        raise ValueError(f"position in the data: {name} is missing from {dict(values)}; {_DAMAGED}")
    for name in sorted(values.keys() - names):
        raise ValueError(f"position in the data: {name} is {values[name]!r}, but no such field is known; {_DAMAGED}")


def _saved_tail(value: object) -> Tail:
    known = [tail.value for tail in Tail]
    if value not in known:
        raise ValueError(f"position in the data: tail is {value!r}, but must be one of {known}; {_DAMAGED}")
    return Tail(value)
