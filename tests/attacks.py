"""A small checkpoint with every kind of file, ways to rewrite it so that its hashes fit, and pickles that attack."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import xxhash

from lightning_resume.checkpoint.components import LeafComponents, pack
from lightning_resume.checkpoint.index_build import Entry, build_index
from lightning_resume.checkpoint.index_form import ROW
from lightning_resume.checkpoint.manifest import _checksum
from lightning_resume.checkpoint.pages import hashes_of_pages
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.shards import ShardFile
from lightning_resume.checkpoint.stored import blocks_of, hash_of_items
from lightning_resume.checkpoint.writer import write_checkpoint
from tests.checkpoint_worker import full_tensor, sharded

LEAVES = {"resume.loader": pack({"position": 3}), "resume.empty": b""}


def a_state() -> dict[str, Any]:
    tensors = {
        "weight": full_tensor(),
        "half": torch.arange(300, dtype=torch.float32).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    return {"model": tensors, "list": [torch.ones(2), {"lr": 0.1}], "step": 7}


def save(path: Path, *, add: float = 0) -> Path:
    state = a_state()
    state["model"]["weight"] += add
    write_checkpoint(path, state=state, leaves=LEAVES, meta={"epoch": 3}, step=7)
    return path


def save_as_two_ranks(rank: int, folder: Path) -> None:
    """Runs on each of two ranks: their shards are of the same size, so that exchanged ones have the right size."""
    state = a_state()
    state["model"]["weight"] = sharded(torch.arange(48.0).reshape(8, 6))
    state["model"] |= {f"copy{i}": torch.full((256,), float(i)) for i in range(4)}
    leaves = LEAVES | {f"resume.rng.rank_{rank:05d}": pack([rank])}
    write_checkpoint(folder / "c", state=state, leaves=leaves, meta={"epoch": 3}, step=7)


def read_all(path: Path) -> tuple[Any, ...]:
    """What a whole load reads: every item, every leaf, and ``meta.pt``."""
    reader = CheckpointReader(path)
    leaves = {name: reader.leaf(name) for name in reader.leaf_names()}
    return reader.read(), leaves, reader.meta(), reader


def load_components(path: Path) -> Any:
    return LeafComponents(CheckpointReader(path)).value("loader", 0)


@contextmanager
def restored(path: Path) -> Iterator[None]:
    """Puts the folder back as it was."""
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    try:
        yield
    finally:
        for file in path.iterdir():
            if before.get(file.name) != (file.read_bytes() if file.is_file() else None):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        for name, data in before.items():
            if not (path / name).exists():
                (path / name).write_bytes(data)


def write_manifest(path: Path, body: Any) -> None:
    """Writes ``body`` with a checksum that fits, as whoever wants to attack can."""
    if isinstance(body, dict):
        rest = {name: value for name, value in body.items() if name != "checksum"}
        body = {**rest, "checksum": _checksum(rest)}
    (path / "manifest.json").write_text(json.dumps(body))


def replace_file(path: Path, name: str, data: bytes, **entry: Any) -> None:
    """Replaces a file, and what the manifest says of it, if there is one; ``entry`` is what else it shall say."""
    (path / name).write_bytes(data)
    if (path / "manifest.json").exists():
        body = json.loads((path / "manifest.json").read_text())
        said = {"bytes": len(data), "hash": xxhash.xxh3_128_hexdigest(data), "items": []}
        body["files"][name] = {**said, **entry}
        write_manifest(path, body)


# --- ours: what the index says ---


@dataclasses.dataclass
class Columns:
    """An index taken apart, to be changed and written again with hashes that fit."""

    head: Any
    rows: Any
    dimensions: Any
    digests: bytes

    @classmethod
    def read(cls, path: Path) -> Columns:
        data = index_of(path)
        at = 16 + int.from_bytes(data[8:16], "little")
        head = json.loads(data[16:at])
        rows, dimensions, _ = head["sections"]
        parts = data[at : at + rows], data[at + rows : at + rows + dimensions], data[at + rows + dimensions :]
        return cls(head, np.frombuffer(parts[0], ROW).copy(), np.frombuffer(parts[1], "<i8").copy(), parts[2])

    def write(self, path: Path) -> None:
        sections = [self.rows.tobytes(), self.dimensions.tobytes(), self.digests]
        head = self.head
        if isinstance(head, dict) and isinstance(head.get("sections"), list):
            head = {**head, "sections": [len(section) for section in sections]}
        write_index(path, json.dumps(head).encode(), b"".join(sections))


def index_of(path: Path) -> bytes:
    """The index without the hashes of its pages."""
    size: int = json.loads((path / "manifest.json").read_text())["files"][".index"]["items"][0][1]
    return (path / ".index").read_bytes()[:size]


def write_index(path: Path, head: bytes, rest: bytes) -> None:
    replace_index(path, b"LRindex1" + len(head).to_bytes(8, "little") + head + rest)


def replace_index(path: Path, data: bytes) -> None:
    """Replaces the index and the hashes of its pages."""
    parts = [data, *hashes_of_pages(data)]
    starts = itertools.accumulate(map(len, parts), initial=0)
    items = [[start, len(part), xxhash.xxh3_128_hexdigest(part)] for start, part in zip(starts, parts, strict=False)]
    replace_file(path, ".index", b"".join(parts), items=items)


def reseal_items(path: Path) -> None:
    """Makes the hashes of all items those of what lies where the index says, as far as there is anything."""
    columns = Columns.read(path)
    digests: list[bytes] = []
    for row in columns.rows:
        file, head, offset, length, data, _ = row.item()
        row["digest"] = len(digests)
        files = columns.head["files"]
        whole = (path / files[file]).read_bytes() if file < len(files) else b""
        if head + data <= length and offset + length <= len(whole):
            digests += _digests(whole[offset : offset + length], head, data)
    columns.digests = b"".join(digests)
    columns.write(path)


def _digests(item: bytes, head: int, data: int) -> list[bytes]:
    blocks = [item[head + start : head + end] for _, start, end in blocks_of(data)]
    return [xxhash.xxh3_128_digest(part) for part in (item[:head], *blocks, item[head + data :])]


def replace_item(path: Path, key: str, data: bytes) -> None:
    """Replaces the data of the object or leaf ``key``, and all that the index and the manifest say of its file."""
    index = CheckpointReader(path)._content._index
    entries = {
        name: Entry(path=info.path, dtype=info.dtype, shape=info.shape, items=index.items(name))
        for name, info in index.keys.items()
    }
    leaves = {name: index.leaf(name) for name in index.leaves}
    items = {name: entry.items[0] for name, entry in entries.items()} | leaves
    (name,) = index.files
    whole = (path / name).read_bytes()
    (path / name).unlink()
    with ShardFile(path / name) as file:
        for other, placed in items.items():
            item = placed.item
            part = whole[item.offset : item.offset + item.length]
            middle = memoryview(data if other == key else part[item.head : item.head + item.data])
            stored = file.write(part[: item.head], middle, part[item.head + item.data :])
            items[other] = placed._replace(item=stored)
    for other, entry in entries.items():
        entries[other] = dataclasses.replace(entry, items=[items[other]])
    hash_of_file = hash_of_items(placed.item.digests for placed in items.values())
    replace_file(path, name, (path / name).read_bytes(), hash=hash_of_file)
    replace_index(path, build_index([name], entries, {leaf: items[leaf] for leaf in leaves}))


# --- stock: what .metadata says ---


def save_stock(path: Path) -> Path:
    """What plain torch writes, and Lightning beside it; in one process and for one rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(a_state(), checkpoint_id=path)
    torch.save({"epoch": 3}, path / "meta.pt")
    return path


