"""Hostile checkpoints: whoever writes every byte, hashes included, gets no code run, no path opened and no crash.

``python -m tests.test_hostile`` tries 10,000 inputs of each kind; a number after it changes how many.
"""

from __future__ import annotations

import codecs
import copy
import io
import json
import pickle
import resource
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

from lightning_resume.checkpoint import safe
from lightning_resume.checkpoint._dcp import StorageInfo, dump_metadata
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.safe import safe_load
from lightning_resume.errors import CheckpointCorruptError, ResumeError, UnsafeCheckpointError
from tests.attacks import (
    ARCHIVES,
    CODE,
    HARM,
    archive,
    as_leaf,
    load_components,
    read_all,
    replace_file,
    replace_item,
    save,
    write_manifest,
)

EXAMPLES = 300
ALL_EXAMPLES = 10_000
SECONDS = 2.0
KIB_OF_MEMORY = 300 * 1024

# --- what a load may do ---

RUNS_CODE = ("exec", "compile", "import", "subprocess.", "os.", "ctypes.", "socket.", "shutil.", "code.", "marshal.")
HARMLESS = {"os.listdir", "os.scandir", "os.fwalk"}
_watched: list[Path] = []
_seen: list[str] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event == "open" and not str(args[0]).startswith(str(_watched[0])):
        _seen.append(f"open {args[0]}")
    elif event.startswith(RUNS_CODE) and event not in HARMLESS:
        _seen.append(f"{event} {str(args)[:100]}")


@cache
def _install_watch() -> None:
    sys.addaudithook(_watch)  # for good: Python has no way to take it back


@contextmanager
def watched(path: Path) -> Iterator[list[str]]:
    """Notes what the block does that no load has to do: other files, modules, processes, code."""
    _install_watch()
    _seen.clear()
    _watched.append(path)
    try:
        yield _seen
    finally:
        _watched.clear()


# --- fuzzing ---


class Target:
    """A checkpoint that is changed, loaded and put back again and again."""

    def __init__(self, folder: Path) -> None:
        self.path = save(folder / "c")
        self.manifest = json.loads((self.path / "manifest.json").read_text())
        self.metadata = (self.path / ".metadata").read_bytes()
        state, self.leaves, self.meta, reader = read_all(self.path)
        self.values = {key: value_at(state, path) for key, path in reader.mappings.items()}
        self.results: Counter[str] = Counter()

    def load(self) -> tuple[Any, ...] | None:
        """Loads all of it; None where that raises an error of ours. Whatever else it does fails the test."""
        with watched(self.path) as seen:
            try:
                found = read_all(self.path)
            except ResumeError as error:
                self.results[type(error).__name__] += 1
                found = None
            else:
                self.results["loaded"] += 1
        assert seen == []
        return found

    def check_same(self) -> None:
        """Loads what must be either refused or loaded exactly as it was saved."""
        found = self.load()
        if found is not None:
            state, leaves, meta, reader = found
            assert leaves == self.leaves
            assert meta == self.meta
            values = {key: value_at(state, path) for key, path in reader.mappings.items()}
            assert values.keys() == self.values.keys()
            assert all(same(value, self.values[key]) for key, value in values.items())

    def check_stored(self) -> None:
        """Loads what must be either refused or made up of values that were saved, each of them whole."""
        found = self.load()
        if found is not None:
            state, leaves, meta, reader = found
            assert meta == self.meta
            assert all(data in self.leaves.values() or data in self.bytes for data in leaves.values())
            for key, path in reader.mappings.items():
                value, info = value_at(state, path), reader.keys[key]
                assert info is None or (info.shape, info.dtype) == (tuple(value.shape), value.dtype)
                assert any(same(value, saved) for saved in (*self.values.values(), *self.leaf_tensors)) or (
                    isinstance(value, torch.Tensor) and value.numel() == 0
                )

    @property
    def leaf_tensors(self) -> list[torch.Tensor]:
        return [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in self.leaves.values() if data]

    @property
    def bytes(self) -> list[bytes]:
        return [value.numpy().tobytes() for value in self.values.values() if getattr(value, "dtype", 0) == torch.uint8]


