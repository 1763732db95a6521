"""Holds the layering of docs/design.md by reading the imports of every module, without running them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_resume"

# From the bottom up: a unit may import what lies below it, its own modules, and its neighbours as long as these do not
# import it. A unit is a module or a package, named within lightning_resume.
LAYERS = [
    {"errors", "_distributed", "_fork", "data.order"},
    {"state"},
    {"data", "checkpoint"},
    {"saving", "loading", "candidates", "run", "run_folder", "manager", "verification", "export", "proof"},
    {"strategies", "trainer_checkpoints", "binding", "callback", "cli"},
    {"__init__", "__main__"},
]
LEVELS = {unit: level for level, units in enumerate(LAYERS) for unit in units}
STRANGERS = {"data", "checkpoint"}  # neighbours of which neither imports the other
USERS_OF_LIGHTNING = {"strategies", "trainer_checkpoints", "binding", "callback"}  # who may import _lightning

PURE = {"data.order", "checkpoint.retention"}  # decide on numbers alone: no process group, no storage

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
REQUIRED = {"torch", "numpy", "fsspec", "xxhash", "tqdm"} | LIGHTNING


class When(Enum):
    """When an import runs."""

    AT_ONCE = auto()
    LAZILY = auto()  # within a function
    NEVER = auto()  # under `if TYPE_CHECKING`


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import, of ``target`` (a full dotted name), as it stands in ``module`` (named within lightning_resume)."""

    module: str
    target: str
    line: int
    when: When

    def __str__(self) -> str:
        return f"{self.module} imports {self.target} (line {self.line})"

    @property
    def root(self) -> str:
        return self.target.partition(".")[0]


def test_every_module_belongs_to_a_layer() -> None:
    assert [module for module in modules() if unit_of(module) not in {*LEVELS, "_lightning"}] == []


def test_imports_point_down_only() -> None:
    wrong = [
        entry
        for entry, source, target in imports_between_units()
        if source != target and (LEVELS[target] > LEVELS[source] or {source, target} == STRANGERS)
    ]
    assert [str(entry) for entry in wrong] == []


def test_units_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for _, source, target in imports_between_units():
        if source != target:
            graph.setdefault(source, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_only_the_lightning_module_imports_lightning() -> None:
    wrong = [entry for entry in imports() if entry.root in LIGHTNING and entry.module != "_lightning"]
    assert [str(entry) for entry in wrong] == []


def test_the_lightning_module_is_imported_only_where_lightning_is_bound() -> None:
    wrong = [
        entry
        for entry in imports()
        if own_target(entry) == "_lightning" and unit_of(entry.module) not in USERS_OF_LIGHTNING
    ]
    assert [str(entry) for entry in wrong] == []


def test_the_lightning_module_imports_nothing_of_ours_but_errors() -> None:
    wrong = [entry for entry in imports() if entry.module == "_lightning" and own_target(entry) not in {None, "errors"}]
    assert [str(entry) for entry in wrong] == []


def test_pure_modules_know_neither_process_groups_nor_storage() -> None:
    wrong = [
        entry
        for entry in imports()
        if entry.module in PURE
        and (own_target(entry) == "_distributed" or entry.target.startswith(("torch.distributed", "fsspec")))
    ]
    assert [str(entry) for entry in wrong] == []


def test_what_a_module_imports_at_its_top_is_always_installed() -> None:
    installed = REQUIRED | {PACKAGE.name} | sys.stdlib_module_names
    wrong = [entry for entry in imports() if entry.when is When.AT_ONCE and entry.root not in installed]
    assert [str(entry) for entry in wrong] == []


def test_only_optional_packages_are_imported_lazily() -> None:
    wrong = [entry for entry in imports() if entry.when is When.LAZILY and entry.root in REQUIRED]
    assert [str(entry) for entry in wrong] == []


def imports_between_units() -> Iterator[tuple[Import, str, str]]:
    """Every import of ours with the units that it goes from and to, those of _lightning and the package aside."""
    for entry in imports():
        target = own_target(entry)
        source = unit_of(entry.module)
        if target is not None and unit_of(target) in LEVELS and source in LEVELS:
            yield entry, source, unit_of(target)


def unit_of(module: str) -> str:
    """``state.rng`` belongs to ``state``, but ``data.order`` is a unit of its own within ``data``."""
    return module if module in LEVELS else module.partition(".")[0]


def own_target(entry: Import) -> str | None:
    """The module of ours that an import reaches; the package's own ``__init__`` for a name of the package."""
    if entry.root != PACKAGE.name:
        return None
    known, name = modules(), entry.target.partition(".")[2]
    while name and name not in known and name not in {*LEVELS, "_lightning"}:
        name = name.rpartition(".")[0]  # the last part is a name in the module
    return name or "__init__"


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


@cache
def imports() -> list[Import]:
    return [
        Import(module=module, target=target, line=node.lineno, when=when)
        for module, path in modules().items()
        for node, when in import_nodes(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        for target in targets(node, module, path)
    ]


def import_nodes(node: ast.AST, when: When = When.AT_ONCE) -> Iterator[tuple[ast.Import | ast.ImportFrom, When]]:
    """All imports below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, when
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from import_nodes(child, When.LAZILY)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            yield from import_nodes(child, When.NEVER)
        else:
            yield from import_nodes(child, when)


def targets(node: ast.Import | ast.ImportFrom, module: str, path: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = [PACKAGE.name, *([] if module == "__init__" else module.split("."))]
        package = parts if path.name == "__init__.py" else parts[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
    return [f"{base}.{alias.name}" for alias in node.names]
