"""The layers of `recipes/`: imports run downwards only, and there is no import circle."""

import ast
import importlib
from pathlib import Path

import pytest
from helpers import ROOT

DOOR = {"prepare", "train", "evaluate", "recommend", "refresh", "serve", "push_to_hub", "demo", "show"}
# From the top down. A layer imports itself and those below; two packages of one layer do not import each other.
LAYERS = [
    {"results"},
    {"door"},
    {"serving"},
    {"papers.unigrf", "papers.recochain", "papers.taobao", "benchmarks"},
    {"evaluation", "training"},
    {"data"},
    {"common"},
]
# Recipes that run door recipes from beginning to end, and so may import them.
SEQUENCES = {
    "recipes.demo": {"recipes.prepare", "recipes.train", "recipes.evaluate"},
}


def modules(root: Path) -> dict[str, Path]:
    """Name and file of every module of `recipes/`."""
    files = sorted((root / "recipes").rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(root: Path) -> dict[str, set[str]]:
    """The modules of `recipes/` that each of them imports, wherever the import stands in the file."""
    known = modules(root)
    imported = {}
    for name, file in known.items():
        imported[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                raise AssertionError(f"{name} has a relative import, which this test does not resolve")
            elif isinstance(node, ast.ImportFrom):
                longer = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                imported[name] |= {longer[alias] if longer[alias] in known else node.module for alias in longer}
        imported[name] &= set(known)
    return imported


def package(module: str) -> str:
    """The package that a module belongs to: `door`, or a name in `LAYERS`."""
    parts = module.split(".")[1:]
    if len(parts) < 2 and (not parts or parts[0] in DOOR):
        return "door"
    return ".".join(parts[:2]) if parts[0] == "papers" and len(parts) > 1 else parts[0]


def upward_imports(root: Path) -> list[str]:
    """Imports that do not run downwards, as `importer -> imported`."""
    ranks = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
    upward = []
    for module, imported in imports(root).items():
        for target in imported - SEQUENCES.get(module, set()) - {"recipes", "recipes.papers"}:
            importer = package(module)
            other = package(target)
            is_inside = importer == other != "door"
            if not is_inside and ranks[importer] >= ranks[other]:
                upward.append(f"{module} -> {target}")
    return sorted(upward)


def circle(root: Path) -> list[str]:
    """The modules of an import circle; empty if there is none."""
    graph = imports(root)
    finished = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in finished:
            return []
        for target in sorted(graph[module]):
            if modules_of_circle := visit(target, [*path, module]):
                return modules_of_circle
        finished.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in graph)), [])


def test_door_has_user_commands_only():
    assert {file.stem for file in (ROOT / "recipes").glob("*.py")} == {"__init__", *DOOR}
    packages = {package(module) for module in modules(ROOT)} - {"papers", "door"}
    assert packages == set.union(*LAYERS) - {"door"}


def test_imports_run_downwards():
    assert upward_imports(ROOT) == []


def test_names_read_from_imported_modules_exist():
    """`train.Missing` would fail only when the line runs, and few tests run a whole command."""
    missing = []
    for name, file in modules(ROOT).items():
        tree = ast.parse(file.read_text())
        aliases = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recipes")
            for alias in node.names
            if f"{node.module}.{alias.name}" in modules(ROOT)
        }
        for node in ast.walk(tree):
            is_read = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
            if is_read and not hasattr(importlib.import_module(aliases[node.value.id]), node.attr):
                missing.append(f"{name}: {node.value.id}.{node.attr}")
    assert missing == []


def test_imports_have_no_circle():
    assert circle(ROOT) == []


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("data/tables.py", "from recipes.training.collator import Collator"),
        ("data/tables.py", "from recipes import train"),
        ("evaluation/report.py", "from recipes.training import collator"),
        ("papers/unigrf/report.py", "import recipes.papers.recochain.report"),
        ("train.py", "def later():\n    from recipes.evaluate import evaluate_checkpoint"),
        ("papers/unigrf/reproduce.py", "from recipes.train import train"),
    ],
)
def test_upward_imports_are_reported(tmp_path, importer, line):
    for file in modules(ROOT).values():
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    (tmp_path / "recipes" / importer).write_text(line)
    assert len(upward_imports(tmp_path)) == 1


def test_circles_are_reported(tmp_path):
    (tmp_path / "recipes" / "data").mkdir(parents=True)
    for name, line in (
        ("a", "from recipes.data.b import x"),
        ("b", "import recipes.data.c"),
        ("c", "from recipes.data import a"),
    ):
        (tmp_path / "recipes" / "data" / f"{name}.py").write_text(line)
    assert sorted(circle(tmp_path)) == ["recipes.data.a", "recipes.data.b", "recipes.data.c"]
