"""The modules and buffers of a model, seen again at every step without a walk through all of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_resume.state.buffers import BufferCopies
from lightning_resume.state.modules import ModuleTree


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()), nn.BatchNorm1d(2))
    net.register_buffer("own", torch.ones(3), persistent=False)
    return net


def tie(net: nn.Module) -> None:
    net[1][0].running_mean = net[2].running_mean


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": id,
    "a module more": lambda net: net.append(nn.BatchNorm1d(2)),
    "a module deeper down": lambda net: net[1].append(nn.BatchNorm1d(2)),
    "a module less": lambda net: net.pop(2),
    "another module": lambda net: net.__setitem__(2, nn.BatchNorm1d(5)),
    "the same modules in another order": lambda net: net.insert(0, net.pop(2)),
    "another name": lambda net: net.add_module("named", net._modules.pop("2")),
    "a buffer more": lambda net: net[0].register_buffer("more", torch.ones(1)),
    "a buffer less": lambda net: net._buffers.pop("own"),
    "another tensor": lambda net: setattr(net, "own", torch.zeros(7)),
    "no tensor": lambda net: setattr(net, "own", None),
    "one tensor twice": tie,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_seen(change: str) -> None:
    net, copies = model(), BufferCopies()
    tree = ModuleTree(net)
    copies.take([tree])
    CHANGES[change](net)
    copies.take([tree])
    expected = dict(net.named_buffers())
    assert {name: buffer.tolist() for name, buffer in copies.of(net).items()} == {
        name: buffer.tolist() for name, buffer in expected.items()
    }
    assert tree.named == list(net.named_modules())


def test_copies_are_of_the_moment_at_which_they_were_taken() -> None:
    net, copies = model(), BufferCopies()
    tree = ModuleTree(net)
    for _ in range(2):
        copies.take([tree])
        taken = {name: buffer.clone() for name, buffer in net.named_buffers()}
        net(torch.randn(4, 2))
        assert all(torch.equal(copy, taken[name]) for name, copy in copies.of(net).items())
        assert not torch.equal(copies.of(net)["2.running_mean"], net[2].running_mean)
