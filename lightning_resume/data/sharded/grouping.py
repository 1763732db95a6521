"""What makes units of samples: a unit is what a batch is made of, and what a lane's position counts.

Each kind of unit can be made again from the position of the first record that it needs: none of the content that is
waiting to be grouped is in a state.
"""

from __future__ import annotations

import abc
import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch

from lightning_resume.data.order import Permutation
from lightning_resume.data.randomness import keyed_seed
from lightning_resume.data.sharded.records import LEFT_OUT, Found, Where

Records = Callable[[Where], Iterator[Found]]
"""The records of a lane from a point on."""


class Unit(NamedTuple):
    """Samples that stay together: one, or a whole batch."""

    identity: tuple[Any, ...]
    """What the batch that begins with it keys its random numbers by."""
    after: Where
    found: Found | None
    """The one sample, not made yet."""
    kept: Any
    samples: list[Any]
    lane: str = ""
    """Which lane it is from, where units of several come together."""

    def contents(self) -> list[Any]:
        """What its samples were decoded from, None for one that something else was made of."""
        if self.found is not None:
            return [self.found.maker.content_of(self.found)]
        return [one.found.maker.content_of(one.found) if isinstance(one, Made) else None for one in self.samples]

    def made(self) -> list[Any]:
        if self.found is None:
            return [one.sample if isinstance(one, Made) else one for one in self.samples]
        maker = self.found.maker
        sample = maker.kept(self.found) if self.kept is LEFT_OUT else self.kept
        return [maker.transformed(self.found, sample)]


class Group(abc.ABC):
    """How samples are grouped."""

    name: str
    """Says all that the position depends on: another one is another order."""
    makes_batches = False
    """Whether a unit is a batch."""

    @abc.abstractmethod
    def units(self, records: Records, where: Where, *, batch_size: int, key: tuple[Any, ...]) -> Iterator[Unit]:
        """The units of a lane from ``where`` on. ``key`` is that of the order."""


@final
class Samples(Group):
    """Units are samples."""

    name = "samples"

    def units(self, records: Records, where: Where, *, batch_size: int, key: tuple[Any, ...]) -> Iterator[Unit]:
        for found in records(where):
            if found.maker.filter is None:  # decoded when it is known that this rank takes it
                yield Unit(found.identity, found.after, found, LEFT_OUT, [])
                continue
            kept = found.maker.kept(found)
            if kept is not LEFT_OUT:
                yield Unit(found.identity, found.after, found, kept, [])


class Made(NamedTuple):
    """A sample, with the record that it comes from."""

    found: Found
    sample: Any


def samples_of(records: Records, where: Where) -> Iterator[Made]:
    """The samples, made."""
    for found in records(where):
        kept = found.maker.kept(found)
        if kept is not LEFT_OUT:
            yield Made(found, found.maker.transformed(found, kept))


@final
class Packing(Group):
    """Concatenates the tokens of samples to sequences of one length, for language models.

    A sample is a list, array or tensor of token numbers, or a dict with one under ``key``; a ``transform`` is where a
    tokenizer goes. A sequence is ``{"input_ids": tensor of length}``, and with ``segments`` also ``"segment_ids"``
    (1, 2, ... for the samples in it, 0 for padding) and ``"position_ids"`` (from 0 in each of them).

    Args:
        length: Tokens in a sequence.
        key: Under which the tokens of a sample are; None for samples that are tokens.
        eos: A token that is put after each sample.
        across: Whether a sample may go on in the next sequence. If not, one that does not fit into what is left of a
            sequence begins the next, and is cut to ``length``; every sequence is padded.
        last: What becomes of the last sequence of a lane: ``"pad"`` or ``"drop"``.
        pad: The token for padding.
        segments: Whether ``"segment_ids"`` and ``"position_ids"`` are given.
    """

    def __init__(
        self,
        length: int,
        *,
        key: str | None = None,
        eos: int | None = None,
        across: bool = True,
        last: str = "pad",
        pad: int = 0,
        segments: bool = False,
    ) -> None:
        if length < 1:
            raise ValueError(f"length is {length}; a sequence has at least 1 token.")
        if last not in ("pad", "drop"):
            raise ValueError(f"last is {last!r}; pass 'pad' or 'drop'.")
        self._length, self._key, self._eos, self._across = length, key, eos, across
        self._last, self._pad, self._segments = last, pad, segments
        self.name = f"packing, length={length}, key={key}, eos={eos}, across={across}, last={last}"

    def units(self, records: Records, where: Where, *, batch_size: int, key: tuple[Any, ...]) -> Iterator[Unit]:
        # all but the last number of a position is where the first sample in the sequence begins
        skip = where[-1] if where else 0
        parts: list[_Part] = []
        room = self._length
        for found, sample in samples_of(records, where[:-1]):
            tokens = self._tokens(found, sample)
            begin, skip = min(skip, len(tokens)), 0
            if not self._across:
                tokens = tokens[: self._length]
                if len(tokens) > room and parts:
                    yield self._sequence(parts, (*found.before, 0))
                    parts, room = [], self._length
            while begin < len(tokens):
                taken = min(room, len(tokens) - begin)
                parts.append(_Part(found, tokens[begin : begin + taken], begin))
                begin, room = begin + taken, room - taken
                if not room:
                    after = (*found.before, begin) if begin < len(tokens) else (*found.after, 0)
                    yield self._sequence(parts, after)
                    parts, room = [], self._length
        if parts and self._last == "pad":
            yield self._sequence(parts, (*parts[-1].found.after, 0))

    def _tokens(self, found: Found, sample: Any) -> torch.Tensor:
        values = sample
        if self._key is None and isinstance(sample, Mapping):
            raise ValueError(
                f"{found.url}: a sample is a dict with {list(sample)}; pass Packing the `key` of its tokens."
            )
        if self._key is not None:
            if self._key not in sample:
                raise ValueError(f"{found.url}: a sample has no {self._key!r}; it has {list(sample)}.")
            values = sample[self._key]
        if isinstance(values, (str, bytes)):
            raise ValueError(f"{found.url}: a sample to pack is text; make it tokens in `transform`.")
        tokens = torch.as_tensor(values)
        if tokens.dim() != 1 or (len(tokens) and tokens.is_floating_point()):
            raise ValueError(
                f"{found.url}: a sample to pack is one list of whole numbers, not {type(values).__name__} of"
                f" shape {tuple(tokens.shape)} and {tokens.dtype}. Name its `key`, or tokenize it in `transform`."
            )
        tokens = tokens.to(torch.int64)  # an empty list has become a tensor of floats
        return tokens if self._eos is None else torch.cat([tokens, tokens.new_tensor([self._eos])])

    def _sequence(self, parts: list[_Part], after: Where) -> Unit:
        tokens = torch.full((self._length,), self._pad, dtype=torch.int64)
        segments, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
        at = 0
        for number, part in enumerate(parts, 1):
            end = at + len(part.tokens)
            tokens[at:end] = part.tokens
            segments[at:end] = number
            positions[at:end] = torch.arange(end - at)
            at = end
        sequence = {self._key or "input_ids": tokens}
        if self._segments:
            sequence |= {"segment_ids": segments, "position_ids": positions}
        return Unit((*parts[0].found.identity, parts[0].begin), after, None, None, [sequence])