def replace_stock_item(path: Path, key: str, data: bytes) -> None:
    """Replaces the item ``key``, and all that ``.metadata`` says of its file."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (target,) = (index for index in metadata.storage_data if index.fqn == key)
    name = metadata.storage_data[target].relative_path
    whole, parts = (path / name).read_bytes(), []
    inside = [(index, info) for index, info in metadata.storage_data.items() if info.relative_path == name]
    for index, info in sorted(inside, key=lambda pair: pair[1].offset):
        part = data if index == target else whole[info.offset : info.offset + info.length]
        info.offset, info.length = sum(map(len, parts)), len(part)
        parts.append(part)
    (path / name).write_bytes(b"".join(parts))
    (path / ".metadata").write_bytes(pickle.dumps(metadata, 4))


def archive(pickled: bytes, records: Mapping[str, bytes] | None = None, *, deflate: bool = False) -> bytes:
    """What ``torch.save`` writes, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as made:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **(records or {})}.items():
            made.writestr(f"archive/{name}", data)
    return file.getvalue()


# --- code: each pickle, when plain pickle loads it, makes the folder that it is given ---

CodePickle = Callable[[str], bytes]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def long(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


DRAWN = b"cbuiltins\nmap\ncos\nmkdir\n]"


def make_call(made: str) -> str:
    return f"__import__('os').mkdir({made!r})"


CODE: dict[str, CodePickle] = {
    "REDUCE": lambda made: b"\x80\x02cposix\nmkdir\n" + text(made) + b"\x85R.",
    "posix.system": lambda made: b"\x80\x02cposix\nsystem\n" + text(f"mkdir {made}") + b"\x85R.",
    "eval": lambda made: b"\x80\x02cbuiltins\neval\n" + text(make_call(made)) + b"\x85R.",
    "exec": lambda made: b"\x80\x02cbuiltins\nexec\n" + text(make_call(made)) + b"\x85R.",
    "eval by its name in Python 2": lambda made: b"\x80\x02c__builtin__\neval\n" + text(make_call(made)) + b"\x85R.",
    "__import__ and getattr": lambda made: (
        b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\n"
        + (text("os") + b"\x85R" + text("mkdir") + b"\x86R" + text(made) + b"\x85R.")
    ),
    "INST": lambda made: b"(" + text(made) + b"ios\nmkdir\n.",
    "OBJ": lambda made: b"(cos\nmkdir\n" + text(made) + b"o.",
    "NEWOBJ": lambda made: b"\x80\x02cbuiltins\ntuple\n" + DRAWN + text(made) + b"a\x86\x81\x85\x81.",
    "NEWOBJ_EX": lambda made: b"\x80\x04cbuiltins\ntuple\n" + DRAWN + text(made) + b"a\x86\x81\x85}\x92.",
    "a list of a map": lambda made: b"\x80\x02cbuiltins\nlist\n" + DRAWN + text(made) + b"a\x86R\x85R.",
    "STACK_GLOBAL": lambda made: b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93" + text(made) + b"\x85R.",
    "through a module whose function is allowed": lambda made: (
        b"\x80\x04\x8c\x13torch.serialization\x8c\x08os.mkdir\x93" + text(made) + b"\x85R."
    ),
    "through a module whose class is allowed": lambda made: (
        b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x08os.mkdir\x93" + text(made) + b"\x85R."
    ),
    "through a class that is allowed": lambda made: (
        b"\x80\x04cpathlib\nPosixPath.mkdir\ncpathlib\nPosixPath\n" + text(made) + b"\x85R\x85R."
    ),
    "partial": lambda made: b"\x80\x02cfunctools\npartial\ncos\nmkdir\n\x85R" + text(made) + b"\x85R.",
    "BUILD of a partial": lambda made: (
        b"\x80\x02cfunctools\npartial\nccollections\nOrderedDict\n\x85R(cos\nmkdir\n" + text(made) + b"\x85}Ntb)R."
    ),
    "operator.methodcaller": lambda made: (
        b"\x80\x02coperator\nmethodcaller\n"
        + text("mkdir")
        + text(made)
        + (b"\x86Rcbuiltins\n__import__\n" + text("os") + b"\x85R\x85R.")
    ),
    "memo": lambda made: b"\x80\x02cos\nmkdir\nq\x070h\x07" + text(made) + b"\x85R.",
    "a function of torch": lambda made: b"\x80\x02ctorch.utils.collect_env\nrun\n" + text(f"mkdir {made}") + b"\x85R.",
}

# --- harm: what ends or holds up the process, fills the memory, or changes what others use ---


def _doubled(pairs: int) -> bytes:
    return b"".join(b"q" + bytes([n % 256]) + b"h" + bytes([n % 256]) + b"\x86" for n in range(pairs))


def _tensor(numel: int, size: int, stride: int) -> bytes:
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0")
        + text("cpu")
        + long(numel)
        + b"tQK\x00"
        + long(size)
        + b"\x85"
        + long(stride)
        + b"\x85\x89ccollections\nOrderedDict\n)RtR."
    )


_METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
HARM: dict[str, bytes] = {
    "a key of 300,000 nested tuples": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "a key of 60 doubled tuples": b"\x80\x02})" + _doubled(60) + b"K\x01s.",
    "a set of doubled tuples": b"\x80\x04\x8f()" + _doubled(60) + b"\x90.",
    "a frozenset of doubled tuples": b"\x80\x02cbuiltins\nfrozenset\n])" + _doubled(60) + b"a\x85R.",
    "60 doubled tuples": b"\x80\x02)" + _doubled(60) + b".",
    "60 doubled lists": b"\x80\x02]" + b"".join(b"q%c]h%cah%ca" % (n, n, n) for n in range(60)) + b".",
    "a long text that is not there": b"\x80\x02X\xff\xff\xff\xff.",
    "a longer text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
    "a long number that is not there": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "a number of many digits": b"L" + b"9" * 5000 + b"L\n.",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "a memo of 4 billion places": b"\x80\x02)r\xff\xff\xff\xff.",
    "bytearray(2**40)": b"\x80\x02cbuiltins\nbytearray\n" + long(2**40) + b"\x85R.",
    "torch.Tensor(2**45)": b"\x80\x02ctorch\nTensor\n" + long(2**45) + b"\x85R.",
    "UntypedStorage(2**45)": b"\x80\x02ctorch.storage\nUntypedStorage\n" + long(2**45) + b"\x85R.",
    "list(range(2**40))": b"\x80\x02cbuiltins\nlist\ncbuiltins\nrange\n" + long(2**40) + b"\x85R\x85R.",
    "set(range(2**40))": b"\x80\x02cbuiltins\nset\ncbuiltins\nrange\n" + long(2**40) + b"\x85R\x85R.",
    "deque(range(2**40))": b"\x80\x02ccollections\ndeque\ncbuiltins\nrange\n" + long(2**40) + b"\x85R\x85R.",
    "torch.Size(range(2**40))": b"\x80\x02ctorch\nSize\ncbuiltins\nrange\n" + long(2**40) + b"\x85R\x85R.",
    "another codec": b"\x80\x02c_codecs\nencode\n" + text("a" * 9) + text("idna") + b"\x86R.",
    "rebuild by any function": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nlist\ncbuiltins\nlist\n"
        b"cbuiltins\nrange\nM\x00\x10\x85R\x85}tR."
    ),
    "EXT": b"\x80\x02\x82\x01.",
    "PERSID": b"Pstorage\n.",
    "a persistent id that is a text": b"\x80\x02" + text("storage") + b"Q.",
    "a state for a class": b"\x80\x02" + _METADATA + b"N}" + text("__init__") + b"Ns\x86b.",
    "a state for an allowed function": (b"\x80\x02ctorch.serialization\n_get_layout\n}" + text("cache") + b"Nsb."),
    "a state for an enum's member": (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R}"
        + text("_value_")
        + b"K\x63sb."
    ),
    "an OrderedDict with a state": (
        b"\x80\x02ccollections\nOrderedDict\n)RN}" + text("__class__") + b"ccollections\nCounter\ns\x86b."
    ),
    "a lazy module of torch": b"\x80\x02ctorch\n_dynamo\n.",
    "an array of pointers": (
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
        b"(K\x01K\x01\x85cnumpy\ndtype\n"
        + text("O8")
        + b"\x89\x88\x87R(K\x03"
        + text("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89c_codecs\nencode\n"
        + text("AAAAAAAA")
        + text("latin1")
        + b"\x86Rtb."
    ),
    "an array whose field is a pointer": (
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
        b"(K\x01K\x01\x85cnumpy\ndtype\n"
        + text("V8")
        + b"\x89\x88\x87R(K\x03"
        + text("|")
        + b"N"
        + text("a")
        + b"\x85}"
        + text("a")
        + b"cnumpy\ndtype\n"
        + text("O8")
        + b"\x89\x88\x87RK\x00\x86sK\x08K\x01K\x00tb\x89"
        b"c_codecs\nencode\n" + text("AAAAAAAA") + text("latin1") + b"\x86Rtb."
    ),
    "an array with a field outside": (
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
        b"(K\x01K\x01\x85cnumpy\ndtype\n"
        + text("V8")
        + b"\x89\x88\x87R(K\x03"
        + text("|")
        + b"N"
        + text("a")
        + b"\x85}"
        + text("a")
        + b"cnumpy\ndtype\n"
        + text("f8")
        + b"\x89\x88\x87RM\xff\xff\x86sK\x08K\x01K\x00tb\x89"
        b"c_codecs\nencode\n" + text("AAAAAAAA") + text("latin1") + b"\x86Rtb."
    ),
}


def _legacy() -> bytes:
    file = io.BytesIO()
    torch.save(torch.ones(3), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


# whole files in place of an archive of torch.save
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "torch's format before 1.6": _legacy,
    "a TorchScript program": lambda: archive(b"\x80\x02N.", {"constants.pkl": b"\x80\x02)."}),
    "a bomb": lambda: archive(_tensor(2**24, 2**24, 1), {"data/0": bytes(2**26)}, deflate=True),
    "a pickle that is a bomb": lambda: archive(b"\x80\x02" + b"N0" * 2**20 + b"N.", deflate=True),
    "a storage beyond its record": lambda: archive(_tensor(2**20, 2**20, 1), {"data/0": b"four"}),
    "a tensor beyond its storage": lambda: archive(_tensor(1, 2**40, 1), {"data/0": b"four"}),
    "no archive": lambda: b"PK\x03\x04" + bytes(100),
    "nothing": lambda: b"",
    "a bare pickle": lambda: b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
}
