"""Tables of a report: numbers with all digits as CSV, and texts as Markdown, LaTeX and HTML."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.reporting.tables import Rows, escaped_markdown, markdown, mean_text, write_csv

Text = Callable[[Mapping[str, Any]], str]


def plain(key: str) -> Text:
    """Return a function that gives a row's value as text."""
    return lambda row: str(row[key])


def number(key: str, form: str) -> Text:
    """Return a function that gives a row's number in a format as text, or a dash for null."""
    return lambda row: mean_text(row[key], form=form)


def megabytes(key: str) -> Text:
    """Return a function that gives a row's bytes in units of 10^6 as text."""
    return lambda row: f"{row[key] / 1e6:.2f}"


def p_text(value: float) -> str:
    """Return a p value as text, never 0."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def spread(key: str) -> Text:
    """Return a function that gives a mean with the deviation ``<key>_sd`` as text."""
    return lambda row: mean_text(row[key], row[f"{key}_sd"])


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        name: name of the table's files, without an ending.
        title: stands above it.
        columns: makes the text of each shown column from a row, by the column's title.
        rows: values by name, all of which the CSV has.
        notes: sentences below it.
        texts: number of columns, from the left, that are text; the others are numbers.
        long: titles of columns that LaTeX's table leaves out, because no page has room for them.
        code: titles of columns whose cells are code, which readers copy from Markdown.
    """

    name: str
    title: str
    columns: Mapping[str, Text]
    rows: Rows
    notes: Sequence[str] = field(default=())
    texts: int = 1
    long: Collection[str] = ()
    code: Collection[str] = ()

    @property
    def header(self) -> list[str]:
        """The shown columns' titles."""
        return list(self.columns)

    @property
    def cells(self) -> list[list[str]]:
        """The shown texts by row."""
        return [[text(row) for text in self.columns.values()] for row in self.rows]

    def save(self, folder: Path) -> list[Path]:
        """Write ``<name>.csv``, ``.md`` and ``.tex`` unless it has no row; return their paths."""
        if not self.rows:
            return []
        csv, md, tex = (folder / f"{self.name}.{end}" for end in ("csv", "md", "tex"))
        write_csv(csv, self.rows)
        notes = "".join(f"\n{escaped_markdown(note)}\n" for note in self.notes)
        md.write_text(markdown(self.header, self.cells, self.texts, self.code) + notes)
        tex.write_text(self.latex())
        return [csv, md, tex]

    def latex(self) -> str:
        """Return the table for LaTeX, which needs no package."""
        shown = [place for place, name in enumerate(self.columns) if name not in self.long]
        rows = [[row[place] for place in shown] for row in (self.header, *self.cells)]
        head, *lines = (" & ".join(map(escaped_latex, row)) for row in rows)
        kinds = "".join("l" if place < self.texts else "r" for place in shown)
        left = [f"{self.name}.csv has, too: {', '.join(self.long)}."] if self.long else []
        notes = [f"% {' '.join(note.split())}" for note in (self.title, *self.notes, *left)]
        body = [rf"{line} \\" for line in lines]
        whole = [*notes, rf"\begin{{tabular}}{{{kinds}}}", r"\hline", rf"{head} \\", r"\hline"]
        return "\n".join([*whole, *body, r"\hline", r"\end{tabular}"]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "…": r"\dots{}",
    "\n": " ",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def escaped_latex(text: str) -> str:
    """Return a text whose characters LaTeX prints as they are."""
    return re.sub("|".join(map(re.escape, _LATEX)), lambda match: _LATEX[match[0]], text)
