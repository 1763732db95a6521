"""The random number generators of this process: Python's, NumPy's, torch's, and those of the accelerator in use."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, final

import numpy as np
import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class RngState:
    """One rank's generators at one moment. ``accelerator`` is ``None`` where no accelerator was in use."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch_cpu: torch.Tensor
    accelerator: torch.Tensor | None

    def to_plain(self) -> dict[str, Any]:
        """Tensors, numbers and strings only, so that it loads with ``weights_only=True``."""
        inner = self.numpy["state"]
        return {
            "python": [self.python[0], torch.tensor(self.python[1], dtype=torch.int64), self.python[2]],
            "numpy": {
                "key": torch.from_numpy(inner["key"].astype(np.int64)),
                "pos": int(inner["pos"]),
                "has_gauss": int(self.numpy["has_gauss"]),
                "gauss": float(self.numpy["gauss"]),
            },
            "torch": self.torch_cpu,
            "accelerator": self.accelerator,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RngState:
        version, key, gauss_next = plain["python"]
        numpy = plain["numpy"]
        return cls(
            python=(version, tuple(key.tolist()), gauss_next),
            numpy={
                "bit_generator": "MT19937",
                "state": {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            },
            torch_cpu=plain["torch"],
            accelerator=plain["accelerator"],
        )


def capture() -> RngState:
    """Reads all generators of this process without advancing any of them."""
    module = _accelerator_module()
    return RngState(
        python=random.getstate(),
        numpy=_numpy_state(),
        torch_cpu=torch.get_rng_state(),
        accelerator=None if module is None else module.get_rng_state(),
    )


def _numpy_state() -> Any:
    """As ``np.random.get_state(legacy=False)``, which visits each word in Python, and training asks at every step."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # not in numpy's stubs
    if not (type(generator) is np.random.MT19937 and _memory_is_known()):
        return np.random.get_state(legacy=False)
    has_gauss, gauss = _leftover()
    words = _words_in_memory(generator)
    return {"bit_generator": "MT19937", "state": words, "has_gauss": has_gauss, "gauss": gauss}


@functools.cache
def _memory_is_known() -> bool:
    """Whether the words of a generator lie in memory as in every NumPy so far."""
    generator = np.random.MT19937(1)
    generator.random_raw(700)
    found, expected = _words_in_memory(generator), generator.state["state"]
    return found["pos"] == expected["pos"] and bool(np.array_equal(found["key"], expected["key"]))


def _words_in_memory(generator: np.random.MT19937) -> dict[str, Any]:
    words = np.frombuffer(ctypes.string_at(generator.ctypes.state_address, 4 * 625), dtype=np.uint32)
    return {"key": words[:624], "pos": int(words[624])}


def restore(state: RngState) -> None:
    """Sets all generators of this process to ``state``."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch_cpu)
    module = _accelerator_module()
    if module is not None and state.accelerator is not None:
        module.set_rng_state(state.accelerator)


def seed_all(key: int) -> None:
    """Seeds Python, NumPy and torch CPU with a hashed ``key`` of 63 bits; accelerators are left alone.

    ``torch.manual_seed`` would also visit every accelerator, which costs ten times as much and per-sample code calls
    this for each sample.
    """
    # as random.seed does, which first looks for what else than an int it may have been given
    _seed_python(key)
    _python.gauss_next = None
    # of NumPy's and torch's, both the same Mersenne Twister, each takes 32 bits: with the same ones they would draw the
    # same numbers, and a flip by the one would always come with a crop by the other
    np.random.seed(key >> 31 & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)  # of which it takes the lower ones


_python: Any = random.seed.__self__  # type: ignore[attr-defined]  # the instance that the module's functions draw from
_seed_python = super(random.Random, _python).seed


def derive(state: RngState, rank: int) -> RngState:
    """A state for a rank that did not exist when ``state``, rank 0's, was saved: a pure function of both."""
    digest = hashlib.blake2b(b"lightning-resume.rng", digest_size=8)
    digest.update(state.torch_cpu.numpy().tobytes())
    digest.update(str(rank).encode())
    with preserved():
        seed_all(int.from_bytes(digest.digest(), "little") >> 1)
        derived = capture()
    return dataclasses.replace(derived, accelerator=_derived_accelerator(derived, rank, state))


def _derived_accelerator(derived: RngState, rank: int, state: RngState) -> torch.Tensor | None:
    module = _accelerator_module()
    if module is None or state.accelerator is None:
        return None
    before = module.get_rng_state()
    module.manual_seed(int(derived.torch_cpu[:8].sum()) * 1_000_003 + rank)
    after = module.get_rng_state()
    module.set_rng_state(before)
    return after  # type: ignore[no-any-return]


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """As :func:`preserved`, for code that seeds all generators before it draws; takes a tenth of the time."""
    python, torch_cpu = random.getstate(), torch.get_rng_state()
    spare = _spare.pop() if _spare else np.random.MT19937(0)
    numpy = swap_numpy(spare)
    try:
        yield
    finally:
        swap_numpy(*numpy)
        _spare.append(spare)
        random.setstate(python)
        torch.set_rng_state(torch_cpu)


_spare: list[np.random.MT19937] = []

Leftover = tuple[int, float]
"""Whether ``np.random`` has drawn a normal number that it has not handed out, for it draws two; and that number."""


def swap_numpy(generator: Any, leftover: Leftover = (0, 0.0)) -> tuple[Any, Leftover]:
    """Has ``np.random`` draw from ``generator``; returns the one it drew from, and what that one had left over.

    ``np.random.get_state`` and ``set_state`` visit each of the generator's 624 words in Python, and take 40 times as
    long.
    """
    before, left = np.random.get_bit_generator(), _leftover()  # type: ignore[attr-defined]  # not in numpy's stubs
    np.random.set_bit_generator(generator)  # type: ignore[attr-defined]  # forgets what is left over
    if leftover[0]:
        _set_leftover(leftover)
    return before, left


@final
class _StandIn:
    """In the place of a bit generator, so that only what its owner keeps beside it is read and set."""

    @property
    def state(self) -> dict[str, Any]:
        return {"bit_generator": "MT19937", "state": {}}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None: ...


_STAND_IN = _StandIn()
_OWNER: Any = np.random.mtrand._rand


def _leftover() -> Leftover:
    generator, _OWNER._bit_generator = _OWNER._bit_generator, _STAND_IN
    try:
        state = _OWNER.get_state(legacy=False)
    finally:
        _OWNER._bit_generator = generator
    return state["has_gauss"], state["gauss"]


def _set_leftover(leftover: Leftover) -> None:
    generator, _OWNER._bit_generator = _OWNER._bit_generator, _STAND_IN
    try:
        _OWNER.set_state({**_STAND_IN.state, "has_gauss": leftover[0], "gauss": leftover[1]})
    finally:
        _OWNER._bit_generator = generator


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Whatever runs inside draws no random number as far as the code outside can tell."""
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)


def _accelerator_module() -> Any:
    """The module of the accelerator that this process has really used: asking must not initialise one."""
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    module = torch.get_device_module(accelerator)
    is_initialized = getattr(module, "is_initialized", None)
    if is_initialized is not None and not is_initialized():
        return None
    return module
