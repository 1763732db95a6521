"""``sample_rng()``: NumPy's newer generators, keyed like the global ones by what is being made just now."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np

Key = tuple[object, ...]


def sample_rng(n: int | None = None) -> np.random.Generator:
    """The random number generator of the sample that is being made, or of the batch that is being collated.

    Call it in a dataset's ``__getitem__``, in a transform or in ``collate_fn``, under a loader of ours. It is keyed by
    seed, epoch and sample (in ``collate_fn``: by the batch), so it draws the same bits whatever the worker, world size,
    batch size or resume. Within one sample every call returns the same generator, which goes on where it was. Do not
    keep it for the next sample.

    Args:
        n: For a dataset that is asked for a whole batch by ``__getitems__``: which of the samples asked for, from 0.
            Without it such a dataset gets one generator for the batch, so that what it draws depends on the batch size.

    Raises:
        RuntimeError: No sample is being made by a loader of ours.
        IndexError: There is no n-th sample here.
    """
    global _current
    if _current is None:
        raise RuntimeError(
            "sample_rng() was called where no sample is being made. Call it in a dataset's __getitem__, in a transform"
            " or in collate_fn, and iterate over a loader of lightning-resume: one from make_resumable(), or one that a"
            " Trainer with ResumeCallback or a Resumable...Strategy has set up."
        )
    if not isinstance(_current, Making):
        _current = Making(*_current)
    return _current.generator(n)


@final
class Making:
    """What is being made: its own key, and those of its samples."""

    def __init__(self, key: Key, samples: Sequence[Key]) -> None:
        self._key, self._samples = key, samples
        self._generators: dict[Key, np.random.Generator] = {}

    def generator(self, n: int | None) -> np.random.Generator:
        if n is not None and not 0 <= n < len(self._samples):
            raise IndexError(
                f"sample_rng({n}) was called where {len(self._samples)} samples are being made: give a number only in"
                " __getitems__, that of a sample asked for, from 0."
            )
        key = self._key if n is None else self._samples[n]
        if key not in self._generators:
            self._generators[key] = np.random.Generator(np.random.Philox(key=_philox_key(key)))
        return self._generators[key]


@contextlib.contextmanager
def making() -> Iterator[None]:
    """Around what makes samples: nothing of :func:`now_making` is left afterwards."""
    global _current
    before = _current
    try:
        yield
    finally:
        _current = before


def now_making(key: Key, samples: Sequence[Key] = ()) -> None:
    """From here on ``sample_rng()`` is keyed by ``key``, and ``sample_rng(n)`` by ``samples[n]``."""
    global _current
    _current = key, samples


# one for the process: a dataset may well fetch with threads of its own. Few samples ask, so that most need no `Making`
_current: Making | tuple[Key, Sequence[Key]] | None = None


def _philox_key(key: Key) -> Any:
    text = "\x1f".join(map(str, ("numpy", *key)))
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype="<u8").astype(np.uint64)
