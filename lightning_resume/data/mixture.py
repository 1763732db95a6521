"""Several map-style datasets as one, by weight: which dataset a position belongs to is a pure function of the position.

Positions come in blocks of ``K``. Of those in the first ``b`` blocks, ``b * K * w_d`` belong to dataset ``d``, rounded
to the nearest; what rounding leaves over is the largest dataset's. So no weight ever drifts, however long the run, and
both a block's counts and what came before it are arithmetic. Within a block a keyed permutation shuffles the datasets.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from lightning_resume.data import order
from lightning_resume.data.fingerprint import fingerprint
from lightning_resume.data.randomness import Request, SampleSeeds, fetch, keyed_seed, keys_each_sample
from lightning_resume.data.source import Permuted, Source
from lightning_resume.errors import CheckpointMismatchError

_USUAL_BLOCK = 1000
_LARGEST_BLOCK = 1_000_000  # a block's table is made whenever a run enters it
_BLOCKS_KEPT = 4  # training and validation, each at the edge of two


@final
class Mixture(Dataset[Any]):
    """Draws from several datasets by weight: ``DataLoader(Mixture([a, b], [0.9, 0.1]), batch_size=32, shuffle=True)``.

    In each block of positions every dataset has its exact number of samples, at places that are shuffled. Each dataset
    comes in its own order and its own epochs, which go on over the epochs of the mixture: a large one that an epoch of
    the mixture does not exhaust goes on where it was. Under a loader of ours (``make_resumable``, Trainer, Fabric) the
    state is a few integers, and world size, workers and batch size may change. A sample's random numbers are keyed by
    its dataset, that dataset's epoch and its index there.

    Args:
        datasets: Map-style datasets; one that has an ``order_source`` (ours) keeps its own order.
        weights: One number of at least 0 for each, of any sum; by default the datasets' lengths. Each is taken for the
            decimal number that it prints as, so 0.1 is a tenth. Where a block cannot hold a weight exactly the count
            alternates and stays within half a sample of it over the whole run, that of the largest weight within half a
            sample for each other dataset. A dataset of weight 0 is not used.
        length: Samples in an epoch of the mixture; by default as ``stop`` says.
        seed: Key of the places of the datasets; the loader's seed keys the samples.
        stop: ``"first_exhausted"`` (default): an epoch ends when the first dataset has been seen once, to within the
            rounding above. ``"all_exhausted"``: when each has been seen at least once.
        block_size: Positions in a block; by default about 1000, or as many as an epoch has, that suit the weights.

    Raises:
        ValueError: An argument does not fit the others; the text says what to pass.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        weights: Sequence[float] | None = None,
        *,
        length: int | None = None,
        seed: int = 0,
        stop: Literal["first_exhausted", "all_exhausted"] | None = None,
        block_size: int | None = None,
    ) -> None:
        self.datasets = listed(datasets)
        self.seed = seed
        for number, dataset in enumerate(self.datasets):
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise TypeError(
                    f"Dataset {number} of the mixture is a {type(dataset).__name__}, which has no length or no"
                    " `__getitem__`. Streams are mixed by `StreamMixture`."
                )
        self._in_order = [source_of(dataset, shuffle=False) for dataset in self.datasets]
        lengths = [source.length for source in self._in_order]
        self.shares = shares_of(lengths if weights is None else weights, lengths)
        if length is not None and (stop is not None or length < 1):
            raise ValueError(f"length is {length} and stop is {stop!r}: pass one of them, and a length of at least 1.")
        self._length = _length(self.shares, lengths, stop or "first_exhausted") if length is None else length
        self.blocks = Blocks(self.shares, block_size, length=self._length)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        """The sample at a position of the first epoch (the datasets unshuffled), or at (dataset, its index)."""
        dataset, own = self._locate(index)
        return self.datasets[dataset][own]

    def fetch_keyed(self, indices: Sequence[Any], seeds: SampleSeeds) -> list[Any]:
        """The samples at ``indices``, each dataset asked once for all of its own."""
        places = [self._locate(index) for index in indices]
        samples: list[Any] = [None] * len(places)
        for number, dataset in enumerate(self.datasets):
            mine = [n for n, (of, _) in enumerate(places) if of == number]
            if mine:
                found = fetch(dataset, [places[n][1] for n in mine], seeds.part(mine))
                for n, sample in zip(mine, found, strict=True):
                    samples[n] = sample
        return samples

    def order_source(self, *, shuffle: bool) -> MixtureSource:
        """Where an elastic loader takes its order from."""
        sources = [source_of(dataset, shuffle=shuffle) for dataset in self.datasets]
        return MixtureSource(self, sources, shuffle=shuffle)

    @property
    def keys_each_sample(self) -> bool:
        return all(map(keys_each_sample, self.datasets))

    @property
    def fingerprint(self) -> str:
        parts = [f"{share} {part}" for share, part in zip(self.shares, self.parts(), strict=True)]
        return f"Mixture({', '.join(parts)}, seed={self.seed})"

    def parts(self) -> list[str]:
        """What identifies each of the datasets."""
        lengths = [source.length for source in self._in_order]
        pairs = zip(self.datasets, lengths, strict=True)
        return [f"{fingerprint(dataset)} of {length} samples" for dataset, length in pairs]

    def _locate(self, index: Any) -> tuple[int, Any]:
        if isinstance(index, tuple):
            return index
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(f"index {index} is outside a mixture of {self._length} samples")
        state = order.OrderState(seed=0, length=self._length, shuffle=False)
        (request,) = MixtureSource(self, self._in_order, shuffle=False).take(state, position, position + 1)
        return request.index  # type: ignore[no-any-return]


