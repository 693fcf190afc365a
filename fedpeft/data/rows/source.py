"""The rows of a task: checked tables, their splits, and the groups by which clients differ."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fedpeft.cache import cache_folder, cached, naming_the_cache, remembered
from fedpeft.data.rows.cache import content_sha256, datasets_cached
from fedpeft.data.rows.groups import groups_by
from fedpeft.data.rows.tables import line_of, load_tables, marks, subsample, values
from fedpeft.data.rows.text_files import TextFormat
from fedpeft.errors import PartlyPublic, named_row
from fedpeft.seeding import generator

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source(ABC):
    """Rows of tables, their splits, and the groups by which clients differ.

    Args:
        path: a folder or file of parquet, CSV, JSON lines or images, or a hub name.
        subset: the hub data set's configuration.
        revision: the hub data set's commit or tag.
        label: column of the label. In a task without labels, it only serves to partition.
        train_split: name of the file or hub split to train on.
        validation_split: split to validate on; null sets ``validation_fraction`` of train aside.
        test_split: split to test on; null sets ``test_fraction`` of train aside, before the
            validation rows.
        missing_split: ``aside`` reads null where a split named validation or test is not there and
            no other split could be meant; ``error`` refuses.
        extra_tests: further test splits, by their names in the results.
        validation_fraction: share of the rows of train to set aside for validation, in (0, 1).
        test_fraction: share of the rows of train to set aside for testing, in (0, 1).
        max_train_rows: number of training rows at most, drawn by a fixed seed; null for all.
        max_validation_rows: the same for validation rows.
        max_test_rows: the same for the rows of each test split.
        bad_rows: ``error`` refuses a row that cannot be used (an empty text, an unknown label, a
            broken image); ``skip`` leaves it out and counts it in the summary.
        separator: the character between two cells of CSV files, or ``tab``; null for a comma, and
            for a tab in ``.tsv`` files.
        encoding: encoding of CSV files and JSON lines, as Python names it.
    """

    path: str | None = None
    subset: str | None = None
    revision: str | None = None
    label: str | None = "label"
    train_split: str = "train"
    validation_split: str | None = "validation"
    test_split: str | None = "test"
    missing_split: str = "aside"
    extra_tests: dict[str, str] = field(default_factory=dict)
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    max_train_rows: int | None = None
    max_validation_rows: int | None = None
    max_test_rows: int | None = None
    bad_rows: str = "error"
    separator: str | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        TextFormat(self.separator, self.encoding)  # checks them
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be in (0, 1), got {getattr(self, name)}")
        for name in ("max_train_rows", "max_validation_rows", "max_test_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be >= 1 or null, got {getattr(self, name)}")
        if self.bad_rows not in ("error", "skip"):
            raise ValueError(f"data.bad_rows must be error or skip, got {self.bad_rows}")
        if self.missing_split not in ("aside", "error"):
            raise ValueError(f"data.missing_split must be aside or error, got {self.missing_split}")
        if reserved := set(self.extra_tests) & set(SPLITS):
            raise ValueError(f"data.extra_tests must not be named {', '.join(sorted(reserved))}")

    @property
    def _format(self) -> TextFormat:
        """Format of files of text."""
        return TextFormat(self.separator, self.encoding)

    @abstractmethod
    def columns(self) -> list[str]:
        """Return the columns that the task reads, without the label's."""

    def problems(self, rows: "Dataset") -> dict[int, str]:
        """Return the positions of rows that cannot be used, and why: ``has an empty text``."""
        problems: dict[int, str] = {}
        for column in self.columns():
            for i, value in enumerate(values(rows, column)):
                if isinstance(value, str) and not value.strip():
                    problems.setdefault(i, f"has an empty {column}")
                elif value is None:
                    problems.setdefault(i, f"has no {column}")
        return problems

    # --- rows --------------------------------------------------------------------------------

    def folder(self) -> str:
        """Return the path that is read.

        Raises:
            ValueError: no path is set.
        """
        if self.path is None:
            raise ValueError("data.path is not set: give a folder of tables or a hub name")
        return self.path

    def _built_folder(self) -> str:
        """Return ``folder()``, which some data sets build in the cache first."""
        with naming_the_cache(cache_folder()):
            return self.folder()

    @property
    def target(self) -> str:
        """Column of the label.

        Raises:
            ValueError: no label column is set.
        """
        if self.label is None:
            raise ValueError(f"data.label is not set: {type(self).__name__} needs it")
        return self.label

    @cached_property
    def tables(self) -> "dict[str, Dataset]":
        """All splits, with all their rows, unchecked."""
        folder = self._built_folder()
        with datasets_cached():
            tables = load_tables(folder, self.subset, self.revision, self._format)
        return {split: self.as_stored(rows) for split, rows in tables.items()}

    def as_stored(self, rows: "Dataset") -> "Dataset":
        """Return a split's rows in the form in which the task reads them; the base changes none."""
        return rows

    @cached_property
    def skipped(self) -> dict[str, int]:
        """Numbers of rows left out, by reason; filled as splits are read."""
        return {}

    @cached_property
    def _usable(self) -> "dict[str, Dataset]":
        return {}

    def _table(self, split: str) -> "Dataset":
        """Return a split's rows that can be used."""
        if split not in self._usable:
            self._usable[split] = self._checked(split, self.as_given(split))
        return self._usable[split]

    def as_given(self, split: str) -> "Dataset":
        """Return all rows of a split, unchecked.

        Raises:
            ValueError: there is no such split.
        """
        if split not in self.tables:
            advice = "data.validation_split or data.test_split to one that it has, or to null to "
            advice += "set rows of train aside"
            if split == self.train_split:
                advice = "data.train_split to one that it has"
            raise PartlyPublic(
                f"data set {self.folder()} has no split {split}: set {advice}",
                f"; it has {', '.join(self.tables)}",
            )
        return self.tables[split]

    def _checked(self, split: str, rows: "Dataset") -> "Dataset":
        self.check_columns(split, rows)
        problems = self.problems(rows)
        if problems and self.bad_rows == "error":
            row = min(problems)
            name = named_row(row, split, self._line(split, row, len(rows)))
            more = f" (and {len(problems) - 1} rows more)" if len(problems) > 1 else ""
            raise ValueError(
                f"{name} {problems[row]}{more}: mend it, or leave such rows out with "
                "data.bad_rows=skip"
            )
        for reason in problems.values():
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if problems:
            rows = rows.select(np.setdiff1d(np.arange(len(rows)), list(problems)))
        if len(rows) == 0:
            raise ValueError(f"split {split} of data set {self.folder()} has no rows")
        return rows

    def _line(self, split: str, row: int, rows: int) -> int | None:
        """Return the line of the file at which a row of a split begins; null if nobody knows."""
        return line_of(self.folder(), split, row, rows, self._format)

    def check_columns(self, split: str, rows: "Dataset") -> None:
        """Raise ValueError if a column that the task reads is missing in a split."""
        for column in [*self.columns(), *filter(None, [self.label])]:
            if column not in rows.column_names:
                # A table without a header has values of its first row in the columns' names.
                raise PartlyPublic(
                    f"data set {self.folder()} has no column {column} in {split}",
                    f", only {', '.join(rows.column_names)}",
                )

    def _table_name(self, split: str) -> str | None:
        """Return a split's name in ``tables``; null if it is of rows of train that are set aside.

        A split of another name that nothing reads may be meant, so it takes no rows of train.
        """
        name = {"validation": self.validation_split, "test": self.test_split}.get(
            split, self.extra_tests.get(split)
        )
        if name is None or name != split or name in self.tables or self.missing_split == "error":
            return name
        read = {self.train_split, self.validation_split, self.test_split, *SPLITS}
        return name if self.tables.keys() - read - {*self.extra_tests.values()} else None

    def all_as_test(self, most: int | None) -> Self:
        """Return the set with all its test rows, which are those of train if it has none.

        Args:
            most: number of rows at most; null for all.
        """
        split = self.test_split if self._table_name("test") else self.train_split
        return replace(self, test_split=split, max_test_rows=most)

    @cached_property
    def _carved(self) -> "dict[str, Dataset]":
        """Train, and the splits that are set aside from it."""
        parts = {"train": self._table(self.train_split)}
        for split in ("test", "validation"):
            if self.is_set_aside(split):
                train, share = parts["train"], getattr(self, f"{split}_fraction")
                rows = generator(0, f"{split} split").permutation(len(train))
                cut = math.ceil(len(train) * share)
                if cut >= len(train):
                    raise ValueError(
                        f"{len(train)} rows of {self.folder()} are too few to set some aside for "
                        f"{split}"
                    )
                parts[split] = train.select(np.sort(rows[:cut]))
                parts["train"] = train.select(np.sort(rows[cut:]))
        return parts

    @cached_property
    def train_rows(self) -> "Dataset":
        """Rows to train on. A client that has its own folder reads no other split."""
        return subsample(self._carved["train"], self.max_train_rows, "train rows")

    @property
    def test_splits(self) -> list[str]:
        """Names of all test splits; ``test`` is the last, because its generated texts are kept."""
        return [*self.extra_tests, "test"]

    @property
    def splits(self) -> list[str]:
        """Names of all splits, the extra tests last."""
        return [*SPLITS, *self.extra_tests]

    def is_set_aside(self, split: str) -> bool:
        """Tell whether a split has no table, so that its rows are set aside from train."""
        return self._table_name(split) is None

    def split_rows(self, split: str) -> "Dataset":
        """Return the rows of train, validation, test or an extra test.

        Raises:
            ValueError: a split, a column, a label or a text is missing.
        """
        if split == "train":
            return self.train_rows
        if split not in self._split_rows:
            name = self._table_name(split)
            rows = self._carved[split] if name is None else self._table(name)
            part = split if split == "validation" else "test"
            most = getattr(self, f"max_{part}_rows")
            self._split_rows[split] = subsample(rows, most, f"{part} rows")
        return self._split_rows[split]

    @cached_property
    def _split_rows(self) -> "dict[str, Dataset]":
        return {}

    # --- notes -------------------------------------------------------------------------------

    def notes(self) -> list[str]:
        """Return sentences on the rows that somebody should know before a run."""
        return self.remembered("notes", self._notes)

    def _notes(self) -> list[str]:
        named = {"validation": self.validation_split, "test": self.test_split}
        missing = [split for split, name in named.items() if name and split in self._carved]
        if not missing:
            return []
        counts = [f"{len(self._carved[split])} for {split}" for split in missing]
        keys = " and ".join(f"data.{split}_fraction" for split in missing)
        return [
            f"data set {self.folder()} has no split {' and no split '.join(missing)}: of its "
            f"{len(self._table(self.train_split))} rows, {' and '.join(counts)} are set aside "
            f"({keys})"
        ]

    # --- groups ------------------------------------------------------------------------------

    def grouped(self, column: str | None) -> tuple[np.ndarray, list[str]]:
        """Return the groups by which clients can differ.

        Args:
            column: any column, or null for the label's, whose fractional values are rounded.

        Returns:
            Each training row's group number, int64 (rows,), and the groups' names, see
            ``groups_by``. All rows are one group if neither a column nor a label is set.
        """
        column = column or self.label
        if column is None:
            return np.zeros(len(self.train_rows), np.int64), ["all"]
        return groups_by(self.train_rows, column, column == self.label, self.folder())

    def group_numbers(self, column: str | None) -> np.ndarray:
        """Return ``grouped``'s numbers without reading unchanged tables again."""
        if self._identity is None:
            return self.grouped(column)[0]
        key = ["groups", self._identity, column]
        return cached(key, lambda: {"numbers": self.grouped(column)[0]})["numbers"]

    # --- identity ----------------------------------------------------------------------------

    @cached_property
    def _identity(self) -> str | None:
        """Settings, and names, sizes and times of the files; null for a data set of the hub.

        Files count as unchanged while their sizes and times of change stay.
        """
        files = marks(self._built_folder())
        return None if files is None else repr((self, files))

    def remembered(self, what: str, compute: Callable[[], Any]) -> Any:
        """Return a value that depends on the rows, cached until their files change.

        Args:
            what: name of the value in the cache.
            compute: makes the value.
        """
        key = (what, self._identity)
        return compute() if self._identity is None else remembered(key, compute)

    def sha256(self, split: str) -> str:
        """Return the hash of the columns of a split that the task reads."""
        columns = [*self.columns(), *filter(None, [self.label])]
        return self.remembered(
            f"sha256 of {split}", lambda: content_sha256(self.split_rows(split), columns)
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows of each split, a hash of all, and counts of rows left out."""
        return self.remembered("fingerprint", self._fingerprint)

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "rows": {split: len(self.split_rows(split)) for split in self.splits},
            "sha256": hashlib.sha256("".join(map(self.sha256, self.splits)).encode()).hexdigest(),
            "skipped": self.skipped,
        }


def prefix_of(split: str) -> str:
    """Return how the names of a split's measures begin: ``test_more`` for a further test split."""
    return split if split in SPLITS else f"test_{split}"
