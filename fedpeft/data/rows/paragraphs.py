"""First paragraphs of the docstrings in source files.

As a script it reads a JSON list of modules and paths, and writes the list of their paragraphs. It
imports nothing of fedpeft, so that it starts fast.
"""

import ast
import gc
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = ("body", "handlers", "cases", "orelse", "finalbody")  # fields that hold statements


def first_paragraph(docstring: str) -> str:
    """Return a docstring's text up to its first empty line, with white space collapsed."""
    return " ".join(re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0].split())


def paragraphs(source: bytes | str, module: str) -> list[tuple[str, str]]:
    """Return name and first paragraph of each docstring of a module, in order.

    A source that this Python cannot parse gives none.

    Args:
        source: the module's source code.
        module: the module's full name, with which the names begin.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except SyntaxError:  # newer syntax, or bytes that are no text
            return []
    return [
        (name, first_paragraph(text))
        for name, node in _statements(tree, module)
        if isinstance(node, _DOCUMENTED)
        if (text := ast.get_docstring(node, clean=False))
    ]


def _statements(tree: ast.Module, module: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield a module and its statements, each with the name of the class or function it is in.

    Expressions, most of a tree, hold no docstrings.
    """
    waiting: list[tuple[str, ast.AST]] = [(module, tree)]
    while waiting:
        outer, node = waiting.pop()
        name = f"{outer}.{node.name}" if isinstance(node, _DOCUMENTED[1:]) else outer
        yield name, node
        for field in reversed(_BLOCKS):
            waiting += [(name, inner) for inner in reversed(getattr(node, field, []))]


def _parse() -> None:
    """Read a JSON list of modules and paths, and write the list of their paragraphs."""
    gc.disable()  # syntax trees have no cycles, and scanning them costs a fifth of the time
    files = json.load(sys.stdin)
    json.dump([paragraphs(Path(path).read_bytes(), module) for module, path in files], sys.stdout)


if __name__ == "__main__":
    _parse()