def listed(datasets: Iterable[Any]) -> list[Any]:
    """The datasets of a mixture; raises TypeError for one that is not in a list."""
    if isinstance(datasets, (Dataset, str)) or not isinstance(datasets, Iterable):
        raise TypeError(f"A mixture takes a list of datasets, not a {type(datasets).__name__}: pass `[dataset, ...]`.")
    found = list(datasets)
    for number, dataset in enumerate(found):
        if isinstance(dataset, (str, os.PathLike)):
            raise TypeError(
                f"Dataset {number} of the mixture is the path {str(dataset)!r}. Pass a dataset of its files:"
                f" ShardedDataset.from_path({str(dataset)!r}), or that of ShardedDataset.create_dataloader."
            )
    return found


def source_of(dataset: Any, *, shuffle: bool) -> Source:
    """The elastic order of ``dataset``: its own where it has one."""
    own = getattr(dataset, "order_source", None)
    return own(shuffle=shuffle) if callable(own) else Permuted(len(dataset), shuffle=shuffle)


@final
class Blocks:
    """Which dataset each position belongs to, by blocks of ``size`` positions."""

    def __init__(self, shares: Sequence[Fraction], size: int | None, *, length: int) -> None:
        self.shares = shares
        self.size = _block_size(shares, length) if size is None else size
        self._largest = shares.index(max(shares))
        self._made: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        # rounding up all others must leave the largest a count of at least 0
        if self.size < 1 or self.size * shares[self._largest] < _rounded(shares, self.size):
            raise ValueError(
                f"block_size is {size}, but these weights need {_block_size(shares, length)}, or a number that all of"
                " them divide exactly. Leave block_size out to have one chosen."
            )

    def before(self, block: int) -> list[int]:
        """How many positions belong to each dataset in all blocks before ``block``."""
        counts = [_round(block * self.size * share) for share in self.shares]
        counts[self._largest] += block * self.size - sum(counts)
        return counts

    def datasets(self, key: int, block: int) -> npt.NDArray[np.int64]:
        """The dataset of each position of ``block``."""
        if (key, block) not in self._made:
            if len(self._made) == _BLOCKS_KEPT:
                del self._made[next(iter(self._made))]
            counts = np.subtract(self.before(block + 1), self.before(block)).astype(np.int64)
            places = order.Permutation(self.size, seed=key, epoch=block).take(0, self.size)
            self._made[key, block] = np.repeat(np.arange(len(counts)), counts)[places]
        return self._made[key, block]


