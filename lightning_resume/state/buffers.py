"""Copies of modules' buffers, such as BatchNorm's statistics: every forward changes them, also of batches that no
optimizer step has followed yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lightning_resume.state.modules import ModuleTree


class BufferCopies:
    """The buffers of some modules at one moment; the copies' memory is used again."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, str], torch.Tensor] = {}

    def take(self, trees: Iterable[ModuleTree]) -> None:
        """Copies the buffers as they are now."""
        current = {
            (id(tree.root), name): buffer.detach()
            for tree in trees
            for name, buffer in tree.refresh().buffers().items()
        }
        if _layout(current) != _layout(self._copies):
            self._copies = {key: buffer.clone() for key, buffer in current.items()}
        elif current:
            torch._foreach_copy_(list(self._copies.values()), list(current.values()))

    def of(self, root: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The copies of ``root``'s buffers by name."""
        return {name: copy for (owner, name), copy in self._copies.items() if owner == id(root)}


def _layout(buffers: dict[tuple[int, str], torch.Tensor]) -> list[Any]:
    return [(key, buffer.shape, buffer.dtype, buffer.device) for key, buffer in buffers.items()]
