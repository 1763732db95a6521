"""The table of docs/loaders.md, from what each loader declares: ``python -m tests.capability_table --write``.

A row is a conformance suite, so that nothing is in the table that is not also tested.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lightning_resume.data.capabilities import Capabilities

PAGE = Path(__file__).parents[1] / "docs" / "loaders.md"
BEGIN, END = "<!-- capabilities: begin -->", "<!-- capabilities: end -->"

SUITES = {
    "`DataLoader`, shuffled or not": "test_conformance_loaders:TestShuffled",
    "`DataLoader` with a `sampler` of yours": "test_conformance_loaders:TestSampler",
    "the same, where each rank draws its own": "test_conformance_loaders:TestSamplerOfEachRank",
    "`DataLoader` with a `batch_sampler` of yours": "test_conformance_loaders:TestBatchSampler",
    "dataset that fetches batches (`__getitems__`)": "test_conformance_loaders:TestDatasetThatFetchesBatches",
    "`ShardedDataset`, parquet": "test_conformance_sharded:TestParquet",
    "`ShardedDataset`, JSON lines or text": "test_conformance_streamed:TestJsonLines",
    "the same, .zst": "test_conformance_streamed:TestZstdFrames",
    "`ShardedDataset`, tar": "test_conformance_streamed:TestTar",
    "the same, .tar.gz": "test_conformance_streamed:TestTarGzip",
    "`ShardedDataset`, parquet, filtered or packed": "test_conformance_streamed:TestParquetRows",
    "a stream packed into sequences (`Packing`)": "test_conformance_streamed:TestPacking",
    "a stream in batches by length (`BatchByLength`)": "test_conformance_streamed:TestBatchesByLength",
    "map-style dataset as a stream (`stream_of`)": "test_conformance_streamed:TestStreamOf",
    "`StreamMixture`": "test_conformance_streamed:TestStreamMixture",
    "`IterableDataset` without a state": "test_conformance_loaders:TestIterableDataset",
    "`IterableDataset` with a state": "test_conformance_loaders:TestStatefulIterableDataset",
    "`StatefulDataLoader`, map-style": "test_conformance_loaders:TestTorchdata",
    "`StatefulDataLoader`, iterable with a state": "test_conformance_loaders:TestTorchdataStatefulIterable",
    "`Mixture`": "test_conformance_mixture:TestMixture",
    "`dispatched`, map-style": "test_conformance_dispatched:TestDispatched",
    "`dispatched`, `IterableDataset` with a state": "test_conformance_dispatched:TestDispatchedInTurn",
    "`WeightedSampler`": "test_conformance_mixture:TestWeightedSampler",
    "the same without replacement": "test_conformance_mixture:TestWithoutReplacement",
    "Hugging Face `Dataset` with a transform": "test_adapter_huggingface:TestTable",
    "Hugging Face `IterableDataset`": "test_adapter_huggingface:TestStream",
    "the same, shuffled": "test_adapter_huggingface:TestShuffledStream",
    "MosaicML `StreamingDataset`, 3 ranks, 2 canonical nodes": "test_adapter_mosaic:TestMosaic",
    "LitData `StreamingDataset`": "test_adapter_litdata:TestLitData",
    "the same in a `DataLoader` of torch's": "test_adapter_litdata:TestLitDataInPlainDataLoader",
    "Megatron-Energon": "test_adapter_energon:TestEnergon",
    "the same with `repeat=True`": "test_adapter_energon:TestEnergonThatRepeats",
}

HEAD = (
    "| Loader | World size | Workers | Batch size | Again | Lost | Order | Random numbers | A resume costs | State |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def rows() -> Iterator[str]:
    for label, where in SUITES.items():
        module, name = where.split(":")
        yield row(label, declared(getattr(importlib.import_module(f"tests.{module}"), name)()))


def declared(suite: object) -> Capabilities:
    """What the suite's loader declares where there are several ranks: one of a single rank may not know better."""
    with tempfile.TemporaryDirectory() as folder:
        suite.prepare(Path(folder))  # type: ignore[attr-defined]
        loader = suite.make(folder=Path(folder), world_size=max(suite.world_sizes))  # type: ignore[attr-defined]
        return loader.capabilities  # type: ignore[no-any-return]


def row(label: str, can: Capabilities) -> str:
    changes = (can.world_size.value, can.num_workers.value, can.batch_size.value)
    cells = (label, *changes, can.repeated, can.lost, can.order.value, can.randomness.value)
    return f"| {' | '.join(map(str, (*cells, can.resume_cost, can.state_size)))} |"


def table() -> str:
    return "\n".join((BEGIN, *HEAD, *rows(), END))


def page() -> str:
    """The page with the table as it should be."""
    text = PAGE.read_text()
    return text[: text.index(BEGIN)] + table() + text[text.index(END) + len(END) :]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into the page")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(table())