@final
class MixtureSource(Source):
    """The order of a :class:`Mixture`: the positions of all its epochs, counted on from the first."""

    def __init__(self, mixture: Mixture, sources: Sequence[Source], *, shuffle: bool) -> None:
        self._mixture, self._sources, self.shuffle = mixture, sources, shuffle
        self._blocks = mixture.blocks
        self.length = len(mixture)
        self.kind = "mixture, shuffled" if shuffle else "mixture"
        self.lazy = any(source.lazy for source in sources)
        self.resume_cost = _joined(source.resume_cost for source in sources)
        self.state_size = _joined(source.state_size for source in sources)

    def plan(self, *, readers: int, batch_size: int) -> None:
        for source in self._sources:
            source.plan(readers=readers, batch_size=batch_size)

    def facts(self) -> Mapping[str, Any]:
        return {_FIELDS.get(name, "datasets of the mixture"): value for name, value in self._about().items()}

    def agree(self, *, fresh: bool) -> None:
        for source in self._sources:
            source.agree(fresh=fresh)

    def take(self, state: order.OrderState, start: int, stop: int) -> list[Request]:
        epochs = state.epoch * self.length
        datasets = self._datasets(state, epochs + start, epochs + stop)
        firsts = self._ordinals(state, epochs + start)
        counts = np.bincount(datasets, minlength=len(firsts)).tolist()
        of_each = [iter(self._take_from(state, *part)) for part in zip(range(len(firsts)), firsts, counts, strict=True)]
        return [next(of_each[dataset]) for dataset in datasets.tolist()]

    def _datasets(self, state: order.OrderState, start: int, stop: int) -> npt.NDArray[np.int64]:
        size, parts = self._blocks.size, [np.empty(0, dtype=np.int64)]
        while start < stop:
            block, offset = divmod(start, size)
            parts.append(self._blocks.datasets(self._key(state), block)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _ordinals(self, state: order.OrderState, position: int) -> list[int]:
        """How many samples were taken of each dataset before ``position``."""
        block, offset = divmod(position, self._blocks.size)
        before = self._blocks.before(block)
        here = np.bincount(self._blocks.datasets(self._key(state), block)[:offset], minlength=len(before))
        return [count + more for count, more in zip(before, here.tolist(), strict=True)]

    def _take_from(self, state: order.OrderState, dataset: int, first: int, count: int) -> list[Request]:
        if count == 0:
            return []
        source = self._sources[dataset]
        epoch, start = divmod(first, source.length)
        own = order.OrderState(
            seed=keyed_seed("mixture", state.seed, dataset), length=source.length, epoch=epoch, shuffle=self.shuffle
        )
        requests = source.take(own, start, start + count)
        return [Request((dataset, one.index), one.epoch, (dataset, one.key)) for one in requests]

    def _key(self, state: order.OrderState) -> int:
        return keyed_seed("mixture", self._mixture.seed, state.seed if self.shuffle else "in order")

    def state_dict(self) -> dict[str, Any]:
        sources = [source.state_dict() for source in self._sources]
        return {**self._about(), "sources": sources}

    def _about(self) -> dict[str, Any]:
        mixture = self._mixture
        weights = [str(share) for share in mixture.shares]
        return {"parts": mixture.parts(), "weights": weights, "block_size": self._blocks.size, "seed": mixture.seed}

    def load_state_dict(self, state: Mapping[str, Any], *, seed: int) -> None:
        for number, (source, saved) in enumerate(zip(self._sources, state["sources"], strict=True)):
            source.load_state_dict(saved, seed=keyed_seed("mixture", seed, number))

    def check(self, state: Mapping[str, Any], saved: order.OrderState, current: order.OrderState) -> None:
        before, now = state["parts"], self._about()["parts"]
        if len(before) != len(now):
            raise _mismatch("number of datasets in the mixture", len(before), len(now))
        for number, (part, other) in enumerate(zip(before, now, strict=True)):
            if part != other:
                raise _mismatch(f"dataset {number} of the mixture", part, other)
        for field, name in _FIELDS.items():
            if state[field] != self._about()[field]:
                raise _mismatch(name, state[field], self._about()[field])
        if saved.length != self.length:
            raise _mismatch("length", saved.length, self.length)
        for source, inner in zip(self._sources, state["sources"], strict=True):
            source.check(inner, saved, saved)  # of its samples, all that matters was compared above


_FIELDS = {"weights": "weights", "block_size": "block_size of the mixture", "seed": "seed of the mixture"}


def _mismatch(field: str, saved: object, current: object) -> CheckpointMismatchError:
    advice = "Another mixture is another order: samples would repeat or be lost. Make it as it was when it was saved."
    return CheckpointMismatchError("loader", field, saved=saved, current=current, advice=advice)


def _joined(texts: Iterator[str]) -> str:
    """All that differ, without the cheapest where there are others."""
    return "; ".join(sorted(set(texts) - {"O(1)"})) or "O(1)"


def shares_of(weights: Sequence[float], lengths: Sequence[int]) -> list[Fraction]:
    """The weights as exact parts of 1; ``lengths`` are the datasets'."""
    if len(weights) != len(lengths) or not lengths:
        raise ValueError(f"There are {len(lengths)} datasets and {len(weights)} weights: pass one weight for each.")
    for number, (weight, length) in enumerate(zip(weights, lengths, strict=True)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight {number} is {weight}, but weights are numbers of at least 0.")
        if weight > 0 and length == 0:
            raise ValueError(f"dataset {number} has no samples, but a weight of {weight}: give it weight 0.")
    # as it prints: 0.1 is meant as a tenth, which no float is
    exact = [Fraction(repr(float(weight))) if not isinstance(weight, int) else Fraction(weight) for weight in weights]
    total = sum(exact)
    if not total:
        raise ValueError("All weights are 0: give at least one dataset a weight above 0.")
    return [weight / total for weight in exact]


def _length(shares: Sequence[Fraction], lengths: Sequence[int], stop: str) -> int:
    once = [length / share for share, length in zip(shares, lengths, strict=True) if share]
    if stop not in ("first_exhausted", "all_exhausted"):
        raise ValueError(f"stop is {stop!r}, but must be 'first_exhausted' or 'all_exhausted'.")
    return max(1, math.floor(min(once))) if stop == "first_exhausted" else math.ceil(max(once))


def _block_size(shares: Sequence[Fraction], length: int) -> int:
    """About 1000 positions, or an epoch of fewer, that hold the weights exactly; else enough of them to round in."""
    usual = min(_USUAL_BLOCK, length)
    exact = _exact_size(shares)
    if exact is not None:
        return exact * max(1, usual // exact)
    size = max(usual, math.ceil(len(shares) / max(shares)))
    if size > _LARGEST_BLOCK:
        raise ValueError(
            f"{len(shares)} datasets with these weights would need blocks of {size} positions. Round the weights to"
            " fewer digits, or put datasets together with ConcatDataset."
        )
    return size


def _exact_size(shares: Sequence[Fraction]) -> int | None:
    """The smallest block that holds the weights exactly, ``None`` where it is too large to be of use."""
    size = 1
    for share in shares:
        size = math.lcm(size, share.denominator)
        if size > 100 * _USUAL_BLOCK:
            return None
    return size


def _rounded(shares: Sequence[Fraction], size: int) -> int:
    """How many weights a block of ``size`` positions does not hold exactly."""
    return sum((size * share).denominator > 1 for share in shares)


def _round(number: Fraction) -> int:
    """To the nearest, halves up: never less for a larger number."""
    return math.floor(number + Fraction(1, 2))
