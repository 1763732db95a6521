"""Checkpoints on real servers: S3 (two implementations), Azure, SFTP; and in memory. All by URL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

from lightning_resume import (
    CheckpointCorruptError,
    CheckpointManager,
    MissingPackageError,
    ResumeCallback,
    consolidate,
    list_checkpoints,
    prune,
    verify,
)
from lightning_resume.checkpoint import commit, remote
from lightning_resume.checkpoint.layout import Kind, classify, leftovers, newest, step_name
from lightning_resume.checkpoint.manifest import read_manifest
from lightning_resume.checkpoint.names import MANIFEST_NAME, UNFINISHED_NAME
from lightning_resume.checkpoint.paths import as_path
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.remote import RemotePath
from lightning_resume.checkpoint.writer import write_checkpoint
from lightning_resume.cli import main
from tests.servers import Store
from tests.toy_fabric import Toy, assert_equal, fabric
from tests.toy_trainer import KillAt, Quiet, assert_same, fit

pytest_plugins = ["tests.servers"]


@pytest.fixture
def url(store: Store) -> Any:
    """A folder of the test's own on a real server, which fsspec is set up to reach by URL alone."""
    with store.configure():
        yield store.url


def save(url: Any, value: float, **options: Any) -> None:
    state = {"model": {"w": torch.full((64, 64), value), "none": torch.empty(0)}, "list": [value]}
    write_checkpoint(url, state=state, leaves={"resume.x": b"%d" % value}, meta={"value": value}, **options)


def value_at(url: Any) -> float:
    """The value that every part of the checkpoint agrees on."""
    reader = CheckpointReader(url)
    state, leaf, meta = reader.read(), float(reader.leaf("resume.x")), reader.meta()["value"]
    (weight,) = state["model"]["w"].unique().tolist()
    assert weight == state["list"][0] == leaf == meta
    return weight


def names(url: str) -> list[str]:
    path = as_path(url)
    assert isinstance(path, RemotePath)
    return path.names()


def test_a_checkpoint_comes_back_and_verifies(url: str) -> None:
    save(f"{url}/c", 1)
    assert value_at(f"{url}/c") == 1
    assert names(f"{url}/c") == [".index", ".metadata", "__0_0.distcp", "manifest.json", "meta.pt"]
    assert verify(f"{url}/c", progress=False).files == 5
    assert classify(f"{url}/c") is Kind.RESUMABLE


def test_overwriting_replaces_it_and_leaves_nothing_else(url: str) -> None:
    for value in (1, 2, 3):
        save(f"{url}/c", value)
        assert value_at(f"{url}/c") == value
        assert len(names(f"{url}/c")) == (5 if value == 1 else 2)
    commit.delete_checkpoint(f"{url}/c")
    assert classify(f"{url}/c") in (Kind.MISSING, Kind.NOT_A_CHECKPOINT)
    with pytest.raises(FileNotFoundError):
        commit.delete_checkpoint(f"{url}/c")


