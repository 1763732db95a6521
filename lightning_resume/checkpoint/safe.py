"""Loads objects that ``torch.save`` wrote without running code of theirs: torch's ``weights_only`` and an allow-list.

Beyond what torch allows: NumPy arrays, scalars and dtypes, ``deque``, ``defaultdict``, ``frozenset``, ``range``,
``slice``, ``pathlib`` paths, ``datetime`` values, ``argparse.Namespace``, Lightning's ``AttributeDict``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import importlib
import io
import math
import pathlib
import pickle
import re
import sys
import threading
import zipfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lightning_resume.checkpoint.pickles import Global, check_pickle
from lightning_resume.errors import CheckpointCorruptError, ResumeError, UnsafeCheckpointError

_ATTRIBUTE_DICTS = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
# classes that are named as values, for example by a defaultdict
_NEVER_CALLED = {f"builtins.{name}" for name in ("list", "dict", "tuple", "str", "int", "float", "bool")}
# by their pickles these are called with a list or text, by others with a range of any length
_FILLED = {"builtins.set", "builtins.frozenset", "builtins.bytearray", "torch.Size"} | {
    f"collections.{name}" for name in ("deque", "Counter", "OrderedDict")
}
_MAKES_STORAGE = re.compile(r"torch\.(\w+\.)*\w*(Tensor|Storage)")
_DTYPE = re.compile(r"[biufcmMSUVO]\d{1,9}")
_LEAVES = (int, float, str, bytes, bool, type(None))
# torch keeps one set of allowed classes for the whole process
_lock = threading.Lock()


def safe_load(source: BinaryIO | bytes, *, name: str = "The file", trust: bool = False) -> Any:
    """Returns the object that ``torch.save`` wrote to ``source``, its tensors on the CPU.

    Args:
        source: An open file or its bytes.
        name: What to call it in errors.
        trust: Load any object at all, which can run code that the writer of the file chose.

    Raises:
        UnsafeCheckpointError: It holds objects outside the allow-list; names their classes.
        CheckpointCorruptError: It cannot be read.
    """
    data = source if isinstance(source, bytes) else source.read()
    if trust:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    pending: list[_Pending] = []
    with _told_of(name, data), _lock, safe_globals(_allowed(pending)):
        _check_archive(data)
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return _settle_all(loaded, pending, name)


def load_tensor(data: bytes, *, name: str) -> torch.Tensor:
    """Returns the tensor that ``torch.save`` wrote to ``data``, with no class allowed that torch itself does not allow.

    Raises:
        UnsafeCheckpointError: It holds objects outside torch's allow-list; names their classes.
        CheckpointCorruptError: It is no tensor, or cannot be read.
    """
    with _told_of(name, data):
        _check_archive(data)
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise TypeError(f"it is a {type(tensor).__name__}, not a dense tensor")
        if tensor.nbytes > len(data):
            # a stride of 0 makes any number of elements of one
            raise ValueError(f"a tensor of {tensor.nbytes} bytes in {len(data)} bytes")
        return tensor


@contextlib.contextmanager
def _told_of(name: str, data: bytes) -> Iterator[None]:
    """Raises whatever a pickle leads to as an error of ours that names the file."""
    try:
        yield
    except ResumeError:
        raise
    except pickle.UnpicklingError as error:
        raise _unsafe(name, data, error) from error
    except Exception as error:
        # what torch raises for damaged bytes is any of a dozen kinds
        raise CheckpointCorruptError(
            f"{name} is damaged and cannot be read ({type(error).__name__}: {str(error)[:500]}). "
            "Load another checkpoint, or copy this one again from its source."
        ) from error


def _unsafe(name: str, data: bytes, error: Exception) -> UnsafeCheckpointError:
    try:
        found = ", ".join(sorted(get_unsafe_globals_in_checkpoint(io.BytesIO(data))))[:500]
    except Exception:
        # it reads the same hostile bytes
        found = ""
    return UnsafeCheckpointError(
        f"{name} holds objects that are not on the allow-list and was not loaded, since they could run code or harm "
        f"the process: {found or str(error).splitlines()[0][:500]}. If you trust whoever wrote this checkpoint, load "
        "it with trust=True (in Fabric and Trainer: weights_only=False); else save plain values in place of them."
    )


def _check_archive(data: bytes) -> None:
    """Refuses what no ``torch.save`` writes: other formats, compressed records, pickles that harm their loader."""
    if data[:4] != b"PK\x03\x04":
        raise ValueError("not the archive that torch.save writes")
    archive = torch._C.PyTorchFileReader(io.BytesIO(data))
    records = archive.get_all_records()
    if "constants.pkl" in records:
        raise pickle.UnpicklingError("a TorchScript program")
    size = _record_bytes(archive, records, data)
    if size > len(data):
        raise pickle.UnpicklingError(f"{size} bytes of records in an archive of {len(data)} bytes")
    check_pickle(archive.get_record("data.pkl"), _check_call)


def _record_bytes(archive: Any, records: Sequence[str], data: bytes) -> int:
    """The bytes that the records have once they are inflated; torch 2.10 cannot tell, so there zipfile is asked."""
    if hasattr(archive, "get_record_size"):
        return sum(archive.get_record_size(record) for record in records)
    with zipfile.ZipFile(io.BytesIO(data)) as archived:
        return sum(record.file_size for record in archived.infolist())


def _check_call(function: object, args: object) -> None:
    """Refuses calls that torch or we allow but no save writes, and that could fill the memory or call anything."""
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise pickle.UnpicklingError("a call of what is not named")
    first, second, *_ = (*args, None, None)
    if function in _NEVER_CALLED or _MAKES_STORAGE.fullmatch(function):
        raise pickle.UnpicklingError(f"a call of {function}")
    if function in _FILLED and args and not (first in (list, dict) or isinstance(first, tuple | bytes)):
        raise pickle.UnpicklingError(f"a call of {function} with neither list nor text")
    if function == "_codecs.encode" and second not in (b"latin1", b"latin-1"):
        raise pickle.UnpicklingError(f"a call of {function} for another encoding than latin1")
    if function == "torch._tensor._rebuild_from_type_v2" and not str(first).startswith("torch._utils._rebuild_"):
        raise pickle.UnpicklingError(f"a call of {function} with another function")


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """What stands for a class that torch's unpickler cannot fill, or not safely, until all is loaded."""

    stand_in: Any
    build: Callable[[Any], Any]


