"""The format, version 1: what is written is read back, by us and by stock torch and Lightning, and nothing else is."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pickle
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch.distributed.checkpoint.metadata import MetadataIndex

from lightning_resume.checkpoint import layout
from lightning_resume.checkpoint.layout import Kind, classify
from lightning_resume.checkpoint.manifest import ComponentEntry, _checksum, read_manifest, to_json
from lightning_resume.checkpoint.reader import CheckpointReader, TensorInfo
from lightning_resume.checkpoint.safe import safe_load
from lightning_resume.checkpoint.writer import write_checkpoint
from lightning_resume.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    CheckpointVersionError,
    ResumeError,
    UnsafeCheckpointError,
)
from tests.checkpoint_worker import (
    full_tensor,
    is_restored,
    launch,
    rng_state,
    three_ranks,
    two_ranks,
)


def a_state() -> dict[str, Any]:
    model = {"weight": full_tensor(), "scale": torch.tensor(2.5), "empty": torch.zeros(0, 3), "name": "tiny"}
    return {"model": model, "list": [torch.ones(2), {"lr": 0.1}], "resume": {"theirs": 1}}


def save(path: Path, **changes: Any) -> Path:
    leaves = {"resume.rng.rank_00000": b"\x00rng", "resume.loader": b""}
    write_checkpoint(path, **{"state": a_state(), "leaves": leaves, "meta": {"epoch": 3}, **changes})
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "run" / "step-00000007", step=7)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks, and then three, found; ``folder`` holds what they saved."""
    folder = tmp_path_factory.mktemp("ranks")
    return {"folder": folder, "two": launch(two_ranks, 2, folder), "three": launch(three_ranks, 3, folder)}


def stock_load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(state, checkpoint_id=str(path))
    return state


def stock_save(path: Path, state: dict[str, Any]) -> Path:
    with pytest.warns(UserWarning, match="assuming the intent is to save in a single process"):
        dcp.save(state, checkpoint_id=str(path))
    return path


