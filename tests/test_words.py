"""Docstrings say what a thing is or does; some openings only gesture at it."""

import ast

import pytest

from tests.conftest import ROOT

OPENINGS = ("What", "Of", "Those", "Whether", "Where")
FILES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("fedpeft", "tests", "benchmarks", "scripts", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("name", FILES)
def test_no_docstring_begins_with_a_gesture(name: str) -> None:
    nodes = [n for n in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(n, DOCUMENTED)]
    first = {d.split()[0].strip(".,:;") for n in nodes if (d := ast.get_docstring(n))}
    assert not first & set(OPENINGS)