def _allowed(pending: list[_Pending]) -> list[Any]:
    named = {**_plain_classes(), **_paths(), **_numpy(pending), **_containers(pending)}
    # a name without a dot cannot be written in a pickle: these may be given their state but not be called
    only_state = [(kind, kind.__name__) for kind in (_Array, _Dtype)]
    return [(allowed, name) for name, allowed in named.items()] + only_state


def _plain_classes() -> dict[str, Any]:
    builtins = (list, dict, tuple, str, int, float, bool, frozenset, range, slice)
    dates = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)
    others = (argparse.Namespace, torch.torch_version.TorchVersion)
    return {f"{kind.__module__}.{kind.__qualname__}": kind for kind in (*builtins, *dates, *others)}


def _paths() -> dict[str, Any]:
    pure = {"PurePosixPath": pathlib.PurePosixPath, "PureWindowsPath": pathlib.PureWindowsPath}
    own = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}
    own[type(pathlib.Path()).__name__] = pathlib.Path  # the other system's paths stay pure
    return {f"{module}.{name}": kind for module in ("pathlib", "pathlib._local") for name, kind in (pure | own).items()}


def _numpy(pending: list[_Pending]) -> dict[str, Any]:
    def array(*_: object) -> _Array:
        stand_in = _Array()
        pending.append(_Pending(stand_in=stand_in, build=_Array.build))
        return stand_in

    def dtype(text: str, *_: object) -> _Dtype:
        stand_in = _Dtype(text)
        pending.append(_Pending(stand_in=stand_in, build=lambda found: found.real))
        return stand_in

    # how protocol 2 writes the bytes of an empty array
    named: dict[str, Any] = {"numpy.ndarray": _array_type, "numpy.dtype": dtype, "builtins.bytes": _no_bytes}
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        named |= {f"{module}._reconstruct": array, f"{module}.scalar": _scalar}
    return named


def _no_bytes() -> bytes:
    return b""


def _array_type(*_: object) -> None:
    # stands for numpy.ndarray itself, which takes raw memory for an array of objects
    raise pickle.UnpicklingError("numpy.ndarray called")


class _Dtype:
    """Stands for a numpy.dtype, whose own ``__setstate__`` lets raw bytes pass for pointers to objects."""

    def __init__(self, text: str) -> None:
        if not _DTYPE.fullmatch(text):
            raise pickle.UnpicklingError(f"numpy.dtype({text!r:.100})")
        self.real = np.dtype(text)
        self.is_used = False

    def use(self) -> np.dtype[Any]:
        """Returns the dtype for another object, in which nobody will look for this one."""
        self.is_used = True
        return self.real

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, order, inner, names, fields, size, _alignment, _flags, *metadata = state
        if names is not None:
            formats, offsets = [fields[name][0].use() for name in names], [fields[name][1] for name in names]
            self.real = np.dtype({"names": list(names), "formats": formats, "offsets": offsets, "itemsize": size})
        elif inner is not None:
            self.real = np.dtype((inner[0].use(), inner[1]))
        elif metadata and self.real.kind in "mM":
            unit, count, *_ = metadata[0][1]
            self.real = np.dtype(f"{self.real.kind}8[{count}{unit if isinstance(unit, str) else unit.decode()}]")
        if order in ("<", ">") and inner is None and names is None:
            self.real = self.real.newbyteorder(order)


