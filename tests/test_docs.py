"""The pages say what is so: the table of capabilities, and the tests that are named as proofs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

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


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_what_a_page_imports_of_ours_is_there(page: Path) -> None:
    text = page.read_text()
    found = re.findall(r"^from (lightning_resume[\w.]*) import (?:\(([^)]*)\)|(.+))$", text, re.MULTILINE)
    for module, several, one in found:
        names = [name.strip() for name in (several or one).split("#")[0].split(",") if name.strip()]
        assert [name for name in names if not hasattr(importlib.import_module(module), name)] == []
