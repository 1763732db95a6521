"""The modules in a module by name, without a walk through all of them at every step of training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, final

import torch
from torch.nn import Module

from lightning_resume.state.collect import clean_name, user_module


@final
class ModuleTree:
    """The modules in ``root``, and their buffers. :meth:`refresh` sees what was added, taken away or replaced."""

    def __init__(self, root: Module) -> None:
        self.root = root
        self.named: Sequence[tuple[str, Module]] = ()
        """Each module with its name, as ``named_modules`` gives them."""
        self._prefixes: list[str] = []
        self._children: list[dict[str, Module | None]] = []
        self._buffers: list[dict[str, torch.Tensor | None]] = []
        self._seen: tuple[list[Any], ...] = ()

    def refresh(self) -> ModuleTree:
        """Walks again where anything has changed; to find out takes a fraction of the time."""
        if not self.named or self._look() != self._seen:
            self.named = list(user_module(self.root).named_modules())
            self._prefixes = [f"{clean_name(name)}." if name else "" for name, _ in self.named]
            self._children = [module._modules for _, module in self.named]
            self._buffers = [module._buffers for _, module in self.named]
            self._seen = self._look()
        return self

    def _look(self) -> tuple[list[Any], ...]:
        together = itertools.chain.from_iterable
        # the modules are held by `named`, so that no other gets the id of one of them
        children = map(id, together(map(dict.values, self._children)))
        return list(children), list(together(self._children)), list(together(self._buffers))

    def buffers(self) -> dict[str, torch.Tensor]:
        """Each buffer under the first of its names."""
        found: dict[int, tuple[str, torch.Tensor]] = {}
        for prefix, buffers in zip(self._prefixes, self._buffers, strict=True):
            for name, buffer in buffers.items():
                if buffer is not None:
                    found.setdefault(id(buffer), (f"{prefix}{name}", buffer))
        return dict(found.values())
