"""Fabric: what ``state`` may hold, and every argument of save and load, as the four strategies take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.plugins import Precision
from torch import nn
from torch.utils.data import DataLoader

from lightning_resume import UnsafeCheckpointError
from tests.harness import Zygote, zygote
from tests.runs import Augmented
from tests.toy_data import draw, global_rng, reseed
from tests.toy_fabric import (
    Toy,
    assert_equal,
    check_signatures,
    check_state_comes_back,
    fabric,
    launch,
    network,
    position,
    unchanged,
)

FORMS = ("folder", "file")


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


def toy(seed: int = 1, form: str = "folder", **options: Any) -> Toy:
    return Toy(fabric("single", form), seed, **options)


def saved(path: Path, form: str = "folder", *, steps: int = 3, **options: Any) -> Toy:
    """A run that has trained and saved."""
    run = toy(1, form)
    run.train(steps)
    run.fabric.save(path, run.state, **options)
    return run


def test_all_of_state_comes_back_on_a_single_device(tmp_path: Path) -> None:
    check_state_comes_back(tmp_path, name="single")


@pytest.mark.parametrize("name", ["ddp", "fsdp", "mp"])
def test_all_of_state_comes_back_on_every_rank(name: str, ranks: Zygote, tmp_path: Path) -> None:
    launch(ranks, check_state_comes_back, tmp_path, name=name)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "mp"])
def test_filter_strict_load_raw_and_load_without_state_work_on_every_rank(
    name: str, ranks: Zygote, tmp_path: Path
) -> None:
    launch(ranks, check_signatures, tmp_path, name=name)


@pytest.mark.parametrize("form", FORMS)
def test_a_filter_keeps_what_it_says_and_the_rest_loads_without_strict(form: str, tmp_path: Path) -> None:
    run = saved(tmp_path / "c", form, filter={"model": lambda name, _: name.startswith("0.")})
    weights = [p.detach().clone() for p in run.model.parameters()]
    other = toy(2, form)
    kept = [p.detach().clone() for p in other.model.parameters()]
    with pytest.raises(ValueError, match=r"model 'model': not the same parameter names(.|\n)*3\.weight"):
        other.fabric.load(tmp_path / "c", other.state)
    other.fabric.load(tmp_path / "c", other.state, strict=False)
    now = list(other.model.parameters())
    assert_equal([*now[:2]], weights[:2])
    assert_equal([*now[2:]], kept[2:])


@pytest.mark.parametrize("form", FORMS)
def test_without_strict_a_key_that_was_not_saved_stays(form: str, tmp_path: Path) -> None:
    saved(tmp_path / "c", form)
    other = toy(2, form)
    other.state["new"] = "mine"
    with pytest.raises(ValueError, match="'new'"):
        other.fabric.load(tmp_path / "c", other.state)
    other.fabric.load(tmp_path / "c", other.state, strict=False)
    assert other.state["new"] == "mine"
    assert other.state["step"] == 3


class Odd:
    """A class that is on no allow-list."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Odd

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("weights_only", [None, True])
@pytest.mark.parametrize("form", FORMS)
def test_an_object_outside_the_allow_list_is_named_and_loads_only_with_trust(
    form: str, weights_only: Any, tmp_path: Path
) -> None:
    run = toy(1, form)
    run.state["odd"] = Odd()
    run.fabric.save(tmp_path / "c", run.state)
    other = toy(2, form)
    other.state["odd"] = None
    with unchanged(other), pytest.raises(UnsafeCheckpointError, match=r"Odd(.|\n)*weights_only=False"):
        other.fabric.load(tmp_path / "c", other.state, weights_only=weights_only)
    other.fabric.load(tmp_path / "c", other.state, weights_only=False)
    assert other.state["odd"] == Odd()


def test_load_raw_takes_module_and_optimizer_out_of_our_folder(tmp_path: Path) -> None:
    run = toy()
    run.train(3)
    run.fabric.save(tmp_path / "model", {"model": run.model})
    run.fabric.save(tmp_path / "both", {"model": run.model, "optimizer": run.optimizer})
    other = toy(2)
    before = global_rng()
    other.fabric.load_raw(tmp_path / "model", other.model)
    other.fabric.load_raw(tmp_path / "both", other.optimizer)
    assert_equal(other.tensors(), run.tensors())
    assert global_rng() == before


