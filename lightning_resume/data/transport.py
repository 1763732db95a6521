"""Sends any Python object from rank 0 to each other rank: tensors and arrays as they are, the rest pickled."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

import torch
import torch.distributed as dist

from lightning_resume import _distributed

SRC = 0


class Sends(Protocol):
    """From rank 0 to each of the others, what :class:`Channel` does."""

    def send(self, objects: Mapping[int, Packed]) -> None: ...
    def receive(self) -> Any: ...


@final
class Channel:
    """From rank 0 to each of the others, over a group that can send what lies in main memory. Made by all ranks."""

    def __init__(self) -> None:
        self._group = None if _distributed.sends_main_memory() else _distributed.new_group()

    def send(self, objects: Mapping[int, Packed]) -> None:
        """Sends each rank its object, all at the same time.

        Raises:
            RankLostError: A rank has ended, or did not ask for it in time.
        """
        messages = [(rank, part) for rank, packed in objects.items() for part in packed.messages()]
        with _distributed.together():
            works = [dist.isend(part, rank, self._group) for rank, part in messages]
            for work in works:
                work.wait()  # type: ignore[union-attr]

    def receive(self) -> Any:
        """What rank 0 sends this rank next.

        Raises:
            RankLostError: Rank 0 has ended, or did not send in time.
        """
        with _distributed.together():
            size = self._receive(torch.empty(1, dtype=torch.int64))
            head = self._receive(torch.empty(int(size), dtype=torch.uint8))
            packed = Packed(**pickle.loads(head.numpy().tobytes()))
            for buffer in packed.buffers:
                self._receive(buffer)
        return packed.unpack()

    def _receive(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel():
            dist.recv(tensor, SRC, self._group)
        return tensor


@final
class Packed:
    """An object as a pickle, and the bytes of its tensors and arrays, which are not copied.

    Args:
        content: The pickle.
        tensors: The number of bytes of each tensor.
        arrays: That of each array.
        buffers: What they hold, tensors first; by default to be filled in.
    """

    def __init__(
        self,
        *,
        content: bytes,
        tensors: Sequence[int],
        arrays: Sequence[int],
        buffers: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._content, self._tensors, self._arrays = content, tensors, arrays
        made = (torch.empty(count, dtype=torch.uint8) for count in (*tensors, *arrays))
        self.buffers = list(made) if buffers is None else list(buffers)

    def messages(self) -> list[torch.Tensor]:
        """What goes over the wire, in order."""
        about = {"content": self._content, "tensors": self._tensors, "arrays": self._arrays}
        head = torch.frombuffer(bytearray(pickle.dumps(about)), dtype=torch.uint8)
        return [torch.tensor([head.numel()]), head, *(buffer for buffer in self.buffers if buffer.numel())]

    def unpack(self) -> Any:
        return _Unpickler(self._content, self.buffers, len(self._tensors)).load()


def pack(obj: Any) -> Packed:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(obj)
    tensors, arrays = ([buffer.numel() for buffer in buffers] for buffers in (pickler.tensors, pickler.arrays))
    buffers = [*pickler.tensors, *pickler.arrays]
    return Packed(content=file.getvalue(), tensors=tensors, arrays=arrays, buffers=buffers)


class _Pickler(pickle.Pickler):
    """Leaves out the bytes of plain tensors, and of whatever offers its own (NumPy's arrays)."""

    def __init__(self, file: io.BytesIO) -> None:
        self.tensors: list[torch.Tensor] = []
        self.arrays: list[torch.Tensor] = []
        self._known: dict[int, tuple[int, torch.Tensor]] = {}
        super().__init__(file, protocol=5, buffer_callback=self._take)

    def persistent_id(self, obj: Any) -> Any:
        if not _is_plain(obj):
            return None
        if id(obj) not in self._known:
            self._known[id(obj)] = len(self.tensors), obj  # kept, so that its id stays its own
            self.tensors.append(obj.contiguous().reshape(-1).view(torch.uint8))
        return self._known[id(obj)][0], obj.dtype, tuple(obj.shape)

    def _take(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.readonly or not raw.nbytes:
            return True  # it stays in the pickle, since no tensor can lie over it
        self.arrays.append(torch.frombuffer(raw, dtype=torch.uint8))
        return False


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, buffers: Sequence[torch.Tensor], tensors: int) -> None:
        super().__init__(io.BytesIO(content), buffers=[buffer.numpy() for buffer in buffers[tensors:]])
        self._buffers = buffers
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> torch.Tensor:
        index, dtype, shape = pid
        if index not in self._made:  # a tensor that was there twice is one tensor again
            self._made[index] = self._buffers[index].view(dtype).reshape(shape)
        return self._made[index]


def _is_plain(obj: Any) -> bool:
    """Whether it is a tensor whose bytes and shape are all there is to it."""
    if type(obj) is not torch.Tensor or obj.layout is not torch.strided or obj.device.type != "cpu":
        return False
    return not (obj.requires_grad or obj.is_quantized or obj.is_conj() or obj.is_neg())
