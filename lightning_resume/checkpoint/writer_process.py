"""One more process that writes files of a checkpoint from memory that it shares with the process that trains.

It is started afresh, not forked, and without the user's script: it imports torch and this package's checkpoints, but
neither Lightning nor what the package exports. It ends when its end of the socket is closed, however that happens.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch.distributed.checkpoint import WriteItem

from lightning_resume._distributed import sendable
from lightning_resume.checkpoint.shards import Data, WrittenFile, write_items
from lightning_resume.checkpoint.staging import Stager, tensor_in
from lightning_resume.errors import CheckpointSaveError

_LENGTH = struct.Struct("q")
_END_SECONDS = 10.0
_START = """
import signal, sys, types
for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of a group; what is in flight is to be finished
    signal.signal(number, signal.SIG_IGN)
sys.path[:] = {path!r}
package = types.ModuleType("lightning_resume")  # without what it exports, which imports Lightning
package.__path__ = [{package!r}]
sys.modules["lightning_resume"] = package
from lightning_resume.checkpoint.writer_process import serve
serve({descriptor})
"""


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """A tensor in the shared memory."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Request:
    path: Path
    items: list[tuple[WriteItem, Any]]
    weights: frozenset[str]
    memory: int | None
    """How much memory there is, where its descriptor follows."""


@final
class WriterProcess:
    """The process, started with the first file that it writes, and again where it has ended."""

    def __init__(self, stager: Stager) -> None:
        self._stager = stager
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._known: object = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def write(self, path: Path, items: Sequence[tuple[WriteItem, Data]], weights: frozenset[str]) -> WrittenFile:
        """Is :func:`~lightning_resume.checkpoint.shards.write_items`, over there.

        Raises:
            CheckpointSaveError: The process ended; says how.
        """
        if self._process is None:
            self._start()
        assert self._socket is not None
        memory = self._stager.memory
        news = memory if memory is not None and memory is not self._known else None
        request = _Request(
            path=path,
            items=[(item, self._placed(data)) for item, data in items],
            weights=weights,
            memory=None if news is None else news.bytes,
        )
        try:
            _send(self._socket, request)
            if news is not None:
                assert news.descriptor is not None
                socket.send_fds(self._socket, [b"m"], [news.descriptor])
                self._known = news
            answer = _receive(self._socket)
        except (EOFError, ConnectionError) as error:
            raise CheckpointSaveError(self._obituary()) from error
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, WrittenFile)
        return answer

    def close(self) -> None:
        """Ends the process; the next write starts another one."""
        process, self._process, self._known = self._process, None, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is not None:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _placed(self, data: Data) -> Any:
        memory = self._stager.memory
        if not isinstance(data, torch.Tensor) or memory is None:
            return data
        tensor = data.detach()
        offset = memory.offset_of(tensor)
        return tensor if offset is None else _Shared(offset=offset, dtype=tensor.dtype, shape=tuple(tensor.shape))

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            values = {"path": sys.path, "package": str(Path(__file__).parents[1]), "descriptor": theirs.fileno()}
            command = [sys.executable, "-c", _START.format(**values)]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._socket = ours

    def _obituary(self) -> str:
        process = self._process
        assert process is not None
        self.close()
        code = process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return (
            f"the process {process.pid} that writes checkpoints ended with {how}. Where that is SIGKILL, the system may"
            " have run out of memory. The next save starts another one; async_save='thread' does without."
        )


def serve(descriptor: int) -> None:
    """Writes what is asked for until the other end is closed; runs in the process."""
    with contextlib.suppress(OSError):
        os.nice(10)
    torch.set_num_threads(1)
    memory: mmap.mmap | None = None
    with socket.socket(fileno=descriptor) as connection, contextlib.suppress(EOFError, ConnectionError):
        while True:
            request: _Request = _receive(connection)
            if request.memory is not None:
                _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
                memory = mmap.mmap(descriptors[0], request.memory)
                os.close(descriptors[0])
            _send(connection, _written(request, memory))


def _written(request: _Request, memory: Any) -> WrittenFile | Exception:
    try:
        items = [(item, _found(data, memory)) for item, data in request.items]
        return write_items(request.path, items, request.weights)
    except Exception as error:
        return sendable(error)


def _found(data: Any, memory: Any) -> Data:
    return tensor_in(memory, data.offset, data.dtype, data.shape) if isinstance(data, _Shared) else data


def _send(connection: socket.socket, value: object) -> None:
    # not multiprocessing's connections, for which torch changes how tensors are pickled
    content = pickle.dumps(value)
    connection.sendall(_LENGTH.pack(len(content)) + content)


def _receive(connection: socket.socket) -> Any:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return pickle.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, length: int) -> bytearray:
    content = bytearray()
    while len(content) < length:
        part = connection.recv(min(length - len(content), 2**20))
        if not part:
            raise EOFError("the other process has ended")
        content += part
    return content
