"""State that neither DCP's flat keys nor torch's ``load_state_dict`` bring back as it was comes back all the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_resume import CheckpointCorruptError, CheckpointManager, ResumableSingleDeviceStrategy, consolidate
from lightning_resume.checkpoint.components import pack
from lightning_resume.checkpoint.exact import checked, put_back_lost
from tests.attacks import replace_item

EXTRA: list[tuple[Any, Any]] = [
    ({"n": 2}, {}),
    ({"n": 1}, {"n": 1, "m": 2}),
    ({1: 2, 3: torch.ones(1)}, {1: 0, 3: torch.zeros(1)}),
    ({True: 1}, {}),
    ({"hist": {10: 0.5}}, {"hist": {}}),
    ({}, {"n": 1}),
    ({"a": {}, "n": 1}, {"a": {}, "n": 0}),
    ({"list": [{}, {1: 2}, [3]]}, {}),
    ((1, {2: torch.ones(2)}, ()), (0,)),
    (torch.arange(3), torch.zeros(3, dtype=torch.int64)),
    (7, 0),
]


class Extra(nn.Module):
    """A module with more state than tensors."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight, self.extra = nn.Parameter(torch.zeros(2)), extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return type(other) is torch.Tensor and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("saved_in", [False, "thread"], ids=["at once", "in the background"])
@pytest.mark.parametrize(("saved", "current"), EXTRA, ids=repr)
def test_extra_state_of_a_module_comes_back_as_it_was(saved: Any, current: Any, saved_in: Any, tmp_path: Path) -> None:
    module, expected = Extra(saved), copy.deepcopy(saved)
    with CheckpointManager(tmp_path, async_save=saved_in) as manager:
        manager.save({"model": nn.Sequential(module)}, step=1)
        module.extra = "changed right after"
    other = Extra(copy.deepcopy(current))
    CheckpointManager(tmp_path).load({"model": nn.Sequential(other)})
    assert same(other.extra, expected)


def test_extra_state_comes_back_by_fabric_without_state_and_in_one_file(tmp_path: Path) -> None:
    extra = {"n": 2, 5: torch.ones(1), "empty": {}}
    fabric = Fabric(strategy=ResumableSingleDeviceStrategy(), accelerator="cpu")
    fabric.save(tmp_path / "c", {"model": fabric.setup(Extra(extra))})
    fresh = Extra({})
    fabric.load(tmp_path / "c", {"model": fabric.setup(fresh)})
    assert same(fresh.extra, extra)
    assert same(fabric.load(tmp_path / "c")["model"]["_extra_state"], extra)
    assert same(torch.load(consolidate(tmp_path / "c"), weights_only=False)["model"]["_extra_state"], extra)


def test_what_is_no_dict_of_places_is_damage(tmp_path: Path) -> None:
    for lost in (None, {"model": 1}, {"model": [1]}, {"model": [([], 1)]}, {"model": [(["a"], 1, 2)]}):
        with pytest.raises(CheckpointCorruptError, match="component 'lost'"):
            checked(lost)
    for path in (["a", 7, "b"], ["a", "b", "c", "d"]):
        with pytest.raises(CheckpointCorruptError, match="'model' has no"):
            put_back_lost({"model": {"a": [1]}}, {"model": [(path, 1)]})
    manager = CheckpointManager(tmp_path)
    manager.save({"model": Extra({1: 2})}, step=1)
    replace_item(tmp_path / "step-00000001", "resume.lost", pack({"model": 3}))
    with pytest.raises(CheckpointCorruptError, match="component 'lost'"):
        manager.load({"model": Extra({})}, path=tmp_path / "step-00000001")


class Counting(torch.optim.Optimizer):
    """Keeps a count of all steps beside what it keeps of parameters, as MADGRAD does, and odd containers."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "at": {0: 0.1, 10: 0.2}, "none": {}})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        count = self.state.setdefault("k", torch.zeros(1, dtype=torch.long))  # type: ignore[call-overload]
        count += 1
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("history", {})[int(count)] = parameter.clone()
            state["pair"] = (parameter.clone(), {})
            parameter += float(count)


@pytest.mark.parametrize("with_model", [True, False])
def test_an_optimizer_of_the_users_keeps_what_torch_keeps(with_model: bool, tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Counting]:
        model = nn.Linear(2, 2)
        return model, Counting(model.parameters())

    model, optimizer = make()
    for _ in range(2):
        optimizer.step()
    state = lambda model, optimizer: {"o": optimizer, **({"m": model} if with_model else {})}  # noqa: E731
    CheckpointManager(tmp_path).save(state(model, optimizer), step=1)
    other = make()
    CheckpointManager(tmp_path).load(state(*other))
    stock = make()[1]
    stock.load_state_dict(optimizer.state_dict())
    for loaded in (stock, other[1]):
        assert same(loaded.state_dict()["state"], optimizer.state_dict()["state"])
        assert same(loaded.param_groups[0]["at"], {0: 0.1, 10: 0.2})
        assert loaded.param_groups[0]["none"] == {}


def test_an_optimizer_without_its_model_keeps_its_moments(tmp_path: Path) -> None:
    def make() -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)

    optimizer, other = make(), make()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    CheckpointManager(tmp_path).save({"o": optimizer}, step=1)
    CheckpointManager(tmp_path).load({"o": other})
    assert list(other.state_dict()["state"]) == [0, 1]
    assert same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_key_of_the_optimizer_that_is_a_parameters_name_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer.state["weight"] = torch.zeros(1)  # type: ignore[index]
    optimizer.state[model.weight] = {"momentum_buffer": torch.zeros(2, 2)}
    with pytest.raises(Exception, match="a key that is also a parameter's name"):
        CheckpointManager(tmp_path).save({"m": model, "o": optimizer}, step=1)


class Exact(torch.optim.SGD):
    """Keeps moments of bfloat16 parameters in float32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter, dtype=torch.float32))
                moment.mul_(0.9).add_(parameter.grad.float(), alpha=0.1234567)
                parameter.add_(moment.to(parameter.dtype), alpha=-0.1)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.ASGD, torch.optim.Adam, Exact])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_optimizers_state_keeps_its_dtype(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(16, 16).to(dtype)
        return model, kind(model.parameters(), lr=1e-2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for number in steps:
            torch.manual_seed(number)
            optimizer.zero_grad()
            model(torch.randn(8, 16).to(dtype)).pow(2).sum().backward()
            optimizer.step()

    one, other = make(), make()
    train(*one, range(3))
    CheckpointManager(tmp_path).save({"m": one[0], "o": one[1]}, step=1)
    train(*one, range(3, 40))
    CheckpointManager(tmp_path).load({"m": other[0], "o": other[1]})
    train(*other, range(3, 40))
    assert same(dict(one[0].state_dict()), dict(other[0].state_dict()))
    assert same(one[1].state_dict()["state"], other[1].state_dict()["state"])


def test_moments_follow_a_parameter_that_is_of_another_dtype_now(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    CheckpointManager(tmp_path).save({"m": model, "o": optimizer}, step=1)
    smaller = nn.Linear(4, 4).bfloat16()
    its = torch.optim.Adam(smaller.parameters())
    CheckpointManager(tmp_path).load({"m": smaller, "o": its})
    assert {value.dtype for value in its.state[smaller.weight].values()} == {torch.bfloat16, torch.float32}
    assert its.state[smaller.weight]["exp_avg"].dtype == torch.bfloat16