class _Part(NamedTuple):
    """Tokens of one sample, from its ``begin``-th on."""

    found: Found
    tokens: torch.Tensor
    begin: int


@final
class BatchByLength(Group):
    """Makes batches of samples of similar length, so that little is padded.

    The next ``window`` samples of a lane are sorted by length and divided into batches, which come in keyed order.
    Name a ``max_tokens`` for batches that hold as many samples as fit when all are padded to the longest; without it a
    batch holds ``batch_size`` samples of one bucket.

    Args:
        key: The length of a sample.
        max_tokens: The most that a batch may hold, padding included. A longer sample is a batch of its own.
        boundaries: Lengths at which buckets begin: no batch has samples of two.
        window: Samples that are sorted together.
        shuffle: Whether the batches of a window come in permuted order.
    """

    makes_batches = True

    def __init__(
        self,
        *,
        key: Callable[[Any], int] = len,
        max_tokens: int | None = None,
        boundaries: Sequence[int] = (),
        window: int = 1024,
        shuffle: bool = True,
    ) -> None:
        if window < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"window is {window} and max_tokens is {max_tokens}; pass at least 1.")
        if list(boundaries) != sorted(set(boundaries)):
            raise ValueError(f"boundaries are {list(boundaries)}; pass lengths in rising order.")
        self._key, self._most, self._boundaries = key, max_tokens, tuple(boundaries)
        self._window, self._shuffle = window, shuffle
        self.name = f"by length, {max_tokens=}, boundaries={list(boundaries)}, {window=}, {shuffle=}"

    def units(self, records: Records, where: Where, *, batch_size: int, key: tuple[Any, ...]) -> Iterator[Unit]:
        # a window that was begun at another batch size is finished at that one: its batches are divided already
        served, begun_with = where[-2:] if where else (0, 0)
        samples = samples_of(records, where[:-2])
        while window := list(itertools.islice(samples, self._window)):
            begin, end = window[0][0].before, window[-1][0].after
            size = begun_with or batch_size
            batches = self._batches(window, size, (*key, *window[0][0].identity))
            for number, batch in enumerate(batches[served:], served + 1):
                after = (*end, 0, 0) if number == len(batches) else (*begin, number, size)
                yield Unit(batch[0].found.identity, after, None, None, list(batch))
            served = begun_with = 0

    def _batches(self, window: list[Made], batch_size: int, key: tuple[Any, ...]) -> list[list[Made]]:
        lengths = [self._key(sample) for _, sample in window]
        buckets = [bisect.bisect(self._boundaries, length) for length in lengths]
        batches: list[list[Made]] = []
        previous = -1
        for n in sorted(range(len(window)), key=lengths.__getitem__):
            same_bucket = previous >= 0 and buckets[n] == buckets[previous]
            if not same_bucket or self._is_full(len(batches[-1]), lengths[n], batch_size):
                batches.append([])
            batches[-1].append(window[n])
            previous = n
        order = Permutation(len(batches), seed=keyed_seed("batches", *key), epoch=0) if self._shuffle else None
        return batches if order is None else [batches[n] for n in order.take(0, len(batches)).tolist()]

    def _is_full(self, count: int, length: int, batch_size: int) -> bool:
        """Whether a batch of ``count`` samples has no room for one of ``length``, the longest."""
        return count >= batch_size if self._most is None else (count + 1) * length > self._most