def flip_bit(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << (byte % 8)
    file.write_bytes(data)


def read_all(path: Path) -> Any:
    reader = CheckpointReader(path)
    leaves = {name: reader.leaf(name) for name in reader.leaf_names()}
    return reader.manifest, reader.read(), reader.meta(), leaves


def edit_manifest(path: Path, **changes: Any) -> None:
    file = path / layout.MANIFEST_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class RunsCode:
    """Pickles to a call that makes the file ``target``."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


# --- round trips ---


def test_read_returns_the_state_that_was_saved(saved: Path) -> None:
    state = CheckpointReader(saved).read()
    assert state["model"]["name"] == "tiny"
    assert state["resume"] == {"theirs": 1}
    assert state["list"][1] == {"lr": 0.1}
    for name, tensor in a_state()["model"].items():
        assert name == "name" or torch.equal(state["model"][name], tensor)


def test_read_of_a_prefix_leaves_the_rest_out(saved: Path) -> None:
    assert list(CheckpointReader(saved).read(["list", "absent"])) == ["list"]


def test_load_into_fills_tensors_in_place(saved: Path) -> None:
    weight = torch.zeros(7, 6, requires_grad=True)
    state = {"model": {"weight": weight, "name": None}}
    CheckpointReader(saved).load_into(state)
    assert state["model"]["weight"] is weight
    assert torch.equal(weight, full_tensor())
    assert state["model"]["name"] == "tiny"


def test_keys_give_shape_and_dtype_of_tensors_only(saved: Path) -> None:
    keys = CheckpointReader(saved).keys
    assert keys["model.weight"] == TensorInfo(shape=(7, 6), dtype=torch.float32)
    assert keys["model.name"] is None
    assert not any(key.startswith("resume.rng") for key in keys)


def test_leaves_come_back_byte_for_byte(saved: Path) -> None:
    reader = CheckpointReader(saved)
    assert {name: reader.leaf(name) for name in reader.leaf_names()} == {
        "resume.rng.rank_00000": b"\x00rng",
        "resume.loader": b"",
    }
    with pytest.raises(KeyError):
        reader.leaf("resume.absent")


def test_meta_comes_back_and_none_becomes_an_empty_dict(tmp_path: Path, saved: Path) -> None:
    assert CheckpointReader(saved).meta() == {"epoch": 3}
    assert CheckpointReader(save(tmp_path / "other", meta=None)).meta() == {}


def test_the_manifest_describes_the_checkpoint(tmp_path: Path) -> None:
    entry = ComponentEntry(sharing="per_rank", ranks=(0, 1), bytes=3, hash=None, required=False)
    path = save(
        tmp_path / "c", step=9, epoch=1, components={"rng": entry}, topology={"world_size": 1}, metadata={"a": 1}
    )
    manifest = read_manifest(path)
    assert (manifest.step, manifest.epoch, manifest.topology, manifest.metadata) == (9, 1, {"world_size": 1}, {"a": 1})
    assert manifest.components == {"rng": entry}
    assert set(manifest.files) == {"__0_0.distcp", ".index", ".metadata", "meta.pt"}
    assert sum(item[1] for item in manifest.files[".index"].items) == (path / ".index").stat().st_size
    assert manifest.save_bytes_per_second > 0


def test_a_save_leaves_state_and_rng_as_they_are(tmp_path: Path) -> None:
    state, rng = a_state(), rng_state()
    save(tmp_path / "c", state=state)
    assert rng_state() == rng
    assert list(state) == list(a_state())
    assert torch.equal(state["model"]["weight"], full_tensor())


def test_a_view_is_stored_without_the_memory_around_it(tmp_path: Path) -> None:
    path = save(tmp_path / "c", state={"row": torch.zeros(1000, 1000)[0]}, leaves={})
    assert (path / "__0_0.distcp").stat().st_size < 10_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int64])
def test_every_dtype_comes_back_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype).T
    loaded = CheckpointReader(save(tmp_path / "c", state={"x": tensor})).read()["x"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


# --- with ranks ---


def test_two_ranks_save_and_load_exactly(ranks: dict[str, Any]) -> None:
    for claims in ranks["two"]:
        assert claims["we load"]
        assert claims["leaves"]
        assert claims["rng is unchanged"]
        assert claims["files"] == [".index", ".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"]


def test_one_and_three_ranks_load_what_two_saved(ranks: dict[str, Any]) -> None:
    assert is_restored(CheckpointReader(ranks["folder"] / "run" / "step-00000007").read())
    assert is_restored(CheckpointReader(ranks["folder"] / "stock").read())
    expected = {"three ranks load run/step-00000007": True, "three ranks load stock": True, "a wrong shape": True}
    assert ranks["three"] == [expected] * 3


def test_stock_torch_loads_what_two_ranks_saved(ranks: dict[str, Any]) -> None:
    assert all(claims["stock loads"] for claims in ranks["two"])
    state = {"model": {"weight": torch.zeros(7, 6)}, "rank": None}
    stock_load(ranks["folder"] / "run" / "step-00000007", state)
    assert torch.equal(state["model"]["weight"], full_tensor())
    assert state["rank"] == 0


def test_replicated_tensors_are_divided_among_ranks(ranks: dict[str, Any]) -> None:
    files = read_manifest(ranks["folder"] / "run" / "step-00000007").files
    sizes = [files[f"__{rank}_0.distcp"].bytes for rank in (0, 1)]
    assert min(sizes) > max(sizes) / 2, "the two divide what both have"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a differing leaf", "'resume.loader' was given on several ranks"),
        ("an object that fails on rank 1", "rank 1: CannotPickleError: cannot save two arguments"),
        ("meta that fails", "cannot save two arguments"),
        ("metadata that is not JSON", "not JSON serializable"),
        ("another shape on rank 1", "'w' is a torch.float32 tensor of shape (2,) on rank 0"),
    ],
)
def test_a_save_that_fails_on_one_rank_fails_on_all(ranks: dict[str, Any], name: str, text: str) -> None:
    for claims in ranks["two"]:
        assert text in claims["errors"][name]


def test_a_failed_save_leaves_the_older_checkpoint_and_nothing_else(ranks: dict[str, Any]) -> None:
    run = ranks["folder"] / "run"
    assert os.listdir(run) == ["step-00000007"]
    assert read_manifest(run / "step-00000007").step == 7


# --- stock torch and Lightning ---


def test_stock_torch_loads_ours(saved: Path) -> None:
    state = stock_load(saved, {"model": {"weight": torch.zeros(7, 6), "name": ""}, "list": [torch.zeros(2), {"lr": 0}]})
    assert torch.equal(state["model"]["weight"], full_tensor())
    assert (state["model"]["name"], state["list"][1]) == ("tiny", {"lr": 0.1})


def test_stock_fabric_consolidates_ours(saved: Path) -> None:
    content = _load_distributed_checkpoint(saved)
    assert torch.equal(content["model"]["weight"], full_tensor())
    assert content["epoch"] == 3


def test_we_load_what_stock_torch_saved(tmp_path: Path) -> None:
    reader = CheckpointReader(stock_save(tmp_path / "stock", a_state()))
    assert classify(tmp_path / "stock") is Kind.SHARDED
    assert reader.manifest is None
    assert torch.equal(reader.read()["model"]["weight"], full_tensor())
    assert reader.meta() == {}


def test_a_stock_checkpoint_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = stock_save(tmp_path / "stock", a_state())
    os.truncate(path / "__0_0.distcp", 2000)
    with pytest.raises(CheckpointCorruptError, match=r"__0_0\.distcp"):
        CheckpointReader(path).read()


# --- damage ---


@pytest.mark.parametrize("name", ["__0_0.distcp", ".index", ".metadata", "meta.pt", "manifest.json"])
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, name: str) -> None:
    saved = save(tmp_path / "c", state={"w": torch.ones(20), "n": 1}, leaves={"resume.loader": b"position"})
    whole = (saved / name).read_bytes()
    for byte in range(0, len(whole), 29):
        flip_bit(saved / name, byte)
        with pytest.raises(ResumeError, match="manifest" if name == "manifest.json" else name):
            CheckpointReader(saved).verify()
        (saved / name).write_bytes(whole)
    read_all(saved)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".index", "meta.pt"])
def test_a_missing_or_shortened_file_is_named(saved: Path, name: str) -> None:
    os.truncate(saved / name, 100)
    with pytest.raises(CheckpointCorruptError, match=rf"{name}: expected \d+ bytes, found 100 bytes"):
        read_all(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointCorruptError, match=rf"{name}: expected the file, found nothing"):
        read_all(saved)


def test_corruption_of_an_item_names_file_item_and_hashes(saved: Path) -> None:
    offset = (saved / "__0_0.distcp").read_bytes().index(full_tensor().numpy().tobytes())
    flip_bit(saved / "__0_0.distcp", offset)
    with pytest.raises(
        CheckpointCorruptError, match=r"__0_0\.distcp, item 'model.weight': expected xxh3-128 \w{32}, fo"
    ):
        CheckpointReader(saved).read(["model"])


def test_damage_elsewhere_does_not_keep_a_part_from_loading(saved: Path) -> None:
    offset = (saved / "__0_0.distcp").read_bytes().index(full_tensor().numpy().tobytes())
    flip_bit(saved / "__0_0.distcp", offset)
    assert CheckpointReader(saved).read(["list"])["list"][1] == {"lr": 0.1}


def test_verify_finds_a_flipped_bit_in_what_nothing_reads(saved: Path) -> None:
    CheckpointReader(saved).verify()
    index = MetadataIndex("model.empty", (0, 0))
    place = pickle.loads((saved / ".metadata").read_bytes()).storage_data[index]
    flip_bit(saved / place.relative_path, place.offset)
    with pytest.raises(CheckpointCorruptError, match=r"file __0_0\.distcp, item 'model.empty': expected xxh3-128"):
        CheckpointReader(saved).verify()


def test_a_lost_manifest_makes_our_checkpoint_incomplete(saved: Path) -> None:
    (saved / layout.MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointIncompleteError, match="lost its manifest"):
        CheckpointReader(saved)
    assert layout.list_checkpoints(saved.parent) == []


def test_a_newer_format_is_refused_with_both_versions(saved: Path) -> None:
    edit_manifest(saved, format_version=2)
    with pytest.raises(CheckpointVersionError, match=r"format version 2; .* up to version 1\. Upgrade"):
        CheckpointReader(saved)
    assert classify(saved) is Kind.RESUMABLE


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b"null"])
def test_a_manifest_of_garbage_is_corrupt(saved: Path, text: bytes) -> None:
    (saved / layout.MANIFEST_NAME).write_bytes(text)
    with pytest.raises(CheckpointCorruptError, match=r"manifest\.json"):
        CheckpointReader(saved)
    assert classify(saved) is Kind.INCOMPLETE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("sequence", True),
        ("created", None),
        ("topology", []),
        ("versions", {"torch": 2}),
        ("components", {"rng": {"sharing": "x", "ranks": [-1], "bytes": 0, "hash": None, "required": True}}),
        ("files", {"a": {"bytes": 4, "hash": "0" * 32, "items": [[2, 3, "0" * 32]]}}),
        ("files", {"../a": {"bytes": 4, "hash": "0" * 32, "items": []}}),
        ("files", {"/etc/passwd": {"bytes": 4, "hash": "0" * 32, "items": []}}),
        ("save_seconds", float("inf")),
        ("save_seconds", 10**400),
    ],
)
def test_a_wrong_field_of_the_manifest_is_named(saved: Path, field: str, value: object) -> None:
    # to_json gives the changed manifest a checksum that fits
    manifest = replace(read_manifest(saved), files={}, components={})
    body = json.loads(to_json(manifest)) | {field: value}
    body["checksum"] = _checksum({name: part for name, part in body.items() if name != "checksum"})
    (saved / layout.MANIFEST_NAME).write_text(json.dumps(body))
    with pytest.raises(CheckpointCorruptError, match=field):
        read_manifest(saved)


# --- safety ---


def replace_metadata(path: Path, change: Callable[[Any], Any]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(change(metadata)))


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = stock_save(tmp_path / "stock", a_state())
    replace_metadata(path, lambda _: RunsCode(tmp_path / "made"))
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir"):
        CheckpointReader(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["../stock2/__0_0.distcp", "/etc/passwd", ".."])
def test_metadata_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    def escape(metadata: Any) -> Any:
        for info in metadata.storage_data.values():
            info.relative_path = name
        return metadata

    path = stock_save(tmp_path / "stock", a_state())
    replace_metadata(path, escape)
    with pytest.raises(CheckpointCorruptError, match="file name"):
        CheckpointReader(path)


def test_an_object_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = stock_save(tmp_path / "stock", {"w": torch.ones(2), "evil": RunsCode(tmp_path / "made")})
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir.*trust=True"):
        CheckpointReader(path).read()
    assert not (tmp_path / "made").exists()
    CheckpointReader(path, trust=True).read()
    assert (tmp_path / "made").exists()


def test_meta_that_would_run_code_needs_the_callers_trust(tmp_path: Path) -> None:
    path = save(tmp_path / "c", meta={"evil": [RunsCode(tmp_path / "made")]})
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir"):
        CheckpointReader(path).meta()
    assert not (tmp_path / "made").exists()
    CheckpointReader(path).meta(weights_only=False)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        np.array(["a", "b"]),
        np.array([{"a": 1}, None], dtype=object),
        np.float32(3),
        np.dtype("f4"),
        np.random.get_state(),
        np.random.default_rng(0).bit_generator.state,
        random.Random(0).getstate(),
        collections.OrderedDict(a=1),
        collections.defaultdict(list, a=[1]),
        {"nested": (collections.deque([1, (2,)], maxlen=5), [collections.deque()])},
        AttributeDict(a=1, b=AttributeDict(c=collections.deque([1]))),
        PurePosixPath("/a/b"),
        Path("a"),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        datetime.timedelta(seconds=1),
        argparse.Namespace(a=1, b=collections.deque([1])),
        frozenset({1}),
        2**200,
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_objects_come_back_of_the_same_type(tmp_path: Path, value: Any) -> None:
    loaded = CheckpointReader(save(tmp_path / "c", meta=value, leaves={}, state={"w": torch.ones(1)})).meta()
    assert type(loaded) is type(value)
    np.testing.assert_equal(loaded, value)


def test_a_numpy_array_cannot_be_made_of_raw_pointers(tmp_path: Path) -> None:
    class Forged:
        def __reduce__(self) -> Any:
            return np.ndarray, ((1,), np.dtype("O"), b"\x01" * 8)

    torch.save(Forged(), tmp_path / "forged.pt")
    with pytest.raises(UnsafeCheckpointError):
        safe_load((tmp_path / "forged.pt").read_bytes())


# --- what does not fit ---


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"model": {"weight": torch.zeros(7, 5)}}, r"not the same global shape(.|\n)*\(7, 6\)(.|\n)*\(7, 5\)"),
        ({"model": {"bias": torch.zeros(7)}}, r"model\.bias(.|\n)*no such key; under 'model': model\.weight"),
        ({"model": {"weight": 3}}, "not the same kind of value"),
        ({"model": {"name": torch.zeros(1)}}, "not the same kind of value"),
        ({"model": {"weight": torch.zeros(7, 6, device="meta")}}, "materialize"),
    ],
)
def test_load_into_refuses_what_does_not_fit_before_it_reads(saved: Path, state: dict[str, Any], text: str) -> None:
    scale = torch.zeros(())
    state["model"] = {"scale": scale} | state["model"]
    with pytest.raises(CheckpointMismatchError, match=text):
        CheckpointReader(saved).load_into(state)
    assert scale == 0


@pytest.mark.parametrize(
    "changes",
    [{"leaves": {"loader": b""}}, {"state": {"resume.x": 1}}, {"state": {"resume": {"loader": 1}}}],
    ids=["a leaf of another name", "a key of ours", "a key that flattens to a leaf's"],
)
def test_names_that_clash_with_leaves_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointSaveError, match="resume"):
        save(tmp_path / "c", **changes)
    assert os.listdir(tmp_path) == []


# --- what lies at a path ---


def test_classify_tells_what_lies_at_a_path(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "__0_0.distcp").touch()
    (tmp_path / "file.ckpt").touch()
    (tmp_path / "empty").mkdir()
    kinds = {name: classify(tmp_path / name) for name in ("half", "file.ckpt", "empty", "run", "absent")}
    assert kinds == {
        "half": Kind.INCOMPLETE,
        "file.ckpt": Kind.SINGLE_FILE,
        "empty": Kind.NOT_A_CHECKPOINT,
        "run": Kind.RUN_FOLDER,
        "absent": Kind.MISSING,
    }
    assert classify(saved) is Kind.RESUMABLE


def test_the_newest_checkpoint_is_the_one_saved_last(tmp_path: Path) -> None:
    for step in (5, 9, 7):
        save(tmp_path / layout.step_name(step), step=step)
    assert [path.name for path in layout.list_checkpoints(tmp_path)] == [
        "step-00000007",
        "step-00000009",
        "step-00000005",
    ]
    assert layout.newest(tmp_path) == tmp_path / "step-00000007"
    assert [read_manifest(path).sequence for path in layout.list_checkpoints(tmp_path)] == [2, 1, 0]


def test_a_reader_of_a_run_folder_is_told_its_checkpoints(saved: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="newest first: step-00000007"):
        CheckpointReader(saved.parent)
    with pytest.raises(CheckpointNotFoundError, match="found nothing"):
        CheckpointReader(saved.parent / "absent")


def test_step_names_grow_beyond_eight_digits() -> None:
    assert [layout.step_name(step) for step in (0, 10**9)] == ["step-00000000", "step-1000000000"]
    with pytest.raises(ValueError, match="from 0"):
        layout.step_name(-1)


def test_a_single_process_saves_and_loads_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CheckpointReader(save(tmp_path / "c")).load_into({"model": {"scale": torch.zeros(())}})
