"""Files of text (CSV and JSON lines): how they are read, and a sentence for each that cannot be."""

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.errors import PartlyPublic

# Functions import datasets, because it takes seconds and cached rows do without it.
if TYPE_CHECKING:
    from datasets import Dataset

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # in CSV files, in place of commas
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Cells that pandas takes for gaps unless it is told otherwise.
GAPS = [
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
]
MOST_LOOKED_AT = 1 << 20  # bytes of a file in which those beyond ASCII are counted
RECODE = "save it as UTF-8, or name its encoding, such as data.encoding=cp1252"


@dataclass(frozen=True)
class TextFormat:
    """The format of files of text.

    Args:
        separator: the character between two cells of a CSV file, or ``tab``; null for a comma, and
            for a tab in a ``.tsv`` file.
        encoding: encoding of the files, as Python names it.
        numbers: columns of a CSV file in which 007 is the number 7; in others it is a code.
    """

    separator: str | None = None
    encoding: str = "utf-8"
    numbers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.separator not in (None, "tab") and len(self.separator) != 1:
            raise ValueError(f"data.separator must be one character or tab, got {self.separator}")
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ValueError(
                f"data.encoding={self.encoding} is no encoding that Python knows, such as utf-8, "
                "utf-16, cp1252 or latin-1"
            ) from error

    def between(self, file: Path) -> str:
        """Return the character between two cells of a file."""
        separator = self.separator or ("tab" if file.suffix == ".tsv" else ",")
        return "\t" if separator == "tab" else separator

    def load(self, kind: str, files: list[Path]) -> "Dataset":
        """Read the files of a split.

        Args:
            kind: name of the reader of ``datasets``.
            files: the split's files, all of one kind.
        """
        import datasets

        # escaped, because else [ and * in a name are patterns
        names = [escape(str(file)) for file in files]
        settings: dict[str, Any] = {"data_files": names, "split": "train"}
        if kind == "json":
            settings["encoding"] = self.encoding
        if kind != "csv":
            return datasets.load_dataset(kind, **settings)
        settings |= {"encoding": self.encoding, "sep": self.between(files[0])}
        rows = datasets.load_dataset(kind, **settings)
        if gaps := _columns_with_gaps(rows):
            # In a column of texts, NA and None are texts, and only an empty cell is a gap.
            missing = {name: [""] if name in gaps else GAPS for name in rows.column_names}
            settings |= {"keep_default_na": False, "na_values": missing}
            rows = datasets.load_dataset(kind, **settings)
        names = rows.column_names
        numeric = [n for n in names if _is_numeric(rows, n) and n not in self.numbers]
        if numeric:
            # A cell 007 is a code and not the number 7, so its column is of texts.
            texts = datasets.Features({name: datasets.Value("string") for name in numeric})
            settings |= {"keep_default_na": False, "na_values": [""]}
            written = datasets.load_dataset(kind, **settings, usecols=numeric, features=texts)
            if codes := [name for name in numeric if _has_codes(written, name)]:
                parts = [rows.remove_columns(codes), written.select_columns(codes)]
                rows = datasets.concatenate_datasets(parts, axis=1).select_columns(names)
        return rows

    def check(self, path: str, file: Path) -> None:
        """Check a file as far as its first line with text.

        Args:
            path: ``data.path``, for the error.
            file: CSV or JSON lines.

        Raises:
            ValueError: the file is in UTF-16, has no rows, or has other characters between its
                cells.
        """
        with file.open("rb") as stream:
            start = stream.read(2)
        if start in UTF_16 and not codecs.lookup(self.encoding).name.startswith("utf-16"):
            problem = "is in UTF-16: save it as UTF-8, or give data.encoding=utf-16"
        elif file.suffix in (".csv", ".tsv"):
            problem = self._problem_of_csv(file)
        else:
            with file.open("rb") as stream:
                blocks = iter(partial(stream.read, 1 << 16), b"")
                problem = "" if any(block.strip() for block in blocks) else "is empty"
        if problem:
            raise PartlyPublic(f"data.path={path}: a file {problem}", f" ({file.name})")

    def _problem_of_csv(self, file: Path) -> str:
        separator = self.between(file)
        with file.open(newline="", encoding=self.encoding) as text, suppress(ValueError, csv.Error):
            lines = (line for line in text if line.strip())
            header = next(lines, "")
            if not header:
                return "is empty"
            if self.separator is None and len(_cells(header, separator)) == 1:
                for other, name in SEPARATORS.items():
                    if other != separator and len(_cells(header, other)) > 1:
                        value = "tab" if other == "\t" else f"'{other}'"
                        return f'has {name} between its cells: give "data.separator={value}"'
            if next(lines, None) is None:
                return "has a header and no rows"
        if line := self._loose_quote(file):
            return (
                f"has text behind a closing quote near line {line}, so a quote that opens no cell "
                "may have swallowed rows before it: mend it"
            )
        return ""

    def _loose_quote(self, file: Path) -> int | None:
        """Return the last line of the first cell over lines that goes on behind its closing quote.

        In one line, such a cell swallows no row.
        """
        before = csv.field_size_limit(sys.maxsize)
        try:
            with file.open(newline="", encoding=self.encoding) as text, suppress(ValueError):
                rows, end = csv.reader(text, delimiter=self.between(file), strict=True), 0
                while True:
                    try:
                        next(rows)
                    except StopIteration:
                        return None
                    except csv.Error as error:
                        if "expected after" in str(error) and rows.line_num > end + 1:
                            return rows.line_num
                    end = rows.line_num
        finally:
            csv.field_size_limit(before)
        return None

    def broken_line(self, files: Iterable[Path], reason: str) -> tuple[str, str]:
        """Return the words for a broken line; and, for the owner's eyes, the file and the reason.

        A line is broken if it is not in the encoding, in JSON lines no JSON, and in CSV longer
        than the header.

        Args:
            files: the data set's files.
            reason: the message of the library that read the files; left out where the encoding is
                wrong.
        """
        for file in files:
            search = {".csv": self._in_csv, ".tsv": self._in_csv, ".jsonl": self._in_jsonl}
            if file.suffix in search and (number := _first_undecodable(file, self.encoding)):
                name = "UTF-8" if codecs.lookup(self.encoding).name == "utf-8" else self.encoding
                advice = self._recode(file)
                return f", because line {number} of a file is no {name}: {advice}", _named(file)
            if file.suffix in search and (number := search[file.suffix](file)):
                return f", because line {number} of a file is broken", f"{_named(file)}: {reason}"
        return "", f": {reason}"

    def first_lines(self, file: Path) -> list[int]:
        """Return the line at which each row of a file begins, from 1; none if it has no lines."""
        with file.open(newline="", encoding=self.encoding) as text, suppress(ValueError, csv.Error):
            if file.suffix == ".jsonl":
                return [number for number, line in enumerate(text, 1) if line.strip()]
            if file.suffix in (".csv", ".tsv"):
                return self._first_lines(csv.reader(text, delimiter=self.between(file)))
        return []

    def _first_lines(self, cells: Any) -> list[int]:
        """Return the first line of each row below the header; a cell may have several lines."""
        starts, end = [], 0
        for row in cells:
            if row:
                starts.append(end + 1)
            end = cells.line_num
        return starts[1:]

    def _recode(self, file: Path) -> str:
        """Return what to do about a file in another encoding, with the likeliest one's name.

        Where many bytes are beyond ASCII, no encoding is likelier than others.
        """
        with file.open("rb") as opened:
            content = opened.read(MOST_LOOKED_AT)
        beyond = sum(byte > 127 for byte in content)
        likely = () if beyond * 5 > len(content) else ("cp1252", "latin-1")
        for name in ("utf-8", *likely):
            same = codecs.lookup(name) == codecs.lookup(self.encoding)
            if not same and _first_undecodable(file, name) is None:
                save = "" if name == "utf-8" else ", or save it as UTF-8"
                return f"it looks like {name}, so give data.encoding={name}{save}"
        return RECODE

    def _in_jsonl(self, file: Path) -> int | None:
        with file.open(encoding=self.encoding) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    json.loads(line if line.strip() else "{}")
                except ValueError:
                    return number
        return None

    def _in_csv(self, file: Path) -> int | None:
        with file.open(newline="", encoding=self.encoding) as text, suppress(csv.Error):
            rows = csv.reader(text, delimiter=self.between(file))
            width = len(next(rows, ()))
            return next((rows.line_num for row in rows if len(row) > width), None)
        return None


