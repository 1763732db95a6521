"""Stores that refuse, break connections or lose answers, between us and real servers; several ranks at one store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
import torch

from lightning_resume import (
    CheckpointManager,
    CheckpointSaveError,
    ResumeWarning,
    list_checkpoints,
    verify,
)
from lightning_resume.checkpoint.layout import step_name
from lightning_resume.checkpoint.names import MANIFEST_NAME
from lightning_resume.checkpoint.paths import as_path
from tests.harness import Zygote, zygote
from tests.servers import Fault, FaultyProxy, Store
from tests.test_remote import save, value_at
from tests.toy_fabric import Toy, assert_equal, fabric, launch

pytest_plugins = ["tests.servers"]

# the client gives up soon: its own patience (40 s and more for one object) is not what is tested
IMPATIENT = {"config_kwargs": {"connect_timeout": 1, "read_timeout": 1, "retries": {"max_attempts": 1}}}
SECONDS = 60.0

# the faults are those of HTTP, and Azure's client cannot be told to give up before 80 s
over_http = pytest.mark.parametrize("server", ["s3-moto"], indirect=True)


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


@pytest.fixture
def proxy(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultyProxy, str]]:
    """A proxy before the store, and a URL through which everything reaches the store by it."""
    with FaultyProxy(store.port) as proxy:
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
        through = store.through(proxy.port)
        options = {**through.storage_options, **IMPATIENT}
        fsspec.config.conf["s3"] = options
        try:
            yield proxy, store.url
        finally:
            del fsspec.config.conf["s3"]


@over_http
@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.RESET, Fault.CUT, Fault.LOST_REPLY])
@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD"])
def test_a_request_that_fails_once_is_tried_again_by_the_client(
    proxy: tuple[FaultyProxy, str], fault: Fault, method: str
) -> None:
    faulty, url = proxy
    save(f"{url}/c", 1)
    faulty.fail(fault, times=1, method=method)
    save(f"{url}/c", 2)
    faulty.fail(fault, times=1, method=method)
    assert value_at(f"{url}/c") == 2


@over_http
@pytest.mark.parametrize("what", ["distcp", ".metadata", ".index", "meta.pt", "manifest.json", ""])
def test_a_store_that_refuses_a_part_fails_the_save_and_keeps_the_old_one(
    proxy: tuple[FaultyProxy, str], what: str
) -> None:
    faulty, url = proxy
    save(f"{url}/c", 1)
    faulty.fail(Fault.SLOW_DOWN, method="PUT", path=what)
    started = time.monotonic()
    with pytest.raises(CheckpointSaveError, match="c failed: rank 0"):
        save(f"{url}/c", 2)
    assert time.monotonic() - started < SECONDS
    faulty.heal()
    assert value_at(f"{url}/c") == 1
    save(f"{url}/c", 3)
    assert value_at(f"{url}/c") == 3
    assert len(as_path(f"{url}/c").names()) == 2  # type: ignore[union-attr]


@over_http
def test_a_store_that_hangs_is_given_up_within_the_clients_limits(proxy: tuple[FaultyProxy, str]) -> None:
    faulty, url = proxy
    save(f"{url}/c", 1)
    faulty.fail(Fault.HANG, method="PUT")
    started = time.monotonic()
    with pytest.raises(CheckpointSaveError):
        save(f"{url}/c", 2)
    assert time.monotonic() - started < SECONDS
    faulty.heal()
    assert value_at(f"{url}/c") == 1


@over_http
def test_a_store_that_does_not_answer_makes_no_run_go_back(proxy: tuple[FaultyProxy, str]) -> None:
    """Only what is there and damaged sends a run back to an older checkpoint."""
    faulty, url = proxy
    model = torch.nn.Linear(2, 1)
    manager = CheckpointManager(f"{url}/run")
    for step in (1, 2):
        torch.nn.init.constant_(model.bias, step)
        manager.save({"model": model}, step=step)
    for path in (MANIFEST_NAME, "distcp"):
        faulty.fail(Fault.SLOW_DOWN, method="GET", path=f"{step_name(2)}/.*{path}")
        with pytest.raises(OSError, match="SlowDown"):
            manager.load({"model": model})
        faulty.heal()
    faulty.fail(Fault.SLOW_DOWN)
    with pytest.raises(OSError, match="SlowDown"):
        list_checkpoints(f"{url}/run")
    faulty.heal()
    manager.load({"model": model})
    assert manager.loaded is not None
    assert manager.loaded.step == 2


@over_http
def test_a_run_goes_on_without_a_save_where_the_user_chose_so(proxy: tuple[FaultyProxy, str]) -> None:
    faulty, url = proxy
    model = torch.nn.Linear(2, 1)
    manager = CheckpointManager(f"{url}/run", on_save_error="warn")
    manager.save({"model": model}, step=1)
    faulty.fail(Fault.SLOW_DOWN, method="PUT")
    with pytest.warns(ResumeWarning, match="Training goes on without it"):
        assert manager.save({"model": model}, step=2) is None
    faulty.heal()
    torch.nn.init.constant_(model.bias, 3)
    assert manager.save({"model": model}, step=3) is not None
    manager.close()
    assert [info.step for info in list_checkpoints(f"{url}/run")] == [3, 1]


# --- several ranks ---


def check_ranks_at_a_store(folder: Path, *, url: str, protocol: str, options: dict[str, Any], name: str) -> None:
    """All ranks write to the store and read from it; overwriting leaves one whole checkpoint."""
    fsspec.config.conf[protocol] = options
    first = Toy(fabric(name))
    manager = CheckpointManager(f"{url}/run", fabric=first.fabric, keep=1)
    for step in (1, 2):
        first.train(1)
        manager.save(first.state, step=step, user_content=step)
        manager.save(first.state, step=step, tag="last")
    manager.close()
    saved, whole = first.tensors(), first.train(6)
    again = Toy(fabric(name), seed=2)
    manager = CheckpointManager(f"{url}/run", fabric=again.fabric, verify="first")
    assert manager.load(again.state, path=f"{url}/run/{step_name(2)}") == 2
    assert_equal(again.tensors(), saved)
    assert again.train(6) == whole
    if again.fabric.global_rank == 0:
        assert verify(f"{url}/run/last", progress=False).files >= 5
        assert sorted(info.path.rpartition("/")[2] for info in list_checkpoints(f"{url}/run")) == ["last", step_name(2)]
    assert not list(folder.glob("**/*.distcp"))


@pytest.mark.parametrize(
    ("server", "name"),
    [("s3-moto", "ddp"), ("s3-moto", "fsdp"), ("s3-moto", "mp"), ("s3-s3rver", "mp"), ("azure", "mp"), ("sftp", "mp")],
    indirect=["server"],
)
def test_several_ranks_save_to_a_store_and_go_on_from_it(
    ranks: Zygote, tmp_path: Path, store: Store, name: str
) -> None:
    arguments = {"url": store.url, "protocol": store.protocol, "options": dict(store.storage_options), "name": name}
    launch(ranks, check_ranks_at_a_store, tmp_path, **arguments)