def value_at(state: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        state = state[part]
    return state


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


HOSTILE_NUMBERS = st.sampled_from([-1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 10**15]) | st.integers()
HOSTILE_TEXTS = st.sampled_from(
    ["", ".", "..", "../c/__0_0.distcp", "/etc/passwd", "a/../../b", "C:\\x", "\0", "\ud800", "\N{SNOWMAN}", "a" * 9999]
) | st.sampled_from(["__0_0.distcp", ".metadata", "meta.pt", "manifest.json", "0" * 32, "f" * 31, "nan"])
HOSTILE_JSON = st.recursive(
    st.none() | st.booleans() | HOSTILE_NUMBERS | HOSTILE_TEXTS | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HOSTILE_TEXTS, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def manifests(draw: st.DrawFn, whole: Any) -> Any:
    """The manifest with one to three values replaced, taken away, doubled or added at any depth."""
    body = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        mutate(draw, body)
    return body


def mutate(draw: st.DrawFn, body: Any) -> None:
    keys = list(body) if isinstance(body, dict) else list(range(len(body)))
    if not keys:
        return
    key = draw(st.sampled_from(keys))
    if isinstance(body[key], dict | list) and body[key] and draw(st.integers(0, 3)):
        mutate(draw, body[key])
        return
    action = draw(st.sampled_from(["replace", "replace", "swap", "take away", "add"]))
    if action == "replace":
        body[key] = draw(HOSTILE_JSON)
    elif action == "swap":
        other = draw(st.sampled_from(keys))
        body[key], body[other] = body[other], body[key]
    elif action == "take away":
        del body[key]
    elif isinstance(body, dict):
        body[draw(HOSTILE_TEXTS)] = draw(st.just(body[key]) | HOSTILE_JSON)
    else:
        body.insert(key, draw(st.just(body[key]) | HOSTILE_JSON))


def damaged(data: st.DataObject, whole: bytes) -> bytes:
    """Some bytes of ``whole`` replaced, inserted, taken away or moved."""
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole)))
        length = data.draw(st.sampled_from([0, 1, 1, 1, 2, 8, 64]))
        other = data.draw(st.integers(0, len(whole)))
        new = data.draw(st.binary(max_size=8) | st.just(whole[other : other + length]))
        whole = whole[:at] + new + whole[at + length :]
    return whole


def fuzz_manifest(target: Target, data: st.DataObject) -> None:
    try:
        write_manifest(target.path, data.draw(manifests(target.manifest)))
    except UnicodeEncodeError:
        hypothesis.reject()  # half a surrogate pair as a field's name: no JSON file can hold it
    target.check_same()


def fuzz_manifest_text(target: Target, data: st.DataObject) -> None:
    write_manifest(target.path, target.manifest)
    text = damaged(data, (target.path / "manifest.json").read_bytes())
    try:
        write_manifest(target.path, json.loads(text))
    except (ValueError, RecursionError):
        (target.path / "manifest.json").write_bytes(text)
    target.check_same()


def fuzz_metadata(target: Target, data: st.DataObject) -> None:
    metadata = pickle.loads(target.metadata)
    try:
        for _ in range(data.draw(st.integers(1, 3))):
            data.draw(st.sampled_from(CHANGES))(metadata, data.draw)
        changed = dump_metadata(metadata)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RuntimeError):
        hypothesis.reject()  # an earlier change left nothing to change, or torch's own classes cannot hold it
    write_manifest(target.path, target.manifest)
    replace_file(target.path, ".metadata", changed)
    target.check_stored()


def fuzz_metadata_bytes(target: Target, data: st.DataObject) -> None:
    write_manifest(target.path, target.manifest)
    replace_file(target.path, ".metadata", damaged(data, target.metadata))
    target.check_stored()


Draw = Callable[[st.SearchStrategy[Any]], Any]
NUMBERS = st.sampled_from([0, 1, 2, 7, 10**6, 10**15, 2**62, 2**63 - 1]) | st.integers(-5, 300)
ANYTHING = st.sampled_from([None, -1, 2**70, "x", b"x", (), [], {}, 1.5, ("a", 10**9), torch.Size([2**62, 2**62])])
CHANGES: list[Callable[[Any, Draw], None]] = []


def change(function: Callable[[Any, Draw], None]) -> Callable[[Any, Draw], None]:
    CHANGES.append(function)
    return function


def pick_tensor(metadata: Any, draw: Draw) -> Any:
    tensors = [stored for stored in metadata.state_dict_metadata.values() if hasattr(stored, "chunks")]
    hypothesis.assume(tensors)
    return draw(st.sampled_from(tensors))


def size(draw: Draw) -> Any:
    return torch.Size(draw(st.lists(NUMBERS, max_size=4)))


@change
def another_shape(metadata: Any, draw: Draw) -> None:
    pick_tensor(metadata, draw).size = draw(st.just(size(draw)) | ANYTHING)