PLAIN = TextFormat()


def _named(file: Path) -> str:
    return f" ({file.name})"


def _first_undecodable(file: Path, encoding: str) -> int | None:
    """Return the first line, from 1, that is not in an encoding; null if all are."""
    decoder = codecs.getincrementaldecoder(encoding)()
    read = 0
    with file.open("rb") as lines:
        try:
            for line in lines:
                read += 1
                decoder.decode(line)
            decoder.decode(b"", final=True)
        except UnicodeError:
            return read
    return None


def _cells(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator), [])


def _is_numeric(rows: "Dataset", column: str) -> bool:
    """Tell whether a column is of whole or fractional numbers."""
    return getattr(rows.features[column], "dtype", "").startswith(("int", "uint", "float"))


def _has_codes(rows: "Dataset", column: str) -> bool:
    """Tell whether a column of texts has a number with a needless zero in front."""
    cells = rows.with_format("arrow")[:][column].to_pylist()
    return any(re.match(r"\s*[+-]?0\d", cell) for cell in cells if cell)


def _columns_with_gaps(rows: "Dataset") -> list[str]:
    """Return the columns of texts in which a cell is missing, and those without any value."""
    table = rows.with_format("arrow")[:]
    missing = {name: table[name].null_count for name in rows.column_names}
    texts = ("string", "large_string")
    return [
        name
        for name, count in missing.items()
        if count == len(rows) or (count and getattr(rows.features[name], "dtype", "") in texts)
    ]
