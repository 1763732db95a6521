"""Loads objects that ``torch.save`` wrote without running code of theirs: torch's ``weights_only`` and an allow-list.

Beyond what torch allows: NumPy arrays, scalars and dtypes, ``deque``, ``defaultdict``, ``frozenset``, ``range``,
``slice``, ``pathlib`` paths, ``datetime`` values, ``argparse.Namespace``, Lightning's ``AttributeDict``.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib
import io
import pathlib
import pickle
import sys
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lightning_resume.errors import UnsafeCheckpointError

_ATTRIBUTE_DICTS = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
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
    """
    data = io.BytesIO(source if isinstance(source, bytes) else source.read())
    if trust:
        return torch.load(data, map_location="cpu", weights_only=False)
    pending: list[_Pending] = []
    with _lock, safe_globals(_allowed(pending)):
        try:
            loaded = torch.load(data, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _unsafe(name, data, error) from error
    return _settle_all(loaded, pending, name)


def load_tensor(data: bytes, *, name: str) -> Any:
    """Returns what ``torch.save`` wrote to ``data``, with no class allowed that torch itself does not allow."""
    file = io.BytesIO(data)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe(name, file, error) from error


def _unsafe(name: str, data: io.BytesIO, error: Exception) -> UnsafeCheckpointError:
    data.seek(0)
    try:
        found = ", ".join(sorted(get_unsafe_globals_in_checkpoint(data)))
    except (pickle.UnpicklingError, ValueError, EOFError, RuntimeError):
        found = ""
    return UnsafeCheckpointError(
        f"{name} holds objects that are not on the allow-list and was not loaded, since they could run code: "
        f"{found or str(error).splitlines()[0]}. If you trust whoever wrote this checkpoint, load it with trust=True "
        "(in Fabric and Trainer: weights_only=False); else save plain values in place of these objects."
    )


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A list or dict that stands for a class torch's unpickler cannot fill, until all is loaded."""

    stand_in: list[Any] | dict[Any, Any]
    build: Callable[[Any], Any]


def _allowed(pending: list[_Pending]) -> list[Any]:
    named = {**_plain_classes(), **_paths(), **_numpy(), **_containers(pending)}
    # a name without a dot cannot be written in a pickle: these may be given their state but not be called
    only_state = [(kind, kind.__name__) for kind in (np.ndarray, *_dtype_classes())]
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


def _numpy() -> dict[str, Any]:
    named: dict[str, Any] = {"numpy.ndarray": _array_type, "numpy.dtype": _dtype}
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        named |= {f"{module}._reconstruct": _empty_array, f"{module}.scalar": _scalar}
    return named


def _array_type(*_: object) -> None:
    # stands for numpy.ndarray itself, which takes raw memory for an array of objects
    raise pickle.UnpicklingError("numpy.ndarray called")


def _empty_array(*_: object) -> Any:
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _dtype(text: str, align: bool = False, copy: bool = True) -> Any:
    return np.dtype(text, align=align, copy=copy)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    if dtype.hasobject:
        raise pickle.UnpicklingError("numpy scalar of objects")
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _dtype_classes() -> list[type]:
    found = (getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType"))
    return [kind for kind in found if isinstance(kind, type)]


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
    if settling.waiting:
        raise UnsafeCheckpointError(
            f"{name} holds a deque, defaultdict or AttributeDict inside an object that cannot be looked into. "
            "If you trust whoever wrote this checkpoint, load it with trust=True."
        )
    return loaded


class _Settling:
    def __init__(self, waiting: Mapping[int, _Pending]) -> None:
        self.waiting = dict(waiting)
        self._done: dict[int, Any] = {}
        self._alive: list[Any] = []

    def settle(self, value: Any) -> Any:
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
        self._settle_inside(value)
        pending = self.waiting.pop(id(value), None)
        return value if pending is None else pending.build(value)

    def _settle_inside(self, value: Any) -> None:
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        items: Any = value.items() if isinstance(value, dict) else enumerate(value) if type(value) is list else ()
        changed: dict[Hashable, Any] = {place: self.settle(inner) for place, inner in items}
        for place, inner in changed.items():
            value[place] = inner
