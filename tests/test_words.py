"""Docstrings say what a thing is or does, and document parameters. Pages are whole."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

OPENINGS = ("What", "Of", "Those", "Whether", "Where", "Why", "Who", "When", "As")
OF_NOTHING = [*map(str.lower, OPENINGS)]
OF_NOTHING += "that with in on at to by for which it its their they likewise null".split()
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


def nameless(text: str) -> list[str]:
    """Return the lines of a docstring that describe a parameter or an error without a noun."""
    pattern = rf"^\s*(\*{{0,2}}\w+: (?:{'|'.join(OF_NOTHING)})\b.*)"
    return re.findall(pattern, text.partition("\n\n")[2], re.MULTILINE)


@pytest.mark.parametrize("name", FILES)
def test_parameters_and_errors_are_described_by_a_noun(name: str) -> None:
    nodes = [n for n in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(n, DOCUMENTED)]
    texts = [text for n in nodes if (text := ast.get_docstring(n))]
    assert [line for text in texts for line in nameless(text)] == []


def test_a_description_without_a_noun_is_seen() -> None:
    good = "Args:\n    seed: the run's seed.\n    **rest: more.\nRaises:\n    ValueError: no rows."
    bad = "Args:\n    seed: of the run.\n    **rest: its rest.\nRaises:\n    ValueError: it is 0."
    assert nameless(f"Do.\n\n{good}") == []
    lines = ["seed: of the run.", "**rest: its rest.", "ValueError: it is 0."]
    assert nameless(f"Do.\n\n{bad}") == lines


def public(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef, str | None]]:
    """Yield the public functions of a module and of its public classes, with their docstrings.

    A constructor has the docstring of its class. A method without a docstring has that of the
    class that it derives from, so it is not among them.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for function, text in public(node):
                begins = function.name == "__init__"
                text = ast.get_docstring(node) if begins else text
                if text is not None or not node.bases:
                    yield function, text
        elif isinstance(node, ast.FunctionDef) and re.match("[^_]|__init__", node.name):
            yield node, ast.get_docstring(node)


def undocumented(function: ast.FunctionDef, text: str) -> list[str]:
    """Return the parameters, of three or more, that a docstring does not list."""
    given = function.args
    listed = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    names = [arg.arg for arg in listed if arg is not None and arg.arg not in ("self", "cls")]
    if len(names) < 3 or re.search("[Ss]ee ``", text):  # the named function has them
        return []
    args = text.partition("Args:")[2]
    return [name for name in names if not re.search(rf"^ *{name}: ", args, re.MULTILINE)]


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("tests/")])
def test_three_parameters_or_more_are_documented(name: str) -> None:
    functions = list(public(ast.parse((ROOT / name).read_text())))
    assert [(f.name, bad) for f, text in functions if (bad := undocumented(f, text or ""))] == []


def test_a_parameter_without_a_word_is_seen() -> None:
    """Names that begin with ``_`` are private, and two parameters need no list."""
    lines = [
        "def one(a, b, c): 'Add.\\n\\nArgs:\\n    a: first.\\n    c: last.'",
        "def two(a, b): ...",
        "def _three(a, b, c): ...",
        "class Four:\n    'Five, see ``Six``.'\n    def __init__(self, a, *b, **c): ...",
        "class Seven(Four):\n    def eight(self, a, b, c): ...",
        "class Nine:\n    def ten(self, a, *b, **c): ...",
    ]
    functions = list(public(ast.parse("\n".join(lines))))
    assert {f.name: bad for f, text in functions if (bad := undocumented(f, text or ""))} == {
        "one": ["b"],
        "ten": ["a", "b", "c"],
    }


@pytest.mark.parametrize("name", PAGES)
def test_no_merge_was_left_half_way(name: str) -> None:
    """Ruff finds a conflict in Python alone."""
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if line.startswith(("<<<<<<<", ">>>>>>>"))] == []
