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
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

from lightning_resume.checkpoint import safe
from lightning_resume.checkpoint._dcp import StorageInfo, dump_metadata
from lightning_resume.checkpoint.archive import memory_of
from lightning_resume.checkpoint.index_build import Entry, build_index
from lightning_resume.checkpoint.index_form import Placed
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.safe import safe_load
from lightning_resume.checkpoint.shards import ShardFile
from lightning_resume.checkpoint.stored import hash_of_items
from lightning_resume.errors import CheckpointCorruptError, ResumeError, UnsafeCheckpointError
from tests.attacks import (
    ARCHIVES,
    CODE,
    HARM,
    Columns,
    archive,
    index_of,
    load_components,
    read_all,
    replace_file,
    replace_index,
    replace_item,
    replace_stock_item,
    reseal_items,
    save,
    save_stock,
    write_index,
    write_manifest,
)

EXAMPLES = 300
ALL_EXAMPLES = 10_000
SECONDS = 2.0  # of this process, whatever else the machine does
KIB_OF_MEMORY = 300 * 1024

# --- what a load may do ---

RUNS_CODE = ("exec", "compile", "import", "subprocess.", "os.", "ctypes.", "socket.", "shutil.", "code.", "marshal.")
# ctypes.cdata: where the elements of a tensor of ours lie is looked at as bytes (archive.memory_of)
HARMLESS = {"os.listdir", "os.scandir", "os.fwalk", "ctypes.cdata"}
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

    def __init__(self, folder: Path, make: Callable[[Path], Path]) -> None:
        self.path = make(folder / "c")
        self.files = {file.name: file.read_bytes() for file in self.path.iterdir()}
        self.manifest = json.loads(self.files.get("manifest.json", b"null"))
        self.metadata = self.files[".metadata"]
        self.index = index_of(self.path) if self.manifest else b""
        self.columns = Columns.read(self.path) if self.manifest else None
        state, self.leaves, self.meta, reader = read_all(self.path)
        self.values = {key: value_at(state, path) for key, path in reader.mappings.items()}
        self.bytes = {bytes_of(value) for value in self.values.values() if isinstance(value, torch.Tensor)}
        self.objects = self._archives() if self.manifest else []
        self.results: Counter[str] = Counter()

    def put_back(self) -> None:
        for name, data in self.files.items():
            (self.path / name).write_bytes(data)

    def load(self) -> tuple[Any, ...] | None:
        """Loads all of it; None where that raises an error of ours. Whatever else it does fails the test."""
        memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with watched(self.path) as seen:
            try:
                found = read_all(self.path)
            except ResumeError as error:
                self.results[type(error).__name__] += 1
                found = None
            else:
                self.results["loaded"] += 1
        assert seen == []
        assert time.process_time() - begin < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < KIB_OF_MEMORY
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
        """Loads what must be either refused or made up of values that were saved, each of them whole.

        Which tensor it is, and of which shape and dtype, is what the index or ``.metadata`` says.
        """
        found = self.load()
        if found is not None:
            state, leaves, meta, reader = found
            assert meta == self.meta
            whole = {*self.bytes, *self.leaves.values(), *self.objects, b""}
            assert whole.issuperset(leaves.values())
            for key, path in reader.mappings.items():
                value, info = value_at(state, path), reader.keys[key]
                if info is None:
                    assert any(same(value, saved) for saved in (*self.values.values(), {"position": 3}))
                else:
                    assert (info.shape, info.dtype) == (tuple(value.shape), value.dtype)
                    assert bytes_of(value) in whole

    def check_harmless(self) -> None:
        """Loads what was made to fit: refused, or of the shapes that it says."""
        found = self.load()
        if found is not None:
            state, _, _, reader = found
            for key, path in reader.mappings.items():
                value, info = value_at(state, path), reader.keys[key]
                assert info is None or (info.shape, info.dtype) == (tuple(value.shape), value.dtype)

    def _archives(self) -> list[bytes]:
        """Of objects, which a leaf may be pointed to."""
        index = CheckpointReader(self.path)._content._index
        placed = [index.items(key)[0] for key, info in index.keys.items() if info.dtype is None]
        whole = self.files[index.files[0]]
        return [whole[one.item.offset : one.item.offset + one.item.length] for one in placed]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(memory_of(tensor.contiguous()))


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
def manifests(draw: st.DrawFn, whole: Any, values: st.SearchStrategy[Any] = HOSTILE_JSON) -> Any:
    """The manifest with one to three values replaced, taken away, doubled or added at any depth."""
    body = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        mutate(draw, body, values)
    return body


