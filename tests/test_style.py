"""The style: names of variables everywhere; in tests also short names, no imports among files, no private names."""

import ast
import functools
import re

import pytest
from helpers import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
PACKAGES = ("modeling_unigrf", "tokenization", "recipes")
PACKAGE_FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
FORBIDDEN_NAMES = {"found", "given", "more", "nothing", "one", "own", "told"}


@functools.cache
def private_names():
    """Return the names of private functions and classes of the packages."""
    trees = [ast.parse(file.read_text()) for file in PACKAGE_FILES]
    names = {str(getattr(node, "name", "")) for tree in trees for node in ast.walk(tree)}
    return {name for name in names if re.match(r"_[a-z]", name)}


def forbidden_variables(source):
    """List the variables and arguments whose names say nothing."""
    names = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) if name in FORBIDDEN_NAMES:
                names.append(name)
    return names


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
    return problems + [f"variable {name}" for name in forbidden_variables(source)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tests_follow_the_style(file):
    assert style_problems(file.read_text(), private_names()) == []


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_variables_of_the_packages_are_nouns(file):
    assert forbidden_variables(file.read_text()) == []


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
