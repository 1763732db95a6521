"""Copies of a run's tensors in host memory, from which a checkpoint is written while training changes the tensors.

torch's own ``StateDictStager`` copies all at once and whole storages; here a part of the copies may be made later, each
copy is exactly the tensor, and all lie in one piece of memory that another process can map.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import math
import mmap
import os
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn import Parameter
from torch.nn.parameter import Buffer
from torch.optim import Optimizer

from lightning_resume.checkpoint._dcp import local_parts, with_parts
from lightning_resume.errors import CheckpointSaveError

_ALIGNMENT = 64
_PROBE = 32  # bytes
_PLAIN = (torch.Tensor, Parameter, Buffer)
_Bytes: TypeAlias = np.ndarray[Any, Any]
_Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Staging(str, enum.Enum):
    """When tensors are copied to host memory, before they are written in the background."""

    NOW = "now"
    """All of them while the save is asked for; training waits."""
    DEFERRED = "deferred"
    """Those that only an optimizer's step changes, beside the forward and backward that follow; the step waits."""


class Memory:
    """Host memory for tensors: reserved once, filled by every save.

    Args:
        bytes: How many.
        shared: Whether another process can map it, by its :attr:`descriptor`.
        pinned: Whether a GPU copies to it without a detour.
    """

    def __init__(self, bytes: int, *, shared: bool, pinned: bool) -> None:
        self.bytes = bytes
        self.descriptor = _anonymous_file(bytes) if shared else None
        if self.descriptor is not None:
            self.map = mmap.mmap(self.descriptor, bytes)
        else:
            self.map = mmap.mmap(-1, bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):  # a loader's workers need no copy of it
            with contextlib.suppress(AttributeError, OSError):  # a system without it goes without
                self.map.madvise(getattr(mmap, advice))
        self._address = torch.frombuffer(self.map, dtype=torch.uint8).data_ptr()
        self._pinned = pinned
        if pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._address, bytes, 0))

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor over this memory, with a storage of its own size, which is what is saved of a tensor."""
        return tensor_in(self.map, offset, dtype, shape)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where ``tensor`` lies in this memory, ``None`` where it does not, or not in one piece."""
        offset = tensor.data_ptr() - self._address
        inside = tensor.numel() and tensor.is_contiguous() and 0 <= offset <= self.bytes - tensor.nbytes
        return offset if inside else None

    def close(self) -> None:
        """Gives the memory back, as soon as no tensor lies in it."""
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._address))
            self._pinned = False
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def tensor_in(memory: Any, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).reshape(shape)


def _anonymous_file(bytes: int) -> int:
    """A file without a name, so that nothing is left of it however the processes end; not in the small /dev/shm."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("lightning-resume")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, bytes)
    return descriptor


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Copy:
    """One copy that is to be made, and what its source was like when it was planned.

    Torch counts the changes of a tensor, but not those through ``.data``: so some bytes are compared too.
    """

    name: str
    source: torch.Tensor
    target: torch.Tensor
    memory: tuple[_Bytes, _Bytes] | None
    """Those of source and target, where both lie in host memory as they are."""
    version: int
    ends: bytes

    @classmethod
    def planned(cls, name: str, source: torch.Tensor, target: torch.Tensor, target_bytes: _Bytes | None) -> _Copy:
        own = None if target_bytes is None else _bytes_of(source)
        both = None if own is None or target_bytes is None else (own, target_bytes)
        ends = b"" if own is None else _ends(own)
        return cls(name=name, source=source, target=target, memory=both, version=source._version, ends=ends)

    def make(self) -> None:
        """Copies on this thread alone where it can: torch would start a team of threads beside those that train."""
        if self.memory is None:
            self.target.copy_(self.source, non_blocking=True)
        else:
            source, target = self.memory
            np.copyto(target, source)

    @property
    def is_of_its_moment(self) -> bool:
        """Whether source and copy are as they were; ask where no other thread changes the source."""
        return self.source._version == self.version and (
            self.memory is None or all(_ends(one) == self.ends for one in self.memory)
        )


def _bytes_of(tensor: torch.Tensor) -> _Bytes | None:
    """The memory of a tensor; None where it is a GPU's, which would have to be waited for, or has gaps."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    return tensor.flatten().view(torch.uint8).numpy()


def _ends(content: _Bytes) -> bytes:
    """The first bytes and the last."""
    return content[:_PROBE].tobytes() + content[-_PROBE:].tobytes()


class Snapshot:
    """The copy of a state: :attr:`state` has host tensors in place of the live ones, complete after :meth:`finish`."""

    def __init__(self, state: Any, later: list[_Copy]) -> None:
        self.state = state
        self._later = later
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._changed: list[str] = []
        self._device = _Device([one.source for one in later])

    def finish(self) -> None:
        """Makes the copies that are left; on any thread."""
        try:
            with self._device:
                for one in self._later:
                    one.make()
        finally:
            self._finished.set()

    def fence(self) -> None:
        """Waits for the copies. Called on the training's thread, before it changes what is being copied."""
        self._finished.wait()
        self._look()

    def check(self) -> None:
        """Raises where something was changed before it was copied, or while.

        Raises:
            CheckpointSaveError: It was; names it.
        """
        self._look()
        if self._changed:
            more = f" and {len(self._changed) - 1} more" if len(self._changed) > 1 else ""
            raise CheckpointSaveError(
                f"{self._changed[0][1:]}{more} changed after the save was asked for and before the optimizer's step,"
                " while the values were being copied: the checkpoint would hold a mix. Pass staging='now' where a run"
                " changes parameters outside of the optimizer's step (moving averages, clipped weights,"
                " `load_state_dict`)."
            )

    def close(self) -> None:
        """Lets nobody wait any longer, and lets the live tensors go."""
        self._finished.set()
        with self._lock:
            self._later = []

    def _look(self) -> None:
        """Notes once what has changed: after a fence the optimizer may change all."""
        with self._lock:
            self._changed += [one.name for one in self._later if not one.is_of_its_moment]
            self._later = []


