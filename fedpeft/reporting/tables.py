"""Tables on the terminal and in files: comparisons, studies and parameter counts."""

import csv
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.files import replacing

Rows = list[dict[str, Any]]


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are numbers.

    Args:
        title: stands above the table.
        header: the columns' names.
        rows: cells as text; brackets, as in ``targets=[q,k,v]``, are no markup.
    """
    table = Table(title=Text(title, "table.title"), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:  # a file or pipe has no width to fold to
        wide = Console(width=10_000)
        console = Console(width=max(200, wide.measure(table).maximum))
    console.print(table)


def room() -> int | None:
    """Return the terminal's columns; null for a file or a pipe, which has no width."""
    console = Console()
    return console.width if console.is_terminal else None


def width_of(header: str, cells: Sequence[str]) -> int:
    """Return the characters that a column of a printed table takes without folding a word."""
    return max(map(len, [*header.split(), *cells])) + 3  # two of padding, and a border


def span(pair: Sequence[int]) -> str:
    """Return ``12,345`` or, if least and most differ, ``12,345-23,456``."""
    low, high = pair
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def span_of_bytes(pair: Sequence[int]) -> str:
    """Return bytes in units of 10^6: ``0.243`` or ``0.061-0.080``."""
    low, high = (f"{number / 1e6:,.3f}" for number in pair)
    return low if low == high else f"{low}-{high}"


@dataclass(frozen=True)
class Page:
    """A table and its notes, to be printed or saved.

    Args:
        title: stands above the table on the terminal.
        header: the columns' names.
        cells: the rows as text.
        notes: sentences below the table, a line each.
        above: lines above the printed table.
        below: further tables, whose titles stand in files too.
    """

    title: str
    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    notes: Sequence[str]
    above: Sequence[str] = ()
    below: Sequence["Page"] = ()

    def show(self) -> None:
        """Print the page."""
        for line in self.above:
            print(line)
        print_table(self.title, self.header, self.cells)
        print("\n".join(self.notes))
        for page in self.below:
            print()
            page.show()

    def save(self, file: Path) -> None:
        """Write the page in Markdown; the first column is text, the others are numbers."""
        file.write_text(self._markdown())

    def _markdown(self) -> str:
        notes = ["\n".join(self.notes) + "\n"] if self.notes else []
        lower = [f"{page.title}\n\n{page._markdown()}" for page in self.below]
        return "\n".join([markdown(self.header, self.cells), *notes, *lower])


def markdown(
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    texts: int = 1,
    code: Collection[str] = (),
) -> str:
    """Return a table in Markdown.

    Args:
        header: the columns' names.
        cells: the rows as text.
        texts: number of columns, from the left, that are text; the others are numbers.
        code: names of columns whose cells are code, which readers copy.
    """
    rule = "|---" * texts + "|---:" * (len(header) - texts) + "|"
    written = [
        [
            as_code(cell) if name in code else escaped_markdown(cell)
            for name, cell in zip(header, row, strict=True)
        ]
        for row in cells
    ]
    lines = ["| " + " | ".join(row) + " |" for row in (map(escaped_markdown, header), *written)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def as_code(text: str) -> str:
    """Return a text as a code span of a table; one with line breaks, which no span has, as text."""
    if not text or "\n" in text:
        return escaped_markdown(text)
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{text.replace('|', chr(92) + '|')}{space}{ticks}"


def escaped_markdown(text: str) -> str:
    """Return a text that Markdown prints as it is; ``_`` inside a word needs no escape."""
    return re.sub(r"[\\`*\[\]<>|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


def write_csv(file: Path, rows: Rows) -> None:
    """Write rows with all digits, under the names of the first row's columns."""
    with replacing(file) as draft, draft.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


COMPARISON = (
    "method",
    "quality",
    "global test",
    "round 0",
    "best",
    "at round",
    "trained",
    "kB up/round",
    "kB down/round",
    "MB total",
    "s",
)


def comparison_cells(rows: Rows) -> list[list[str]]:
    """Return rows as text, in the order of ``COMPARISON``."""
    return [
        [
            row["method"],
            f"{row['quality']:.3f}",
            *(mean_text(row[key]) for key in ("global_test", "round_0", "best")),
            str(row["best_round"]),
            f"{row['trained']:,}",
            f"{row['up_bytes_per_client_round'] / 1e3:.1f}",
            f"{row['down_bytes_per_client_round'] / 1e3:.1f}",
            f"{row['total_bytes'] / 1e6:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]


def mean_text(mean: float | None, sd: float | None = None, form: str = ".3f") -> str:
    """Return a mean and its standard deviation as text: ``0.812 ± 0.004``, or a dash for null.

    Args:
        mean: the mean, or a single value.
        sd: the standard deviation; null for one value.
        form: the format of both numbers.
    """
    if mean is None:
        return "-"
    return f"{mean:{form}}" + ("" if sd is None else f" ± {sd:{form}}")


def seeds_text(ended: int, of: int) -> str:
    """Return how many seeds ended: ``3``, or ``2 of 3`` if some did not."""
    return str(of) if ended == of else f"{ended} of {of}"


STUDY = ("method", "lr", "quality", "global test", "seeds", "trained", "MB in all")


def study_cells(rows: Rows) -> list[list[str]]:
    """Return rows as text, in the order of ``STUDY``."""
    return [_study_cells(row) for row in rows]


def measures_page(title: str, rows: Rows, columns: Mapping[str, str]) -> Page:
    """Return a page of measures, a column each.

    Args:
        title: stands above it.
        rows: one row a method, with the mean and standard deviation of each measure by its name.
        columns: titles of the columns, by the measures' names.
    """
    header = ("method", *(text.replace("_", " ") for text in columns.values()))
    cells = [
        [row["method"], *(mean_text(*row["measures"][name]) for name in columns)] for row in rows
    ]
    return Page(title, header, cells, ())


def _study_cells(row: Mapping[str, Any]) -> list[str]:
    if row["quality"] is None:
        return [row["method"], "-", "failed", "-", seeds_text(0, row["of"]), "-", "-"]
    return [
        row["method"],
        f"{row['lr']:g}" + (" (edge)" if row["edge"] else ""),
        mean_text(row["quality"], row["sd"]),
        mean_text(row["global_test"], row["global_sd"]),
        seeds_text(row["seeds"], row["of"]),
        f"{row['trained']:,}",
        f"{row['bytes'] / 1e6:.2f}",
    ]


def counted(count: int, noun: str) -> str:
    """Return a number and what it counts: ``1 run``, ``2 runs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