@change
def another_shape_of_tensor_and_shard(metadata: Any, draw: Draw) -> None:
    stored = pick_tensor(metadata, draw)
    stored.size = size(draw)
    stored.chunks = [ChunkStorageMetadata(torch.Size([0] * len(stored.size)), stored.size)]


@change
def another_shard(metadata: Any, draw: Draw) -> None:
    stored = pick_tensor(metadata, draw)
    stored.chunks = stored.chunks * draw(st.integers(0, 3)) if draw(st.booleans()) else draw(ANYTHING)


@change
def another_shards_place(metadata: Any, draw: Draw) -> None:
    stored = pick_tensor(metadata, draw)
    stored.chunks = [ChunkStorageMetadata(size(draw), draw(st.just(stored.size) | st.just(size(draw)) | ANYTHING))]


@change
def another_dtype(metadata: Any, draw: Draw) -> None:
    dtypes = st.sampled_from([torch.float64, torch.uint8, torch.bfloat16, torch.complex128, torch.quint8, torch.bits8])
    pick_tensor(metadata, draw).properties.dtype = draw(dtypes | ANYTHING)


@change
def another_kind(metadata: Any, draw: Draw) -> None:
    key = draw(st.sampled_from(sorted(metadata.state_dict_metadata)))
    metadata.state_dict_metadata[key] = draw(st.just(BytesStorageMetadata()) | ANYTHING)


@change
def another_key(metadata: Any, draw: Draw) -> None:
    key = draw(st.sampled_from(sorted(metadata.state_dict_metadata)))
    metadata.state_dict_metadata[draw(HOSTILE_TEXTS)] = metadata.state_dict_metadata.pop(key)


@change
def another_path(metadata: Any, draw: Draw) -> None:
    hypothesis.assume(metadata.planner_data)
    key = draw(st.sampled_from(sorted(metadata.planner_data)))
    parts = st.sampled_from(["model", "weight", "list", 0, 1, -1, 10**6, 10**9, 2**70, None, b"x", (), "\0"])
    metadata.planner_data[key] = draw(st.lists(parts, max_size=5).map(tuple) | ANYTHING)


@change
def another_place(metadata: Any, draw: Draw) -> None:
    index = draw(st.sampled_from(list(metadata.storage_data)))
    info, other = metadata.storage_data[index], draw(st.sampled_from(list(metadata.storage_data.values())))
    field = draw(st.sampled_from(["relative_path", "offset", "length", "transform_descriptors", "all"]))
    if field == "all":
        metadata.storage_data[index] = StorageInfo(other.relative_path, other.offset, other.length)
    else:
        setattr(info, field, draw(st.just(getattr(other, field, None)) | HOSTILE_TEXTS | NUMBERS | ANYTHING))


@change
def exchanged_places(metadata: Any, draw: Draw) -> None:
    one, other = (draw(st.sampled_from(list(metadata.storage_data))) for _ in range(2))
    places = metadata.storage_data
    places[one], places[other] = places[other], places[one]


@change
def another_index(metadata: Any, draw: Draw) -> None:
    index = draw(st.sampled_from(list(metadata.storage_data)))
    changed = MetadataIndex(draw(st.just(index.fqn) | HOSTILE_TEXTS), size(draw))
    metadata.storage_data[changed] = metadata.storage_data.pop(index)


@change
def another_field(metadata: Any, draw: Draw) -> None:
    fields = ["state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"]
    setattr(metadata, draw(st.sampled_from(fields)), draw(ANYTHING))


FUZZ = {
    "manifest": fuzz_manifest,
    "manifest text": fuzz_manifest_text,
    "metadata": fuzz_metadata,
    "metadata bytes": fuzz_metadata_bytes,
}


def run_fuzz(kind: str, folder: Path, examples: int) -> Target:
    target = Target(folder)

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def fuzz(data: st.DataObject) -> None:
        FUZZ[kind](target, data)
        write_manifest(target.path, target.manifest)
        (target.path / ".metadata").write_bytes(target.metadata)

    fuzz()
    return target


@pytest.mark.parametrize("kind", FUZZ)
def test_fuzzed_input_is_refused_with_our_error_or_loaded_right(kind: str, tmp_path: Path) -> None:
    results = run_fuzz(kind, tmp_path, EXAMPLES).results
    assert results["CheckpointCorruptError"] > 0
    assert results["loaded"] > 0, "if nothing loads, nothing is shown of what does"


# --- attacks ---