def test_a_large_checkpoint_is_sent_in_parts_and_read_in_ranges(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
    state = {"w": torch.arange(5_000_000, dtype=torch.float32), "v": torch.arange(5_000_000.0), "z": torch.ones(3)}
    write_checkpoint(f"{url}/c", state=state, leaves={}, meta=None)
    loaded = CheckpointReader(f"{url}/c").read()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert sorted(read_manifest(f"{url}/c").files) == [".index", ".metadata", "__0_0.distcp", "__0_1.distcp", "meta.pt"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_stock_torch_reads_it(url: str, store: Store) -> None:
    save(f"{url}/c", 4)
    state = {"model": {"w": torch.zeros(64, 64)}}
    if store.protocol == "sftp":
        pytest.skip("torch's FsspecReader asks fsspec for the path with its host")
    dcp.load(state, storage_reader=FsspecReader(f"{url}/c"), no_dist=True)
    assert torch.equal(state["model"]["w"], torch.full((64, 64), 4.0))


def test_a_fabric_run_is_saved_and_goes_on(url: str) -> None:
    first = Toy(fabric())
    first.train(3)
    first.fabric.save(f"{url}/run/{step_name(3)}", first.state)
    saved, whole = first.tensors(), first.train(6)
    again = Toy(fabric(), seed=2)
    again.fabric.load(f"{url}/run", again.state)
    assert_equal(again.tensors(), saved)
    assert again.train(6) == whole


def test_a_single_file_is_saved_and_goes_on(url: str) -> None:
    first = Toy(fabric(form="file"))
    for _ in range(2):
        first.train(2)
        first.fabric.save(f"{url}/c.ckpt", first.state)
    saved = first.tensors()
    again = Toy(fabric(form="file"), seed=2)
    again.fabric.load(f"{url}/c.ckpt", again.state)
    assert_equal(again.tensors(), saved)
    assert names(url) == ["c.ckpt"]


def test_a_trainer_run_that_was_killed_goes_on_by_itself(url: str, tmp_path: Path) -> None:
    def callback() -> ResumeCallback:
        return ResumeCallback(f"{url}/run", every_n_train_steps=2, keep=1)

    whole = fit(tmp_path / "whole", module=lambda: Quiet("none"))
    fit(tmp_path, module=lambda: Quiet("none"), resume=callback(), callbacks=[KillAt(5)])
    assert [info.step for info in list_checkpoints(f"{url}/run")] == [4]
    assert_same(fit(tmp_path, module=lambda: Quiet("none"), seed=2, resume=callback()), whole)
    assert os.listdir(tmp_path) == ["whole"]


def test_the_commands_take_urls(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        save(f"{url}/run/{step_name(step)}", step, step=step)
    assert main(["list", f"{url}/run"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{url}/run/{step_name(2)}",
        f"{url}/run/{step_name(1)}",
    ]
    assert main(["verify", f"{url}/run/{step_name(2)}"]) == 0
    assert main(["consolidate", f"{url}/run/{step_name(2)}", "--output", f"{url}/one.ckpt"]) == 0
    assert main(["consolidate", f"{url}/run/{step_name(2)}", "--output", str(tmp_path / "one.ckpt")]) == 0
    assert torch.load(tmp_path / "one.ckpt")["value"] == 2
    assert as_path(f"{url}/one.ckpt").read() == (tmp_path / "one.ckpt").read_bytes()  # type: ignore[union-attr]
    assert main(["consolidate", f"{url}/run/{step_name(2)}", "--output", f"{url}/one.ckpt"]) == 1
    assert main(["prune", f"{url}/run", "--keep-last", "1"]) == 0
    assert names(f"{url}/run") == [step_name(2)]


def test_what_a_killed_save_left_is_no_checkpoint_and_is_cleaned(url: str) -> None:
    run = as_path(f"{url}/run")
    assert isinstance(run, RemotePath)
    save(run / step_name(1), 1, step=1)
    save(run / step_name(2), 2, step=2)
    (run / step_name(2) / MANIFEST_NAME).remove_file()
    (run / step_name(2) / UNFINISHED_NAME).put(b"")
    (run / step_name(1) / "save-0123456789abcdef").make_parent()
    half = run / step_name(1) / "save-0123456789abcdef"
    (half / "__0_0.distcp").make_parent()
    (half / "__0_0.distcp").put(b"half")
    assert classify(run / step_name(2)) is Kind.INCOMPLETE
    assert [path.name for path in leftovers(run)] == ["save-0123456789abcdef", step_name(2)]
    assert str(newest(run)) == f"{run}/{step_name(1)}"
    assert prune(run, dry_run=True) == prune(run)
    assert names(f"{url}/run") == [step_name(1)]
    assert value_at(run / step_name(1)) == 1


def test_the_next_save_cleans_what_a_killed_one_left(url: str) -> None:
    run = as_path(f"{url}/run")
    assert isinstance(run, RemotePath)
    for name in (step_name(1), step_name(2)):
        (run / name / UNFINISHED_NAME).put(b"")
        (run / name / "__0_0.distcp").put(b"half")
    save(run / step_name(2), 2, step=2)
    assert names(f"{url}/run") == [step_name(2)]
    assert value_at(run / step_name(2)) == 2


def test_a_damaged_object_is_named(url: str) -> None:
    save(f"{url}/c", 1)
    path = as_path(f"{url}/c/__0_0.distcp")
    assert isinstance(path, RemotePath)
    content = bytearray(path.read())
    content[len(content) // 2] ^= 1
    path.put(bytes(content))
    for check in (verify, value_at):
        with pytest.raises(
            CheckpointCorruptError, match=r"c is damaged: file __0_0\.distcp, item 'model\.w': expected"
        ):
            check(f"{url}/c")
    path.put(bytes(content[:-1]))
    with pytest.raises(CheckpointCorruptError, match=r"expected \d+ bytes, found \d+ bytes"):
        value_at(f"{url}/c")
    path.remove_file()
    with pytest.raises(CheckpointCorruptError, match="expected the file, found nothing"):
        value_at(f"{url}/c")


def test_a_checkpoint_survives_being_copied_to_disk(url: str, tmp_path: Path) -> None:
    for value in (1, 2):
        save(f"{url}/c", value)
    path = as_path(f"{url}/c")
    assert isinstance(path, RemotePath)
    folder = read_manifest(path).folder
    assert folder is not None
    (tmp_path / "c" / folder).mkdir(parents=True)
    for name in (MANIFEST_NAME, *(f"{folder}/{name}" for name in read_manifest(path).files)):
        (tmp_path / "c" / name).write_bytes((path / name).read())
    assert value_at(tmp_path / "c") == 2
    save(tmp_path / "c", 3)
    assert sorted(os.listdir(tmp_path / "c")) == [".index", ".metadata", "__0_0.distcp", "manifest.json", "meta.pt"]
    assert value_at(tmp_path / "c") == 3


def test_a_file_where_a_folder_is_to_be_is_refused_and_kept(url: str) -> None:
    commit.put_file(as_path(f"{url}/c"), b"precious")
    with pytest.raises(Exception, match="is a file"):
        save(f"{url}/c", 1)
    assert as_path(f"{url}/c").read() == b"precious"  # type: ignore[union-attr]
    save(f"{url}/d", 1)
    with pytest.raises(FileExistsError, match="is a folder"):
        commit.commit_file(f"{url}/d", lambda file: file.write(b"x"))
    assert value_at(f"{url}/d") == 1


def test_nothing_is_copied_to_the_folder_for_temporary_files(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    save(f"{url}/c", 1)
    assert value_at(f"{url}/c") == 1


# --- without a server ---


@pytest.fixture
def memory() -> Any:
    yield "memory://test"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def test_a_run_in_memory(memory: str) -> None:
    with CheckpointManager(f"{memory}/run", keep=1) as manager:
        for step in (1, 2):
            model = torch.nn.Linear(2, 1)
            manager.save({"model": model}, step=step, user_content=step)
    state = {"model": torch.nn.Linear(2, 1)}
    assert CheckpointManager(f"{memory}/run").load(state) == 2
    assert torch.equal(state["model"].weight, model.weight)
    assert [info.path for info in list_checkpoints(f"{memory}/run")] == [f"{memory}/run/{step_name(2)}"]
    assert consolidate(f"{memory}/run/{step_name(2)}") == f"{memory}/run/{step_name(2)}.consolidated"


def test_a_path_object_made_of_a_url_is_that_url(memory: str) -> None:
    save(Path(f"{memory}/c"), 1)
    assert value_at(f"{memory}/c") == 1


def test_a_protocol_whose_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(MissingPackageError, match=r'pip install "lightning-resume\[s3\]"'):
        save("s3://bucket/run", 1)
    with pytest.raises(MissingPackageError, match="Install s3fs"):
        ResumeCallback("s3://bucket/run")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        verify("nonsense://bucket/run")


def test_a_run_folder_at_the_root_of_a_store(memory: str) -> None:
    for url in ("memory://top", "memory:///slash", memory + "/"):
        save(url, 1)
        assert value_at(url) == 1
        save(url, 2)
        assert value_at(url) == 2
        commit.delete_checkpoint(url)


def test_a_name_that_looks_like_a_pattern_is_only_a_name(memory: str) -> None:
    for name in ("run1", "runx"):
        save(f"{memory}/{name}/{step_name(1)}", 1, step=1)
    for value in (1, 2):
        save(f"{memory}/run[1x]/{step_name(1)}", value, step=1)
    save(f"{memory}/run*/{step_name(1)}", 3, step=1)
    for path in (f"{memory}/run[1x]/{step_name(1)}", f"{memory}/run*/{step_name(1)}"):
        commit.delete_checkpoint(path)
    assert [value_at(f"{memory}/{name}/{step_name(1)}") for name in ("run1", "runx")] == [1, 1]


@pytest.mark.parametrize("server", ["s3-moto"], indirect=True)
def test_storage_options_alone_reach_the_store(store: Store, tmp_path: Path) -> None:
    options = dict(store.storage_options)

    def callback() -> ResumeCallback:
        return ResumeCallback(f"{store.url}/run", every_n_train_steps=2, keep=1, storage_options=options)

    whole = fit(tmp_path / "whole", module=lambda: Quiet("none"))
    fit(tmp_path, module=lambda: Quiet("none"), resume=callback(), callbacks=[KillAt(5)])
    assert_same(fit(tmp_path, module=lambda: Quiet("none"), seed=2, resume=callback()), whole)
    again = callback()
    named = list_checkpoints(f"{store.url}/run", storage_options=options)[0].path
    assert fit(tmp_path, module=lambda: Quiet("none"), resume=again, ckpt_path=named).trainer.global_step == 8
    for made in (None, fabric()):
        manager = CheckpointManager(f"{store.url}/manager", fabric=made, storage_options=options)
        state = {"model": torch.nn.Linear(2, 1) if made is None else made.setup_module(torch.nn.Linear(2, 1))}
        saved = manager.save(state, step=1, user_content=5)
        assert saved is not None
        assert (manager.load(state), manager.load(state, path=saved.path)) == (5, 5)
    assert verify(saved.path, storage_options=options, progress=False).files == 5
    assert prune(f"{store.url}/manager", storage_options=options) == []


def test_a_tag_that_was_saved_again_is_no_newer_than_a_later_step(memory: str) -> None:
    manager = CheckpointManager(f"{memory}/run", keep=None)
    model = torch.nn.Linear(2, 1)
    for step, tag in ((10, None), (11, "best"), (12, "best"), (20, None)):
        torch.nn.init.constant_(model.bias, step)
        manager.save({"model": model}, step=step, tag=tag, user_content=step)
    assert manager.load({"model": model}) == 20
