"""The rows of a task: tables, checked and in splits, and the groups in them."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.data.rows.cache import cached, content_sha256, remembered
from fedpeft.data.rows.tables import load_tables, marks, subsample, values
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
        label: column of the label; where the task has none, of the values by which clients differ.
        train_split: the file or hub split to train on.
        validation_split: the one that validates; null sets ``validation_fraction`` of train aside.
        test_split: the one that tests; null sets ``test_fraction`` of train aside, first.
        extra_tests: further test splits by the name that they get in the results.
        max_train_rows: at most so many rows, drawn by a fixed seed; null for all.
        max_validation_rows: likewise; ``max_test_rows`` too.
        bad_rows: a row that cannot be used (an empty text, an unknown label, a broken image) is an
            ``error``, or ``skip`` leaves it out and counts it in the summary.
    """

    path: str | None = None
    subset: str | None = None
    revision: str | None = None
    label: str | None = "label"
    train_split: str = "train"
    validation_split: str | None = "validation"
    test_split: str | None = "test"
    extra_tests: dict[str, str] = field(default_factory=dict)
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    max_train_rows: int | None = None
    max_validation_rows: int | None = None
    max_test_rows: int | None = None
    bad_rows: str = "error"

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be in (0, 1), got {getattr(self, name)}")
        for name in ("max_train_rows", "max_validation_rows", "max_test_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be >= 1 or null, got {getattr(self, name)}")
        if self.bad_rows not in ("error", "skip"):
            raise ValueError(f"data.bad_rows must be error or skip, got {self.bad_rows}")
        if taken := set(self.extra_tests) & set(SPLITS):
            raise ValueError(f"data.extra_tests must not be named {', '.join(sorted(taken))}")

    @abstractmethod
    def columns(self) -> list[str]:
        """Columns that it reads, the label's apart."""

    def problems(self, rows: "Dataset") -> dict[int, str]:
        """Rows that cannot be used, and why: ``has an empty text``."""
        found: dict[int, str] = {}
        for column in self.columns():
            for i, value in enumerate(values(rows, column)):
                if isinstance(value, str) and not value.strip():
                    found.setdefault(i, f"has an empty {column}")
                elif value is None:
                    found.setdefault(i, f"has no {column}")
        return found

    # --- rows --------------------------------------------------------------------------------

    def folder(self) -> str:
        """Return the path that is read.

        Raises:
            ValueError: no path is set.
        """
        if self.path is None:
            raise ValueError("data.path is not set: give a folder of tables or a hub name")
        return self.path

    @property
    def target(self) -> str:
        """Column of the label.

        Raises:
            ValueError: none is set.
        """
        if self.label is None:
            raise ValueError(f"data.label is not set: {type(self).__name__} needs it")
        return self.label

    @cached_property
    def tables(self) -> "dict[str, Dataset]":
        """All splits, as they stand there."""
        return load_tables(self.folder(), self.subset, self.revision)

    @cached_property
    def skipped(self) -> dict[str, int]:
        """Rows that were left out, by reason; filled as splits are read."""
        return {}

    @cached_property
    def _usable(self) -> "dict[str, Dataset]":
        return {}

    def _table(self, split: str) -> "Dataset":
        """A split's rows that can be used."""
        if split not in self._usable:
            self._usable[split] = self._checked(split, self.as_given(split))
        return self._usable[split]

    def as_given(self, split: str) -> "Dataset":
        """A split's rows as they stand there; ValueError if there is none."""
        if split not in self.tables:
            advice = "data.validation_split or data.test_split to one of them, or to null to set "
            advice += "rows of train aside"
            if split == self.train_split:
                advice = "data.train_split to one of them"
            raise ValueError(
                f"data set {self.folder()} has no split {split}, only {', '.join(self.tables)}: "
                f"set {advice}"
            )
        return self.tables[split]

    def _checked(self, split: str, rows: "Dataset") -> "Dataset":
        self.check_columns(split, rows)
        found = self.problems(rows)
        if found and self.bad_rows == "error":
            row = min(found)
            more = f" (and {len(found) - 1} rows more)" if len(found) > 1 else ""
            raise ValueError(
                f"row {row} of {split} {found[row]}{more}: mend it, or leave such rows out with "
                "data.bad_rows=skip"
            )
        for reason in found.values():
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if found:
            rows = rows.select(np.setdiff1d(np.arange(len(rows)), list(found)))
        if len(rows) == 0:
            raise ValueError(f"split {split} of data set {self.folder()} has no rows")
        return rows

    def check_columns(self, split: str, rows: "Dataset") -> None:
        """Raises ValueError for a column that is not there."""
        for column in [*self.columns(), *filter(None, [self.label])]:
            if column not in rows.column_names:
                raise ValueError(
                    f"data set {self.folder()} has no column {column} in {split}, "
                    f"only {', '.join(rows.column_names)}"
                )

    @cached_property
    def _carved(self) -> "dict[str, Dataset]":
        """Train, and what is set aside of it."""
        parts = {"train": self._table(self.train_split)}
        for split, given in (("test", self.test_split), ("validation", self.validation_split)):
            if given is None:
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
        """Rows to train on; a client with a folder of its own needs no other split."""
        return subsample(self._carved["train"], self.max_train_rows, "train rows")

    def split_rows(self, split: str) -> "Dataset":
        """Rows of train, validation, test or an extra test.

        Raises:
            ValueError: a split, a column, a label or a text is missing.
        """
        if split == "train":
            return self.train_rows
        if split not in self._split_rows:
            name = {"validation": self.validation_split, "test": self.test_split}.get(
                split, self.extra_tests.get(split)
            )
            rows = self._carved[split] if name is None else self._table(name)
            limit = self.max_validation_rows if split == "validation" else self.max_test_rows
            kind = "validation" if split == "validation" else "test"
            self._split_rows[split] = subsample(rows, limit, f"{kind} rows")
        return self._split_rows[split]

    @cached_property
    def _split_rows(self) -> "dict[str, Dataset]":
        return {}

    # --- groups ------------------------------------------------------------------------------

    def grouped(self, column: str | None) -> tuple[np.ndarray, list[str]]:
        """By what clients can differ: class numbers int64 (train rows,) and their names.

        Args:
            column: any column, or null for the label's. Numbers are rounded to whole ones.

        Raises:
            ValueError: there is no such column, or null without a label.
        """
        column = column or self.label
        rows = self.train_rows
        if column is None:
            return np.zeros(len(rows), np.int64), ["all"]
        if column not in rows.column_names:
            raise ValueError(
                f"partition.column={column} is no column of {self.folder()}, "
                f"only {', '.join(rows.column_names)}"
            )
        given = values(rows, column)
        for i, value in enumerate(given):
            if isinstance(value, float):
                given[i] = round(value) if math.isfinite(value) else None
        if None in given:
            raise ValueError(f"row {given.index(None)} of train has no {column} to partition by")
        if isinstance(given[0], list | dict):
            raise ValueError(
                f"partition.column={column} must hold texts or numbers, got {given[0]} in row 0"
            )
        found = sorted(set(given))
        index = {value: i for i, value in enumerate(found)}
        names = getattr(rows.features[column], "names", None)
        numbers = np.array([index[v] for v in given], np.int64)
        return numbers, [names[v] if names else str(v) for v in found]

    def group_numbers(self, column: str | None) -> np.ndarray:
        """Return ``grouped``'s numbers without reading unchanged tables again."""
        if self._identity is None:
            return self.grouped(column)[0]
        key = ["groups", self._identity, column]
        return cached(key, lambda: {"numbers": self.grouped(column)[0]})["numbers"]

    # --- identity ----------------------------------------------------------------------------

    @cached_property
    def _identity(self) -> str | None:
        """Settings and files, whose contents stay while size and time of change do."""
        found = marks(self.folder())
        return None if found is None else repr((self, found))

    def remembered(self, what: str, compute: Callable[[], Any]) -> Any:
        """Something about the rows, from an earlier start if they have not changed since."""
        key = (what, self._identity)
        return compute() if self._identity is None else remembered(key, compute)

    def sha256(self, split: str) -> str:
        """Over what the task reads of a split."""
        columns = [*self.columns(), *filter(None, [self.label])]
        return self.remembered(
            f"sha256 of {split}", lambda: content_sha256(self.split_rows(split), columns)
        )

    def fingerprint(self) -> dict[str, Any]:
        """Rows of each split, a sha256 over their contents, and rows that were left out."""
        return self.remembered("fingerprint", self._fingerprint)

    def _fingerprint(self) -> dict[str, Any]:
        splits = [*SPLITS, *self.extra_tests]
        return {
            "rows": {split: len(self.split_rows(split)) for split in splits},
            "sha256": hashlib.sha256("".join(map(self.sha256, splits)).encode()).hexdigest(),
            "skipped": self.skipped,
        }
