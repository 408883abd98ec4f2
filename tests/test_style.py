"""The style of the tests: short names, no imports among test files, no private names of the packages."""

import ast
import functools
import re

import pytest
from helpers import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
PACKAGES = ("modeling_unigrf", "tokenization", "recipes")
FORBIDDEN_NAMES = {"found", "given", "more", "nothing", "one", "own", "told"}


@functools.cache
def private_names():
    """Return the names of private functions and classes of the packages."""
    trees = [ast.parse(file.read_text()) for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    names = {str(getattr(node, "name", "")) for tree in trees for node in ast.walk(tree)}
    return {name for name in names if re.match(r"_[a-z]", name)}


def style_problems(source, private):
    """Describe what breaks the style of a test file."""
    problems = []
    stems = {file.stem for file in FILES if file.stem != "helpers"}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) if name.startswith("test_") and len(name) > 60:
                problems.append(f"long name {name}")
            case ast.ImportFrom(module=module) if module in stems:
                problems.append(f"import of {module}")
            case ast.Import(names=aliases) if stems & {alias.name for alias in aliases}:
                problems.append(f"import of {aliases[0].name}")
            case ast.Attribute(value=ast.Name(id="GenerationMixin")):
                pass  # transformers' own
            case ast.Attribute(attr=name) if name in private:
                problems.append(f"private {name}")
            case ast.Constant(value=str(text)):
                problems += [f"private {name}" for name in re.findall(r"\b_[a-z]\w*", text) if name in private]
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) if name in FORBIDDEN_NAMES:
                problems.append(f"variable {name}")
    return problems


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tests_follow_the_style(file):
    assert style_problems(file.read_text(), private_names()) == []


def test_broken_style_is_reported():
    long_name = f"test_{'a' * 60}"
    source = f"""
from test_style import FILES
import conftest
def {long_name}(model, told):
    model._secret()
    monkeypatch.setattr(model, "_secret", None)
    GenerationMixin._secret
    run("model._secret()")
"""
    private = ["private _secret"] * 3
    expected = ["import of conftest", "import of test_style", f"long name {long_name}", *private, "variable told"]
    assert sorted(style_problems(source, {"_secret"})) == expected


def test_file_names_are_unique():
    assert len({file.name for file in FILES}) == len(FILES)
