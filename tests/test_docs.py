"""The pages say what is so: the table of capabilities, and the tests that are named as proofs."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests import capability_table
from tests.harness import ROOT

PAGES = ("docs/features.md", "docs/upstream.md")
SUITE = "tests/conformance.py"
NAMED = re.compile(r"`(tests/\w+\.py)?((?:::\w+)*)`")


def test_the_table_of_capabilities_is_what_the_loaders_declare() -> None:
    declared = capability_table.page()
    assert capability_table.PAGE.read_text() == declared, "run: python -m tests.capability_table --write"


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = list(named_tests((ROOT / page).read_text()))
    assert named
    assert [f"{path}::{name}" for path, name in named if not defines(path, name)] == []


def named_tests(page: str) -> Iterator[tuple[str, str]]:
    """The files and what is named in them; ``::name`` alone is of the file that was named last."""
    path = ""
    for file, names in NAMED.findall(page):
        path = file or path
        for name in names.split("::")[1:] or [""] * bool(file):
            yield path, name


def defines(path: str, name: str) -> bool:
    source = (ROOT / path).read_text() if (ROOT / path).is_file() else None
    if source is None or not name:
        return source is not None
    if "LoaderConformance" in source:  # a suite's tests are those of its base
        source += (ROOT / SUITE).read_text()
    return re.search(rf"(def|class) {name}\b", source) is not None
