"""Imports the loaders' packages of the tests, or says what has to be installed.

They are installed without what they require (`Makefile`), since torchvision brings gigabytes of CUDA to a CPU build of
torch. What they import of it, and of transformers, at their start, is then answered by empty modules: no loader uses
any of it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

STAND_INS = ("torchvision", "transformers")


class _Empty(types.ModuleType):
    """A module in which every name is a class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        root = name.partition(".")[0]
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if root in STAND_INS else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def package(name: str, *modules: str) -> Any:
    """The package's module ``name``, with ``modules`` imported too; skips the module that asks, on CI fails it."""
    try:
        return imported(name, *modules)
    except ModuleNotFoundError as error:
        reason = f"needs the package of {name}: make .venv ({error})"
        if os.environ.get("CI"):
            raise AssertionError(reason) from error
        pytest.skip(reason, allow_module_level=True)


def imported(name: str, *modules: str) -> Any:
    """The package's module ``name``, with ``modules`` imported too.

    Raises:
        ModuleNotFoundError: It is not installed, or lacks more than what is stood in for.
    """
    finder, before = _StandIns(), set(sys.modules)
    sys.meta_path.append(finder)  # the last: what is really installed is found first
    try:
        found = importlib.import_module(name)
        for module in modules:
            importlib.import_module(f"{name}.{module}")
    finally:
        sys.meta_path.remove(finder)
        _forget(set(sys.modules) - before)
    return found


def _forget(modules: Sequence[str] | set[str]) -> None:
    """Empty modules must not be found by others that ask whether these packages are installed."""
    for module in modules:
        if isinstance(sys.modules.get(module), _Empty):
            del sys.modules[module]
