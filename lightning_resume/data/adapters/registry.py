"""Which adapter a loader gets: the user's, then those of installed packages, then ours."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from typing import Any, TypeVar

from lightning_resume.data.adapters.energon import SavableDataLoaderAdapter
from lightning_resume.data.adapters.huggingface import IterableDatasetAdapter
from lightning_resume.data.adapters.litdata import StreamingDataLoaderAdapter
from lightning_resume.data.adapters.mosaic import StreamingDatasetAdapter
from lightning_resume.data.adapters.protocol import LoaderAdapter
from lightning_resume.data.adapters.torchdata import StatefulDataLoaderAdapter
from lightning_resume.errors import ResumeWarning

GROUP = "lightning_resume.adapters"

A = TypeVar("A", bound=type[LoaderAdapter])

_OURS: list[type[LoaderAdapter]] = [
    StreamingDatasetAdapter,
    SavableDataLoaderAdapter,
    StreamingDataLoaderAdapter,
    IterableDatasetAdapter,
    StatefulDataLoaderAdapter,
]
_registered: list[type[LoaderAdapter]] = []


def register_adapter(adapter: A) -> A:
    """Makes ``make_resumable`` ask ``adapter`` first, before those registered earlier, those of installed packages and
    ours; usable as a decorator. Registering it again changes nothing.

    A package does the same for all its users by an entry point of the group ``lightning_resume.adapters`` that names
    the class.

    Raises:
        TypeError: It is no class derived from :class:`LoaderAdapter`, or lacks one of its methods.
    """
    _check(adapter)
    if adapter not in _registered:
        _registered.insert(0, adapter)
    return adapter


def unregister_adapter(adapter: type[LoaderAdapter]) -> None:
    """Takes back :func:`register_adapter`."""
    if adapter in _registered:
        _registered.remove(adapter)


def adapter_for(loader: Any) -> type[LoaderAdapter] | None:
    """The class whose loader this is, ``None`` when nobody claims it."""
    return next((adapter for adapter in [*_registered, *_installed(), *_OURS] if adapter.matches(loader)), None)


@functools.cache
def _installed() -> list[type[LoaderAdapter]]:
    return [adapter for entry in importlib.metadata.entry_points(group=GROUP) if (adapter := _loaded(entry))]


def _loaded(entry: importlib.metadata.EntryPoint) -> type[LoaderAdapter] | None:
    try:
        adapter = entry.load()
        _check(adapter)
    except Exception as error:  # whatever another package does wrong must not end a training run that may not need it
        package = entry.dist.name if entry.dist is not None else "an unknown package"
        warnings.warn(
            f"The entry point `{entry.name} = {entry.value}` of {package} (group {GROUP}) is left out:"
            f" {type(error).__name__}: {error}. Loaders that it is for are treated like any other: update or uninstall"
            f" {package}.",
            ResumeWarning,
            stacklevel=2,
        )
        return None
    return adapter  # type: ignore[no-any-return]


def _check(adapter: Any) -> None:
    if not (isinstance(adapter, type) and issubclass(adapter, LoaderAdapter)):
        raise TypeError(f"{adapter!r} is no adapter: it must be a class derived from LoaderAdapter")
    missing = sorted(getattr(adapter, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"{adapter.__name__} is not a whole adapter: it lacks {', '.join(missing)}")