def in_metadata(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_file(path, ".metadata", attack)
    return lambda: CheckpointReader(path)


def in_an_object(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_item(path, "step", archive(attack))
    return lambda: CheckpointReader(path).read()


def in_a_tensor(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_item(path, "model.weight", archive(attack))
    return lambda: CheckpointReader(path).read()


def in_a_leaf(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_item(path, "resume.loader", as_leaf(archive(attack)))
    return lambda: load_components(path)


def in_meta(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_file(path, "meta.pt", archive(attack))
    return lambda: CheckpointReader(path).meta()


PLACES = {
    "metadata": in_metadata,
    "object": in_an_object,
    "tensor": in_a_tensor,
    "leaf": in_a_leaf,
    "meta": in_meta,
}


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a first load and a first error import is not what an attack imports."""
    folder = tmp_path_factory.mktemp("imported")
    load_components(save(folder / "c"))
    codecs.lookup("latin1")  # by which torch.save writes bytes
    for name, place in PLACES.items():
        with pytest.raises(ResumeError):
            place(save(folder / name), CODE["REDUCE"](str(folder / "made")))()


def refuse(path: Path, load: Callable[[], Any]) -> None:
    """Checks that ``load`` raises one of two errors, soon, without much memory, and does nothing else."""
    memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with watched(path) as seen, pytest.raises((UnsafeCheckpointError, CheckpointCorruptError)):
        load()
    assert time.monotonic() - begin < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < KIB_OF_MEMORY
    assert seen == []


@pytest.mark.parametrize("attack", CODE)
def test_a_pickle_that_runs_code_is_refused_wherever_it_lies(attack: str, tmp_path: Path) -> None:
    pickle.loads(CODE[attack](str(tmp_path / "proof")))
    assert (tmp_path / "proof").is_dir(), "a pickle that does nothing proves nothing"
    for name, place in PLACES.items():
        path = save(tmp_path / name)
        refuse(path, place(path, CODE[attack](str(tmp_path / "made"))))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("attack", HARM)
def test_a_pickle_that_harms_its_loader_is_refused_wherever_it_lies(attack: str, tmp_path: Path) -> None:
    for name, place in PLACES.items():
        path = save(tmp_path / name)
        refuse(path, place(path, HARM[attack]))


@pytest.mark.parametrize("attack", ARCHIVES)
def test_an_archive_that_torch_save_does_not_write_is_refused(attack: str, tmp_path: Path) -> None:
    data = ARCHIVES[attack]()
    for key in ("step", "model.weight", "resume.loader"):
        path = save(tmp_path / key)
        replace_item(path, key, as_leaf(data) if key == "resume.loader" else data)
        refuse(path, lambda path=path: (load_components(path), CheckpointReader(path).read()))
    path = save(tmp_path / "meta")
    replace_file(path, "meta.pt", data)
    refuse(path, lambda: CheckpointReader(path).meta())


def test_a_tensor_of_one_byte_and_endless_elements_is_refused(tmp_path: Path) -> None:
    for key in ("model.weight", "resume.loader"):
        path = save(tmp_path / key)
        replace_item(path, key, as_leaf(torch.zeros(1, dtype=torch.uint8).expand(2**40)))
        refuse(path, lambda path=path: (CheckpointReader(path).leaf("resume.loader"), CheckpointReader(path).read()))


def test_a_list_that_holds_itself_is_loaded_as_it_is() -> None:
    loaded = safe_load(archive(b"\x80\x02]q\x00h\x00a."))
    assert loaded[0] is loaded


def classes() -> dict[str, str]:
    module = sys.modules[MetadataIndex.__module__]
    return {name: repr(vars(kind)) for name, kind in vars(module).items() if isinstance(kind, type)}


def test_a_pickle_cannot_change_the_classes_that_it_names(tmp_path: Path) -> None:
    before, cached = classes(), dict(torch.serialization._get_layout.cache)
    for name, attack in HARM.items():
        if name.startswith("a state for"):
            with pytest.raises(ResumeError):
                in_metadata(save(tmp_path / name), attack)()
    assert classes() == before
    assert torch.serialization._get_layout.cache == cached


def main(examples: int) -> None:
    for kind in FUZZ:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            target = run_fuzz(kind, Path(folder), examples)
            print(f"{kind}: {dict(target.results)} in {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ALL_EXAMPLES)


def test_the_size_of_compressed_records_is_known_without_the_help_of_a_newer_torch() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**6))
    assert len(buffer.getvalue()) < 10**4
    assert safe._record_bytes(object(), [], buffer.getvalue()) == 10**6