def mutate(draw: st.DrawFn, body: Any, values: st.SearchStrategy[Any]) -> None:
    keys = list(body) if isinstance(body, dict) else list(range(len(body)))
    if not keys:
        return
    key = draw(st.sampled_from(keys))
    if isinstance(body[key], dict | list) and body[key] and draw(st.integers(0, 3)):
        mutate(draw, body[key], values)
        return
    action = draw(st.sampled_from(["replace", "replace", "swap", "take away", "add"]))
    if action == "replace":
        body[key] = draw(values)
    elif action == "swap":
        other = draw(st.sampled_from(keys))
        body[key], body[other] = body[other], body[key]
    elif action == "take away":
        del body[key]
    elif isinstance(body, dict):
        body[draw(HOSTILE_TEXTS)] = draw(st.just(body[key]) | values)
    else:
        body.insert(key, draw(st.just(body[key]) | values))


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
    replace_file(target.path, ".metadata", changed)
    target.check_stored()


def fuzz_metadata_bytes(target: Target, data: st.DataObject) -> None:
    replace_file(target.path, ".metadata", damaged(data, target.metadata))
    target.check_stored()


def fuzz_index_head(target: Target, data: st.DataObject) -> None:
    columns = copy.deepcopy(target.columns)
    columns.head = data.draw(manifests(columns.head, SMALL_NUMBERS | HOSTILE_JSON))
    columns.write(target.path)
    target.check_stored()


def fuzz_index_columns(target: Target, data: st.DataObject) -> None:
    changed_columns(target, data).write(target.path)
    target.check_stored()


def fuzz_index_items(target: Target, data: st.DataObject) -> None:
    columns = changed_columns(target, data)
    if data.draw(st.booleans()):
        columns.head = data.draw(manifests(columns.head, SMALL_NUMBERS))
    columns.write(target.path)
    try:
        reseal_items(target.path)
    except (LookupError, TypeError, ValueError, AttributeError):
        hypothesis.reject()  # no index that items could be found by
    target.check_harmless()


def fuzz_index_bytes(target: Target, data: st.DataObject) -> None:
    replace_index(target.path, damaged(data, target.index))
    target.check_stored()


SMALL_NUMBERS = st.integers(0, 8)
WORDS = st.sampled_from([0, 1, 2, 2**16, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63), -1]) | st.integers(-9, 9000)


def changed_columns(target: Target, data: st.DataObject) -> Columns:
    """One to three numbers, rows or hashes of the index replaced."""
    columns = copy.deepcopy(target.columns)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["field", "field", "row", "rows", "dimension", "digests"]))
        row, other = (data.draw(st.integers(0, len(columns.rows) - 1)) for _ in range(2))
        if kind == "field":
            name = data.draw(st.sampled_from(columns.rows.dtype.names))
            bits = 8 * columns.rows.dtype[name].itemsize
            by_other = st.sampled_from([int(columns.rows[other][name]), int(columns.rows[row][name]) + 1])
            columns.rows[row][name] = data.draw(WORDS | by_other) % 2**bits
        elif kind == "row":
            columns.rows[row] = columns.rows[other]
        elif kind == "rows":
            columns.rows = np.delete(columns.rows, row) if data.draw(st.booleans()) else columns.rows.repeat(2)
        elif kind == "dimension":
            place = data.draw(st.integers(0, len(columns.dimensions) - 1))
            columns.dimensions[place] = data.draw(WORDS)
        else:
            columns.digests = damaged(data, columns.digests)
        hypothesis.assume(len(columns.rows) > 0)
    return columns


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
    "manifest": (save, fuzz_manifest),
    "manifest text": (save, fuzz_manifest_text),
    "index head": (save, fuzz_index_head),
    "index columns": (save, fuzz_index_columns),
    "index columns with hashes that fit": (save, fuzz_index_items),
    "index bytes": (save, fuzz_index_bytes),
    "metadata": (save_stock, fuzz_metadata),
    "metadata bytes": (save_stock, fuzz_metadata_bytes),
}


