"""What ``torch.save`` puts before and after the bytes of a tensor, so that these go to the file from where they are."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.serialization import skip_data


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The archive of one tensor without the tensor's own bytes, which lie between ``head`` and ``tail``."""

    head: bytes
    tail: bytes


def frame_of(tensor: torch.Tensor) -> Frame:
    """The archive around a contiguous ``tensor`` on the CPU; only its dtype and shape matter.

    torch's own ``skip_data`` writes the archive and leaves out what is in the storage, and its checksum, which no
    ``torch.load`` looks at. So there is one hash of each byte, ours, and none of torch's switches is touched.
    """
    return _frame(tensor.dtype, tuple(tensor.shape))


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the CPU in the order of its elements: itself where it is so already."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous ``tensor`` on the CPU, in place; valid as long as the tensor is."""
    if tensor.numel() == 0:
        return memoryview(b"")
    # not Tensor.numpy, which has no bfloat16 or float8
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


@functools.lru_cache(maxsize=2**16)
def _frame(dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
    sink = _Sink()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype), sink)  # type: ignore[arg-type]  # it has what torch asks for
    head, tail = sink.parts if len(sink.parts) == 2 else (sink.parts[0], bytearray())
    return Frame(head=bytes(head), tail=bytes(tail))


class _Sink:
    """Takes an archive apart where torch, instead of writing a storage, seeks over it."""

    def __init__(self) -> None:
        self.parts = [bytearray()]

    def write(self, data: Any, /) -> int:
        self.parts[-1] += data
        return memoryview(data).nbytes

    def seek(self, _offset: int, _whence: int = 0, /) -> int:
        self.parts.append(bytearray())
        return 0

    def flush(self) -> None: ...
