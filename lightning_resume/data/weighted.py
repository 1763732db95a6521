"""Weighted sampling whose order is a function of the position, so that it is elastic and its state a few integers."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch.utils.data import Sampler

from lightning_resume.data import order
from lightning_resume.data.randomness import Request
from lightning_resume.data.source import Source
from lightning_resume.errors import CheckpointMismatchError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_WORDS = 4  # that Philox gives for each value of its counter
_EPOCHS_KEPT = 2  # a step at the end of an epoch may reach into the next
_LOG_2 = 0.6931471805599453


@final
class WeightedSampler(Sampler[int]):
    """Draws indices by weight: ``DataLoader(dataset, batch_size=32, sampler=WeightedSampler(weights, num_samples))``.

    Under a loader of ours (``make_resumable``, Trainer, Fabric) the state is a few integers, and world size, workers
    and batch size may change; torch's ``WeightedRandomSampler`` has to draw an epoch again to go on, and is each rank's
    own where Lightning does not distribute it. A sample's random numbers are keyed by its position, since one sample
    may come more than once.

    With replacement, the index at a position is the inverse of the cumulative weights at a uniform number keyed by
    seed, epoch and position (Philox: Salmon et al., 2011). Without, the samples of an epoch are those with the smallest
    exponential keys (Efraimidis and Spirakis, 2006), in their order, so that each is drawn by its weight among those
    left; made at the start of an epoch in O(N).

    Args:
        weights: One number of at least 0 for each sample of the dataset, of any sum; 0 is never drawn.
        num_samples: Samples in an epoch, over all ranks.
        replacement: Whether a sample may come more than once in an epoch.
        seed: Key of the draws; by default the loader's seed, and 0 without a loader of ours.

    Raises:
        ValueError: An argument is out of its bounds.
    """

    def __init__(
        self,
        weights: Sequence[float] | Any,
        num_samples: int,
        *,
        replacement: bool = True,
        seed: int | None = None,
    ) -> None:
        plain = weights.detach().cpu().numpy() if isinstance(weights, torch.Tensor) else weights
        self.weights: Floats = np.array(plain, dtype=np.float64)
        _check(self.weights, num_samples, replacement)
        self.num_samples, self.replacement, self.seed = num_samples, replacement, seed
        self._epoch = 0

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        """The indices of one epoch, for use without a loader of ours; :meth:`set_epoch` says which."""
        draw = self.order_source().draw
        for start in range(0, self.num_samples, 1 << 16):
            yield from draw(0, self._epoch, start, min(start + (1 << 16), self.num_samples)).tolist()

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def order_source(self) -> WeightedSource:
        """Where an elastic loader takes its order from."""
        return WeightedSource(self)


@final
class WeightedSource(Source):
    """The order of a :class:`WeightedSampler`."""

    state_size = "O(1)"

    def __init__(self, sampler: WeightedSampler) -> None:
        self._sampler, self._weights = sampler, sampler.weights
        self.length = sampler.num_samples
        self.kind = f"weighted sampler with{'' if sampler.replacement else 'out'} replacement"
        self.resume_cost = "O(1)" if sampler.replacement else "draws the indices of the epoch again, no data"
        self._orders: dict[tuple[int, int], Indices] = {}

    def take(self, state: order.OrderState, start: int, stop: int) -> list[Request]:
        requests: list[Request] = []
        while start < stop:  # positions run on over the ends of the epoch
            ahead, first = divmod(start, self.length)
            end = min(self.length, first + stop - start)
            epoch = state.epoch + ahead
            drawn = self.draw(state.seed, epoch, first, end).tolist()
            requests += [Request(index, epoch, position) for position, index in enumerate(drawn, first)]
            start += end - first
        return requests

    def draw(self, seed: int, epoch: int, start: int, stop: int) -> Indices:
        """The indices at positions ``[start, stop)`` of ``epoch``; ``seed`` counts where the sampler has none."""
        seed = seed if self._sampler.seed is None else self._sampler.seed
        if self._sampler.replacement:
            return _inverse(self._cumulative, uniform(_key(seed, epoch), start, stop))
        return self._order(seed, epoch)[start:stop]

    @functools.cached_property
    def _cumulative(self) -> Floats:
        return np.cumsum(self._weights / self._weights.max())  # the sum of the largest floats is none

    def _order(self, seed: int, epoch: int) -> Indices:
        if (seed, epoch) not in self._orders:
            if len(self._orders) == _EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[seed, epoch] = _smallest(self._weights, _key(seed, epoch), self.length)
        return self._orders[seed, epoch]

    def facts(self) -> Mapping[str, Any]:
        return self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {"weights": f"{len(self._weights)} of hash {self._hash}", "seed": self._sampler.seed}

    @functools.cached_property
    def _hash(self) -> str:
        return xxhash.xxh3_64_hexdigest(self._weights.tobytes())

    def check(self, state: Mapping[str, Any], saved: order.OrderState, current: order.OrderState) -> None:
        super().check(state, saved, current)
        for field, current in self.state_dict().items():
            if state[field] != current:
                raise CheckpointMismatchError(
                    "loader",
                    f"{field} of the sampler",
                    saved=state[field],
                    current=current,
                    advice="Other draws would follow: make the WeightedSampler as it was when the run was started.",
                )


def _check(weights: Floats, num_samples: int, replacement: bool) -> None:
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"weights are {weights}, but must be one finite number of at least 0 for each sample, and not all 0."
        )
    possible = int(np.count_nonzero(weights))
    if num_samples < 1 or (not replacement and num_samples > possible):
        most = "" if replacement else f" and at most {possible}: without replacement no more can be drawn"
        raise ValueError(f"num_samples is {num_samples}, but must be at least 1{most}.")


def uniform(key: int, start: int, stop: int) -> Floats:
    """The numbers ``[start, stop)`` of the sequence of ``key``, in [0, 1)."""
    counter, skip = divmod(start, _WORDS)
    words = np.asarray(np.random.Philox(key=key, counter=counter).random_raw(skip + stop - start), dtype=np.uint64)
    numbers: Floats = (words[skip:] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _key(seed: int, epoch: int) -> int:
    text = f"lightning_resume.weighted.v1/seed={seed}/epoch={epoch}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _inverse(cumulative: Floats, numbers: Floats) -> Indices:
    total = cumulative[-1]
    drawn = np.searchsorted(cumulative, numbers * total, side="right")
    # rounding may take the largest of all numbers to the total itself
    last = np.searchsorted(cumulative, total, side="left")
    indices: Indices = np.minimum(drawn, last).astype(np.int64)
    return indices


def _smallest(weights: Floats, key: int, count: int) -> Indices:
    candidates = np.flatnonzero(weights)
    with np.errstate(over="ignore"):  # of the smallest weights: they come last
        keys = _exponential(uniform(key, 0, len(weights))[candidates]) / weights[candidates]
    if count < len(keys):  # the sort below is for those alone that are drawn; equal keys stay in the dataset's order
        bound = np.partition(keys, count - 1)[count - 1]
        below = np.flatnonzero(keys <= bound)
        candidates, keys = candidates[below], keys[below]
    drawn: Indices = candidates[np.argsort(keys, kind="stable")[:count]]
    return drawn


def _exponential(numbers: Floats) -> Floats:
    """``-log(1 - number)``, to the same bits on every machine.

    NumPy's logarithm differs in its last bit between processors, and with that the order of two samples. Here each
    operation is one that IEEE 754 rounds exactly: an exponent, and a series for the rest (in s = (m - 1) / (m + 1)).
    """
    mantissa, exponent = np.frexp(1.0 - numbers)  # in [0.5, 1)
    low = mantissa < math.sqrt(0.5)
    mantissa, exponent = np.where(low, 2 * mantissa, mantissa), exponent - low
    s = (mantissa - 1) / (mantissa + 1)
    square, series = s * s, np.zeros_like(s)
    for power in range(21, 0, -2):
        series = series * square + 1.0 / power
    keys: Floats = -(exponent * _LOG_2 + 2 * s * series)
    return keys