def run_fuzz(kind: str, folder: Path, examples: int) -> Target:
    make, change_it = FUZZ[kind]
    target = Target(folder, make)

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def fuzz(data: st.DataObject) -> None:
        target.put_back()
        change_it(target, data)

    fuzz()
    return target


@pytest.mark.parametrize("kind", FUZZ)
def test_fuzzed_input_is_refused_with_our_error_or_loaded_right(kind: str, tmp_path: Path) -> None:
    results = run_fuzz(kind, tmp_path, EXAMPLES).results
    assert results["CheckpointCorruptError"] > 0
    assert results["loaded"] > 0, "if nothing loads, nothing is shown of what does"


# --- attacks ---


def in_metadata(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_file(save_stock(path), ".metadata", attack)
    return lambda: CheckpointReader(path)


def in_a_tensor(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_stock_item(save_stock(path), "model.weight", archive(attack))
    return lambda: CheckpointReader(path).read()


def in_a_stock_object(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_stock_item(save_stock(path), "step", archive(attack))
    return lambda: CheckpointReader(path).read()


def in_an_object(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_item(save(path), "step", archive(attack))
    return lambda: CheckpointReader(path).read()


def in_a_leaf(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_item(save(path), "resume.loader", archive(attack))
    return lambda: load_components(path)


def in_meta(path: Path, attack: bytes) -> Callable[[], Any]:
    replace_file(save(path), "meta.pt", archive(attack))
    return lambda: CheckpointReader(path).meta()


PLACES = {
    "metadata": in_metadata,
    "tensor": in_a_tensor,
    "stock object": in_a_stock_object,
    "object": in_an_object,
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
            place(folder / name, CODE["REDUCE"](str(folder / "made")))()


def refuse(path: Path, load: Callable[[], Any]) -> None:
    """Checks that ``load`` raises one of two errors, soon, without much memory, and does nothing else."""
    memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with watched(path) as seen, pytest.raises((UnsafeCheckpointError, CheckpointCorruptError)):
        load()
    assert time.process_time() - begin < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < KIB_OF_MEMORY
    assert seen == []


@pytest.mark.parametrize("attack", CODE)
def test_a_pickle_that_runs_code_is_refused_wherever_it_lies(attack: str, tmp_path: Path) -> None:
    pickle.loads(CODE[attack](str(tmp_path / "proof")))
    assert (tmp_path / "proof").is_dir(), "a pickle that does nothing proves nothing"
    for name, place in PLACES.items():
        path = tmp_path / name
        refuse(path, place(path, CODE[attack](str(tmp_path / "made"))))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("attack", HARM)
def test_a_pickle_that_harms_its_loader_is_refused_wherever_it_lies(attack: str, tmp_path: Path) -> None:
    for name, place in PLACES.items():
        path = tmp_path / name
        refuse(path, place(path, HARM[attack]))


@pytest.mark.parametrize("attack", ARCHIVES)
def test_an_archive_that_torch_save_does_not_write_is_refused(attack: str, tmp_path: Path) -> None:
    data = ARCHIVES[attack]()
    for key in ("step", "model.weight"):
        path = save_stock(tmp_path / f"stock {key}")
        replace_stock_item(path, key, data)
        refuse(path, lambda path=path: CheckpointReader(path).read())
    for key in ("step", "resume.loader"):
        path = save(tmp_path / key)
        replace_item(path, key, data)
        refuse(path, lambda path=path: (load_components(path), CheckpointReader(path).read()))
    path = save(tmp_path / "meta")
    replace_file(path, "meta.pt", data)
    refuse(path, lambda: CheckpointReader(path).meta())


def test_a_tensor_of_one_byte_and_endless_elements_is_refused(tmp_path: Path) -> None:
    path, file = save_stock(tmp_path / "c"), io.BytesIO()
    torch.save(torch.zeros(1, dtype=torch.uint8).expand(2**40), file)
    replace_stock_item(path, "model.weight", file.getvalue())
    refuse(path, lambda: CheckpointReader(path).read())


# --- an index that says too much; its hashes fit ---


def changed(change_it: Callable[[Columns], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        columns = Columns.read(path)
        change_it(columns)
        columns.write(path)

    return write


def text_of_head(text: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        whole = index_of(path)
        length = int.from_bytes(whole[8:16], "little")
        write_index(path, text(whole[16 : 16 + length]), whole[16 + length :])

    return write


def of_weight(*fields: Any) -> Callable[[Path], None]:
    """The head's entry of ``model.weight`` from its dtype on: dtype, shape, count, along, largest."""
    return changed(lambda columns: columns.head["keys"][0].__setitem__(slice(2, None), fields))


INDEXES: dict[str, Callable[[Path], None]] = {
    "a shape of 2**60": of_weight("float32", [2**30, 2**30], 1, 0, 7),
    "a shape of 2**60 without shards": of_weight("float32", [2**60], 0, 0, 0),
    "a shape without elements beyond what torch makes": of_weight("float32", [0, 2**61, 4], 1, 0, 7),
    "a million dimensions": of_weight("float32", [2**61] * 10**6, 1, 0, 7),
    "a negative size": of_weight("float32", [-7, -6], 1, 0, 7),
    "a size that is true": of_weight("float32", [True, 42], 1, 0, 7),
    "a size that is no whole number": of_weight("float32", [7.0, 6.0], 1, 0, 7),
    "a dtype that torch has not": of_weight("load", [7, 6], 1, 0, 7),
    "a quantized dtype": of_weight("quint8", [7, 6], 1, 0, 7),
    "an object with a shape": of_weight(None, [7, 6], 1, 0, 7),
    "2**61 shards": of_weight("float32", [7, 6], 2**61, 0, 7),
    "sorted along the dimension 2 of 2": of_weight("float32", [7, 6], 1, 2, 7),
    "a leaf of 2**61 ranks": changed(lambda columns: columns.head["leaves"].append(["resume.rng", 2**61])),
    "a leaf of no rank": changed(lambda columns: columns.head["leaves"].append(["resume.rng", 0])),
    "a leaf of a user's name": changed(lambda columns: columns.head["leaves"][0].__setitem__(0, "model.bias")),
    "two leaves of one name": changed(lambda columns: columns.head["leaves"][1].__setitem__(0, "resume.loader")),
    "a key and a leaf of one name": changed(lambda columns: columns.head["keys"][0].__setitem__(0, "resume.loader")),
    "two keys of one name": changed(lambda columns: columns.head["keys"][0].__setitem__(0, "step")),
    "two keys of one path": changed(lambda columns: columns.head["keys"][0].__setitem__(1, ["step"])),
    "a list of 2**40 values": changed(lambda columns: columns.head["keys"][4].__setitem__(1, ["list", 2**40])),
    "a path of 1,000 parts": changed(lambda columns: columns.head["keys"][0].__setitem__(1, ["a"] * 1000)),
    "a file outside": changed(lambda columns: columns.head["files"].__setitem__(0, "../c/__0_0.distcp")),
    "a file that the manifest does not name": changed(lambda columns: columns.head["files"].append("__1_0.distcp")),
    "one file twice": changed(lambda columns: columns.head["files"].append("__0_0.distcp")),
    "a file number beyond": changed(lambda columns: columns.rows["file"].__setitem__(0, 1)),
    "an item beyond its file": changed(lambda columns: columns.rows["offset"].__setitem__(0, 2**63)),
    "data beyond the item": changed(lambda columns: columns.rows["head"].__setitem__(0, 2**32 - 1)),
    "data of 2**62 bytes": changed(lambda columns: columns.rows["data"].__setitem__(0, 2**62)),
    "hashes beyond their section": changed(lambda columns: columns.rows["digest"].__setitem__(0, 2**64 - 1)),
    "a shard outside": changed(lambda columns: columns.dimensions.__setitem__(0, 1)),
    "a shard before the start": changed(lambda columns: columns.dimensions.__setitem__(0, -1)),
    "a shard whose end overflows": changed(lambda columns: columns.dimensions.__setitem__(0, 2**63 - 1)),
    "sections of other lengths": text_of_head(lambda head: head.replace(b'"sections":[', b'"sections":[0,')),
    "no sections": text_of_head(lambda head: head.replace(b'"sections"', b'"section"')),
    "deep JSON": text_of_head(lambda _: b"[" * 10**6),
    "a number of a million digits": text_of_head(lambda _: b'{"keys": [' + b"9" * 10**6 + b"]}"),
    "a head that is no JSON": text_of_head(lambda _: b"\x80\x04."),
    "a head in UTF-16": text_of_head(lambda head: head.decode().encode("utf-16-le")),
    "a head that is a list": text_of_head(lambda _: b"[]"),
    "a head beyond the file": lambda path: replace_index(path, b"LRindex1" + b"\xff" * 8 + bytes(99)),
    "another magic": lambda path: replace_index(path, b"LRindex2" + index_of(path)[8:]),
    "nothing": lambda path: replace_index(path, b""),
}


@pytest.mark.parametrize("attack", INDEXES)
def test_an_index_that_no_save_writes_is_refused(attack: str, tmp_path: Path) -> None:
    path = save(tmp_path / "c")
    INDEXES[attack](path)
    refuse(path, lambda: read_all(path))


MANY = 300
LARGE = 2**22


@pytest.mark.parametrize("kind", ["tensors", "objects", "leaves"])
def test_values_that_share_their_bytes_are_refused_before_they_fill_the_memory(kind: str, tmp_path: Path) -> None:
    path = save(tmp_path / "c")
    with ShardFile(path / "__1_0.distcp") as file:
        item = file.write(b"", memoryview(bytes(LARGE)), b"")
    placed = Placed(file=0, item=item, box=((0,), (LARGE,)) if kind == "tensors" else ((), ()))
    shape, dtype = ((LARGE,), torch.uint8) if kind == "tensors" else ((), None)
    names = [f"{'resume.' if kind == 'leaves' else ''}x{number}" for number in range(MANY)]
    entries = {name: Entry(path=(name,), dtype=dtype, shape=shape, items=[placed]) for name in names}
    replace_file(path, "__1_0.distcp", bytes(LARGE), hash=hash_of_items([item.digests]))
    leaves = dict.fromkeys(names, placed)
    replace_index(
        path,
        build_index(["__1_0.distcp"], {}, leaves) if kind == "leaves" else build_index(["__1_0.distcp"], entries, {}),
    )
    refuse(path, lambda: read_all(path))


def test_shards_that_overlap_or_leave_a_gap_are_refused(tmp_path: Path) -> None:
    for name, begins in {"overlap": [0, 2, 4], "twice": [0, 4, 4], "outside": [0, 4, 12]}.items():
        path = save(tmp_path / name)
        with ShardFile(path / "__1_0.distcp") as file:
            items = [file.write(b"", memoryview(bytes([number] * 4)), b"") for number in range(3)]
        placed = [Placed(file=0, item=item, box=((4 * n,), (4,))) for n, item in enumerate(items)]
        entry = Entry(path=("x",), dtype=torch.uint8, shape=(12,), items=placed)
        hash_of_file = hash_of_items(item.digests for item in items)
        replace_file(path, "__1_0.distcp", (path / "__1_0.distcp").read_bytes(), hash=hash_of_file)
        replace_index(path, build_index(["__1_0.distcp"], {"x": entry}, {}))
        assert CheckpointReader(path).read()["x"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        columns = Columns.read(path)
        columns.dimensions[::2] = begins
        columns.write(path)
        with pytest.raises(ResumeError):
            CheckpointReader(path).load_into({"x": torch.zeros(12, dtype=torch.uint8)})


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
                in_metadata(tmp_path / name, attack)()
    assert classes() == before
    assert torch.serialization._get_layout.cache == cached


def test_the_size_of_compressed_records_is_known_without_the_help_of_a_newer_torch() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**6))
    assert len(buffer.getvalue()) < 10**4
    assert safe._record_bytes(object(), [], buffer.getvalue()) == 10**6


def main(examples: int) -> None:
    for kind in FUZZ:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            target = run_fuzz(kind, Path(folder), examples)
            print(f"{kind}: {dict(target.results)} in {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ALL_EXAMPLES)
