"""Docstrings say what a thing is or does; some openings only gesture at it. Pages are whole."""

import ast

import pytest

from tests.conftest import ROOT

OPENINGS = ("What", "Of", "Those", "Whether", "Where")
FILES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("fedpeft", "tests", "benchmarks", "scripts", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "conf/**/*.yaml", "Makefile", "*.txt", "*.toml", "*.yml")
    for path in ROOT.glob(pattern)
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("name", FILES)
def test_no_docstring_begins_with_a_gesture(name: str) -> None:
    nodes = [n for n in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(n, DOCUMENTED)]
    first = {d.split()[0].strip(".,:;") for n in nodes if (d := ast.get_docstring(n))}
    assert not first & set(OPENINGS)


@pytest.mark.parametrize("name", PAGES)
def test_no_merge_was_left_half_way(name: str) -> None:
    """Ruff finds a conflict in Python alone."""
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if line.startswith(("<<<<<<<", ">>>>>>>"))] == []