class _Device:
    """Around copies: orders them after what the GPU was given so far, and waits for them."""

    def __init__(self, sources: Iterable[torch.Tensor]) -> None:
        self._cuda = next((source.device for source in sources if source.device.type == "cuda"), None)
        self._ready: Any = None if self._cuda is None else torch.cuda.current_stream(self._cuda).record_event()
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self._cuda is not None:
            self._stream = torch.cuda.Stream(self._cuda)
            self._stream.wait_event(self._ready)
            self._inside.enter_context(torch.cuda.stream(self._stream))

    def __exit__(self, *_: object) -> None:
        if self._cuda is not None:
            self._stream.synchronize()
            self._inside.close()


class Stager:
    """Copies one state after the other into the same memory, as long as names, dtypes and shapes stay the same.

    Args:
        shared: Whether another process is to write the copies.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._layout: _Layout = {}
        self._targets: dict[str, torch.Tensor] = {}
        self._target_bytes: dict[str, _Bytes | None] = {}
        self.memory: Memory | None = None

    @torch.no_grad()
    def stage(self, state: Any, *, later: Collection[int] = ()) -> Snapshot:
        """Copies the tensors of ``state``; those over the storages ``later`` only in :meth:`Snapshot.finish`.

        Args:
            state: Nested dicts and lists of tensors, DTensors, ShardedTensors and plain values, which are copied too.
            later: Addresses of storages (:func:`storages_of`).
        """
        parts = dict(_parts(state))
        self._reserve({name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}, parts.values())
        deferred = {name: part for name, part in parts.items() if _address(part) in later and _can_wait(part)}
        with _Device(parts.values()):
            for name, part in parts.items():
                if name not in deferred:
                    self._targets[name].copy_(part, non_blocking=True)
        copies = [
            _Copy.planned(name, part, self._targets[name], self._target_bytes[name]) for name, part in deferred.items()
        ]
        return Snapshot(_rebuilt(state, "", self._targets), copies)

    def close(self) -> None:
        """Gives the memory back."""
        self._layout, self._targets, self._target_bytes = {}, {}, {}
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def _reserve(self, layout: _Layout, parts: Iterable[torch.Tensor]) -> None:
        if layout == self._layout:
            return
        self.close()
        offsets, end = {}, 0
        for name, (dtype, shape) in layout.items():
            offsets[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        pinned = any(part.device.type == "cuda" for part in parts)
        self.memory = Memory(max(end, _ALIGNMENT), shared=self._shared, pinned=pinned)
        self._targets = {name: self.memory.tensor(offsets[name], *layout[name]) for name in layout}
        self._target_bytes = {name: _bytes_of(target) for name, target in self._targets.items()}
        self._layout = layout


def storages_of(optimizers: Iterable[Optimizer]) -> set[int]:
    """The addresses of the storages that a step of these optimizers changes, and nothing else should."""
    addresses = set()
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        values = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        addresses |= {_address(part) for value in [*parameters, *values] for part in local_parts(value)}
    return addresses - {0}


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if _is_plain(tensor) else 0


def _can_wait(tensor: torch.Tensor) -> bool:
    """Whether it would be seen that a tensor was changed before it was copied."""
    return not tensor.is_inference() and (tensor.device.type != "cpu" or _bytes_of(tensor) is not None)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta


def _parts(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors in a nested state, by a name that is the same in every save."""
    if isinstance(value, torch.Tensor):
        parts = local_parts(value)
        if all(map(_is_plain, parts)):
            yield from ((name if len(parts) == 1 else f"{name}#{i}", part) for i, part in enumerate(parts))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _parts(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _parts(inner, f"{name}.{index}")


def _rebuilt(value: Any, name: str, targets: Mapping[str, torch.Tensor]) -> Any:
    """``value`` with the targets in place of the tensors, and copies of all else."""
    if isinstance(value, torch.Tensor):
        if all(map(_is_plain, local_parts(value))):
            return with_parts(value, [targets[part] for part, _ in _parts(value, name)])
        return value.detach().cpu().clone()  # of other kinds (sparse, quantized), which are rare
    if isinstance(value, Mapping):
        return {key: _rebuilt(inner, f"{name}.{key}", targets) for key, inner in value.items()}
    if type(value) in (list, tuple) and any(_parts(value)):
        return type(value)(_rebuilt(inner, f"{name}.{index}", targets) for index, inner in enumerate(value))
    return copy.deepcopy(value)
