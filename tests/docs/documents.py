"""The project's documents and their blocks of code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "deploy/README.md", "results/README.md"),
    *sorted(
        str(p.relative_to(ROOT))
        for name in ("docs/**/*.md", "results/*/README.md")
        for p in ROOT.glob(name)
    ),
]
SHELL = ("bash", "sh", "shell", "console")
_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>.*?) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One block of code.

    Args:
        document: path from the root.
        line: number of its first line.
        language: the language that the fence names.
        text: the block's text, without the fence's indentation.
        reason: text of the mark that says why no test runs it; null if there is none.
    """

    document: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block, without redirections."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [line[: line.index("<")] if "<" in line else line for line in words if line]


def blocks(document: str) -> Iterator[Block]:
    """Yield the blocks of a document."""
    text = (ROOT / document).read_text()
    for found in _BLOCK.finditer(text):
        inner = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(document, line, found["language"], inner, found["reason"])


def shell_blocks() -> list[Block]:
    """Return the shell blocks of all documents."""
    return [b for document in DOCUMENTS for b in blocks(document) if b.language in SHELL]


def inline_commands(document: str) -> Iterator[list[str]]:
    """Yield the words of the commands in a document's sentences that name no placeholder."""
    text = _BLOCK.sub("", (ROOT / document).read_text())
    for span in re.findall(r"`(fedpeft [a-z]+ [^`]*)`", text):
        if not re.search(r"\.\.\.|\b[A-Z]{2,}\b|\bN\b", span):
            yield shlex.split(span.replace("\n", " "))


def page(name: str) -> str:
    """Return a document's text."""
    return Path(ROOT / name).read_text()


def table(text: str, first: str) -> dict[str, list[str]]:
    """Return a table's cells by the first cell of each row.

    Args:
        text: the document's text.
        first: begins the table's heading.
    """
    body = text[text.index(first) :].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body]
    return {name.strip("`"): cells for name, *cells in rows[2:]}