def test_load_raw_reads_a_raw_file(tmp_path: Path) -> None:
    run = toy()
    run.train(3)
    torch.save(run.model.module.state_dict(), tmp_path / "model.pt")
    torch.save(run.optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = toy(2)
    other.fabric.load_raw(tmp_path / "model.pt", other.model)
    other.fabric.load_raw(tmp_path / "optimizer.pt", other.optimizer)
    assert_equal(other.tensors(), run.tensors())


def test_load_raw_without_strict_leaves_the_rest(tmp_path: Path) -> None:
    run = toy()
    state = run.model.module.state_dict()
    state.pop("3.bias")
    torch.save(state, tmp_path / "model.pt")
    other = toy(2)
    with pytest.raises(ValueError, match=r"3\.bias"):
        other.fabric.load_raw(tmp_path / "model.pt", other.model)
    kept = other.model.module[3].bias.detach().clone()
    other.fabric.load_raw(tmp_path / "model.pt", other.model, strict=False)
    assert_equal([other.model.module[3].bias, other.model.module[3].weight], [kept, run.model.module[3].weight])


@pytest.mark.parametrize("form", FORMS)
def test_load_without_state_returns_all_that_was_saved(form: str, tmp_path: Path) -> None:
    run = saved(tmp_path / "c", form)
    content = run.fabric.load(tmp_path / "c")
    assert content["step"] == 3
    assert content.keys() >= run.state.keys()
    assert_equal([content["model"]["0.weight"]], [run.model.module[0].weight])


@pytest.mark.parametrize("form", FORMS)
def test_two_models_and_two_optimizers_come_back(form: str, tmp_path: Path) -> None:
    def pair(seed: int) -> tuple[Any, dict[str, Any]]:
        made = fabric("single", form)
        torch.manual_seed(seed)
        state: dict[str, Any] = {}
        for name, size in (("generator", 3), ("critic", 5)):
            module = nn.Sequential(nn.Linear(4, size), nn.Linear(size, 1))
            state[name], state[f"{name} adam"] = made.setup(module, torch.optim.Adam(module.parameters()))
        return made, state

    def train(made: Any, state: dict[str, Any]) -> None:
        for name in ("generator", "critic"):
            made.backward(state[name](torch.ones(2, 4)).square().mean())
            state[f"{name} adam"].step()
            state[f"{name} adam"].zero_grad()

    made, state = pair(1)
    train(made, state)
    made.save(tmp_path / "c", state)
    again, other = pair(2)
    again.load(tmp_path / "c", other)
    train(made, state)
    train(again, other)
    for name in ("generator", "critic"):
        assert_equal(list(other[name].parameters()), list(state[name].parameters()))


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_over_two_modules_comes_back(form: str, tmp_path: Path) -> None:
    def make(seed: int) -> tuple[Any, dict[str, Any]]:
        made = fabric("single", form)
        torch.manual_seed(seed)
        one, two = made.setup_module(nn.Linear(4, 3)), made.setup_module(nn.Linear(3, 1))
        optimizer = made.setup_optimizers(torch.optim.Adam([*one.parameters(), *two.parameters()]))
        return made, {"one": one, "two": two, "optimizer": optimizer}

    def train(made: Any, state: dict[str, Any]) -> None:
        made.backward(state["two"](state["one"](torch.ones(2, 4))).square().mean())
        state["optimizer"].step()
        state["optimizer"].zero_grad()

    made, state = make(1)
    train(made, state)
    made.save(tmp_path / "c", state)
    again, other = make(2)
    again.load(tmp_path / "c", other)
    train(made, state)
    train(again, other)
    assert_equal(
        [*other["one"].parameters(), *other["two"].parameters()],
        [*state["one"].parameters(), *state["two"].parameters()],
    )


class Partly(nn.Sequential):
    """A frozen layer first, and one last that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (nn.Linear(4, 4).requires_grad_(False), *network(), nn.Linear(4, 4)):
            self.append(layer)

    def forward(self, x: Any) -> Any:
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


@pytest.mark.parametrize("form", FORMS)
def test_frozen_parameters_and_those_without_gradients_come_back(form: str, tmp_path: Path) -> None:
    run = toy(1, form, net=Partly)

    def optimizer_keys(one: Toy) -> list[int]:
        return sorted(one.optimizer.optimizer.state_dict()["state"])

    def all_tensors(one: Toy) -> list[Any]:
        state = one.optimizer.optimizer.state_dict()["state"]
        return [*one.model.module.state_dict().values(), *(t for key in sorted(state) for t in state[key].values())]

    for batch in run.loader:
        run.step(batch)
    run.fabric.save(tmp_path / "c", run.state)
    other = toy(2, form, net=Partly)
    other.fabric.load(tmp_path / "c", other.state)
    assert optimizer_keys(other) == optimizer_keys(run)
    assert_equal(all_tensors(other), all_tensors(run))
    expected = run.train(3)
    again = toy(2, form, net=Partly)
    again.fabric.load(tmp_path / "c", again.state)
    assert again.train(3) == expected
    assert not other.model.module[0].weight.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_saving_before_the_first_step_does_not_change_the_run(form: str, tmp_path: Path) -> None:
    whole = toy(1, form)
    steps = whole.train(9)
    run = saved(tmp_path / "c", form, steps=0)
    assert not run.optimizer.optimizer.state
    assert run.train(9) == steps
    assert_equal(run.tensors(), whole.tensors())
    again = toy(2, form)
    again.fabric.load(tmp_path / "c", again.state)
    assert not again.optimizer.optimizer.state
    assert again.train(9) == steps
    assert_equal(again.tensors(), whole.tensors())


def accumulate(run: Toy, save: Any = None, *, every: int = 3, batches: int = 7, done: int = 0) -> list[Any]:
    """Steps after every third batch of one epoch; calls ``save`` after the fifth."""
    seen = []
    for index, batch in enumerate(run.loader, done):
        seen.append(run.step(batch, optimizes=(index + 1) % every == 0))
        if save is not None and index == 4:
            save()
        if index + 1 == batches:
            break
    return seen


def test_a_save_inside_an_accumulation_window_goes_back_to_the_last_step_and_says_so(tmp_path: Path) -> None:
    whole = toy(net=lambda: nn.Linear(4, 1))  # without buffers or a user's counters, which a save takes as they are
    run = toy(net=lambda: nn.Linear(4, 1))

    def save() -> None:
        state = {key: run.state[key] for key in ("model", "optimizer", "scheduler", "loader", "step")}
        with pytest.warns(UserWarning, match="goes back to the last optimizer step, and the 2 batches"):
            run.fabric.save(tmp_path / "c", state)

    expected = [steps[:2] for steps in accumulate(whole)]
    assert [steps[:2] for steps in accumulate(run, save)] == expected
    again = toy(2, net=lambda: nn.Linear(4, 1))
    state = {key: again.state[key] for key in ("model", "optimizer", "scheduler", "loader", "step")}
    again.fabric.load(tmp_path / "c", state)
    again.state["step"] = state["step"]
    assert [steps[:2] for steps in accumulate(again, done=3)] == expected[3:]
    assert_equal(again.tensors(), whole.tensors())


def test_batch_statistics_of_an_open_window_go_back_too(tmp_path: Path) -> None:
    whole = toy()
    accumulate(whole)
    run = toy()

    def save() -> None:
        with pytest.warns(UserWarning, match="goes back"):
            run.fabric.save(tmp_path / "c", {key: run.state[key] for key in ("model", "optimizer", "loader")})

    accumulate(run, save)
    again = toy(2)
    again.fabric.load(tmp_path / "c", {key: again.state[key] for key in ("model", "optimizer", "loader")})
    accumulate(again, done=3)
    assert_equal(list(again.model.module.buffers()), list(whole.model.module.buffers()))


def test_random_numbers_drawn_after_the_last_step_of_an_open_window_are_not_drawn_twice(tmp_path: Path) -> None:
    whole, state = toy(), ("model", "optimizer", "loader")
    expected = accumulate(whole)
    run = toy()

    def save() -> None:
        with pytest.warns(UserWarning, match="goes back"):
            run.fabric.save(tmp_path / "c", {key: run.state[key] for key in state})

    accumulate(run, save)
    again = toy(2)
    again.fabric.load(tmp_path / "c", {key: again.state[key] for key in state})
    assert accumulate(again, done=3)[0][1] == expected[3][1]  # the loss, which dropout is in


@pytest.mark.parametrize("form", FORMS)
def test_a_loader_set_up_after_the_load_goes_on_too(form: str, tmp_path: Path) -> None:
    run = saved(tmp_path / "c", form)
    whole = [batch[0].tolist() for batch in run.loader]
    later = fabric("single", form)
    model = later.setup_module(network())
    optimizer = later.setup_optimizers(torch.optim.Adam(model.parameters()))
    later.load(tmp_path / "c", {"model": model, "optimizer": optimizer})
    loader = later.setup_dataloaders(DataLoader(Augmented(30), 4, shuffle=True))
    # a `break` has ended the epoch of the first run at 3 batches, so its next one is epoch 1; this one goes on
    rest = [batch[0].tolist() for batch in loader]
    assert len(rest) == 8 - 3
    assert [batch[0].tolist() for batch in loader] == whole


@pytest.mark.parametrize("form", FORMS)
def test_loading_a_model_alone_leaves_loaders_and_generators(form: str, tmp_path: Path) -> None:
    run = saved(tmp_path / "c", form)
    other = toy(2, form)
    where, before = position(other), global_rng()
    other.fabric.load(tmp_path / "c", {"model": other.model})
    assert_equal(list(other.model.parameters()), list(run.model.parameters()))
    assert position(other) == where
    assert global_rng() == before


@pytest.mark.parametrize("form", FORMS)
def test_numpys_generator_state_in_state_loads_by_default(form: str, tmp_path: Path) -> None:
    reseed(4)
    run = toy(1, form)
    expected = np.random.get_state()
    run.fabric.save(tmp_path / "c", {"numpy": np.random.get_state(), "python": global_rng()[0]})
    state: dict[str, Any] = {"numpy": None, "python": None}
    run.fabric.load(tmp_path / "c", state)
    draw()
    np.random.set_state(state["numpy"])
    assert np.random.get_state()[1].tolist() == expected[1].tolist()
    assert state["python"] == global_rng()[0] or isinstance(state["python"], tuple)


@pytest.mark.parametrize("workers", [0, 2])
def test_peeking_at_a_loader_before_training_changes_nothing(workers: int, tmp_path: Path) -> None:
    whole = toy(num_workers=workers)
    expected = [whole.step(batch) for batch in whole.loader]
    run = toy(num_workers=workers)
    next(iter(run.loader))
    assert [run.step(batch) for batch in run.loader] == expected
    run.fabric.save(tmp_path / "c", run.state)
    expected = run.train(5)
    again = toy(2, num_workers=workers)
    again.fabric.load(tmp_path / "c", again.state)
    assert again.train(5) == expected


class Scaled(Precision):
    """Keeps a factor, as the plugin for ``16-mixed`` does."""

    factor = 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.factor = state_dict["factor"]


@pytest.mark.parametrize("form", FORMS)
def test_what_the_precision_plugin_keeps_comes_back(form: str, tmp_path: Path) -> None:
    factors = []
    for factor in (8.0, 1.0):
        made = fabric("single", form, plugins=[Scaled()])
        made.strategy.precision.factor = factor
        state = dict(zip(("model", "optimizer"), made.setup(*trainable()), strict=True))
        if factor == 8.0:
            made.save(tmp_path / "c", state)
        else:
            made.load(tmp_path / "c", state)
        factors.append(made.strategy.precision.factor)
    assert factors == [8.0, 8.0]


def trainable() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)