class _Array:
    """Stands for a numpy.ndarray, whose own ``__setstate__`` believes its dtype."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, self._shape, dtype, self._is_fortran, self.content = state
        self._dtype: np.dtype[Any] = dtype.use()

    def build(self) -> Any:
        order: Any = "F" if self._is_fortran else "C"
        count = math.prod(self._shape)
        if self._dtype.hasobject:
            if self._dtype.kind != "O" or type(self.content) is not list or len(self.content) != count:
                raise ValueError("an array of objects that is not as it was saved")
            return _objects(self.content).reshape(self._shape, order=order)
        if count * max(self._dtype.itemsize, 1) != len(self.content):
            raise ValueError(f"an array of shape {self._shape} in {len(self.content)} bytes")
        return np.frombuffer(bytearray(self.content), dtype=self._dtype).reshape(self._shape, order=order)


def _objects(values: list[Any]) -> Any:
    # numpy takes a list of lists for rows
    array = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        array[place] = value
    return array


def _scalar(dtype: Any, data: Any = b"") -> Any:
    real: np.dtype[Any] = dtype.use()
    if real.hasobject:
        raise pickle.UnpicklingError("numpy scalar of objects")
    return np.frombuffer(data, dtype=real, count=1)[0]


def _containers(pending: list[_Pending]) -> dict[str, Any]:
    def deque(items: Any = (), maxlen: int | None = None) -> list[Any]:
        stand_in = list(items)
        pending.append(_Pending(stand_in=stand_in, build=lambda found: collections.deque(found, maxlen)))
        return stand_in

    def defaultdict(factory: Any = None) -> dict[Any, Any]:
        stand_in: dict[Any, Any] = {}
        pending.append(_Pending(stand_in=stand_in, build=lambda found: collections.defaultdict(factory, found)))
        return stand_in

    named: dict[str, Any] = {"collections.deque": deque, "collections.defaultdict": defaultdict}
    return {**named, **{name: _attribute_dict(name, pending) for name in _ATTRIBUTE_DICTS}}


def _attribute_dict(name: str, pending: list[_Pending]) -> type:
    class StandIn:
        def __new__(cls) -> Any:
            stand_in: dict[Any, Any] = {}
            pending.append(_Pending(stand_in=stand_in, build=lambda found: _class_of(name)(found)))
            return stand_in

    return StandIn


def _class_of(name: str) -> Callable[[Any], Any]:
    # lightning is imported only for a checkpoint that holds its class
    module, _, attribute = name.rpartition(".")
    if module not in sys.modules:
        importlib.import_module(module)
    return getattr(sys.modules[module], attribute)  # type: ignore[no-any-return]


def _settle_all(loaded: Any, pending: list[_Pending], name: str) -> Any:
    """Puts the real objects in the places of their stand-ins."""
    if not pending:
        return loaded
    settling = _Settling({id(one.stand_in): one for one in pending})
    loaded = settling.settle(loaded)
    stand_ins = [one.stand_in for one in settling.waiting.values()]
    if any(not isinstance(stand_in, _Dtype) or not stand_in.is_used for stand_in in stand_ins):
        raise UnsafeCheckpointError(
            f"{name} holds an array, dtype, deque, defaultdict or AttributeDict inside an object that "
            "cannot be looked into. If you trust whoever wrote this checkpoint, load it with trust=True."
        )
    return loaded


class _Settling:
    def __init__(self, waiting: Mapping[int, _Pending]) -> None:
        self.waiting = dict(waiting)
        self._done: dict[int, Any] = {}
        self._alive: list[Any] = []

    def settle(self, value: Any) -> Any:
        if type(value) in _LEAVES:
            return value
        key = id(value)
        if key not in self._done:
            self._alive.append(value)  # so that no other object gets this id
            self._done[key] = value  # an object that holds itself ends here
            self._done[key] = self._settled(value)
        return self._done[key]

    def _settled(self, value: Any) -> Any:
        if type(value) is tuple:
            inner = tuple(map(self.settle, value))
            return inner if any(new is not old for new, old in zip(inner, value, strict=True)) else value
        self._settle_inside(value.content if isinstance(value, _Array) else value)
        pending = self.waiting.pop(id(value), None)
        return value if pending is None else pending.build(value)

    def _settle_inside(self, value: Any) -> None:
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        items: Any = value.items() if isinstance(value, dict) else enumerate(value) if type(value) is list else ()
        changed: dict[Hashable, Any] = {place: self.settle(inner) for place, inner in items}
        for place, inner in changed.items():
            value[place] = inner
