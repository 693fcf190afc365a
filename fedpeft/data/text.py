"""Text tasks: sequence classification and language modelling on any table of texts."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.data.batching import Batch, Examples
from fedpeft.seeding import generator

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")


def cache_folder() -> Path:
    """Where built data sets stand: $FEDPEFT_CACHE, else ~/.cache/fedpeft."""
    return Path(os.environ.get("FEDPEFT_CACHE") or Path.home() / ".cache" / "fedpeft")


@dataclass(frozen=True)
class TextClassification:
    """Sequence classification of one text or a pair.

    Args:
        path: a folder that ``datasets.load_dataset`` reads (parquet, CSV, JSON lines), or a hub
            name.
        subset: the hub data set's configuration.
        revision: the hub data set's commit or tag.
        text: column of the text; ``text_pair`` of the second text.
        label: column of the label.
        labels: class names in order; taken from the data if empty.
        max_length: tokens; longer texts are truncated.
        test_split: the file or hub split that serves as test.
        validation_split: likewise; if null, ``validation_fraction`` of train is set aside.
        max_validation_rows: at most so many rows, drawn by a fixed seed; null for all.
        max_test_rows: likewise.
    """

    path: str | None = None
    subset: str | None = None
    revision: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: list[str] = field(default_factory=list)
    max_length: int = 128
    train_split: str = "train"
    validation_split: str | None = "validation"
    test_split: str = "test"
    validation_fraction: float = 0.1
    max_validation_rows: int | None = None
    max_test_rows: int | None = None

    auto_class = "AutoModelForSequenceClassification"
    metric = "accuracy"

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"data.max_length must be >= 2, got {self.max_length}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction must be in (0, 1), got {self.validation_fraction}"
            )

    def folder(self) -> str:
        """What is given to ``load_dataset``.

        Raises:
            ValueError: no path is set.
        """
        if self.path is None:
            raise ValueError("data.path is not set: give a folder of tables or a hub name")
        return self.path

    @cached_property
    def _tables(self) -> "dict[str, Dataset]":
        from fedpeft.data.tables import load_tables

        return load_tables(self.folder(), self.subset, self.revision)

    def _table(self, split: str) -> "Dataset":
        if split not in self._tables:
            raise ValueError(
                f"data set {self.folder()} has no split {split}, only {', '.join(self._tables)}"
            )
        return self._tables[split]

    @cached_property
    def _carved(self) -> "tuple[Dataset, Dataset | None]":
        """Train, and what is set aside of it to validate."""
        train = self._table(self.train_split)
        if self.validation_split is not None:
            return train, None
        rows = generator(0, "validation split").permutation(len(train))
        cut = math.ceil(len(train) * self.validation_fraction)
        return train.select(sorted(rows[cut:])), train.select(sorted(rows[:cut]))

    @cached_property
    def train_rows(self) -> "Dataset":
        """Rows to train on, checked; a client with a folder of its own needs no other split."""
        return self._checked("train", self._carved[0])

    @cached_property
    def splits(self) -> "dict[str, Dataset]":
        """Rows of train, validation and test, checked.

        Raises:
            ValueError: a split, a column, a label or a text is missing.
        """
        from fedpeft.data.tables import subsample

        validation = self._carved[1]
        if validation is None:
            validation = self._table(str(self.validation_split))
        validation = subsample(validation, self.max_validation_rows, "validation rows")
        test = subsample(self._table(self.test_split), self.max_test_rows, "test rows")
        return {
            "train": self.train_rows,
            "validation": self._checked("validation", validation),
            "test": self._checked("test", test),
        }

    def _checked(self, split: str, rows: "Dataset") -> "Dataset":
        for column in filter(None, (self.text, self.text_pair, self.label)):
            if column not in rows.column_names:
                raise ValueError(
                    f"data set {self.folder()} has no column {column} in {split}, "
                    f"only {', '.join(rows.column_names)}"
                )
        if len(rows) == 0:
            raise ValueError(f"split {split} of data set {self.folder()} has no rows")
        empty = [i for i, text in enumerate(rows[self.text]) if not text]
        if empty:
            raise ValueError(f"row {empty[0]} of {split} has an empty {self.text}")
        return rows

    @cached_property
    def label_names(self) -> list[str]:
        """Class names by number: ``labels``, the column's own names, or its sorted values."""
        if self.labels:
            return list(self.labels)
        column = self.train_rows.features[self.label]
        if getattr(column, "names", None):
            return list(column.names)
        return [str(value) for value in sorted(set(self.train_rows[self.label]))]

    @property
    def num_labels(self) -> int | None:
        """Classes for the model's head."""
        return len(self.label_names)

    def class_numbers(self, rows: "Dataset") -> np.ndarray:
        """Labels as int64 (rows,).

        Raises:
            ValueError: a label is not one of ``label_names``.
        """
        values = np.asarray(rows[self.label])
        named = getattr(rows.features[self.label], "names", None)
        digits = all(name.removeprefix("-").isdigit() for name in self.label_names)
        if np.issubdtype(values.dtype, np.integer) and (named or not digits):
            wrong = np.flatnonzero((values < 0) | (values >= len(self.label_names)))
            numbers = values.astype(np.int64)
        else:  # names, or numbers that are names themselves, such as ratings from 1 to 5
            index = {name: i for i, name in enumerate(self.label_names)}
            numbers = np.array([index.get(str(value), -1) for value in values], np.int64)
            wrong = np.flatnonzero(numbers < 0)
        if len(wrong):
            raise ValueError(
                f"row {wrong[0]} has label {values[wrong[0]]}, which is none of the "
                f"{len(self.label_names)} labels {', '.join(self.label_names)}"
            )
        return numbers

    def fingerprint(self) -> dict[str, Any]:
        """Rows of each split, and a sha256 over their texts and labels."""
        digest = hashlib.sha256()
        for split in SPLITS:
            rows = self.splits[split]
            columns = [rows[c] for c in filter(None, (self.text, self.text_pair, self.label))]
            for row in zip(*columns, strict=True):
                digest.update(repr((split, *row)).encode())
        sizes = {split: len(self.splits[split]) for split in SPLITS}
        return {"rows": sizes, "sha256": digest.hexdigest()}

    def encode(self, rows: "Dataset", tokenizer: Any) -> Examples:
        """Tokenises rows."""
        texts: list[list[str]] = [list(rows[self.text])]
        if self.text_pair is not None:
            texts.append(list(rows[self.text_pair]))
        encoded = tokenizer(*texts, truncation=True, max_length=self.max_length)
        labels = self.class_numbers(rows)
        return Examples.from_lists(encoded["input_ids"], labels, tokenizer.pad_token_id)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch, a scalar."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits.float(), batch["labels"])

    def evaluate_batch(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What ``metrics`` needs of each row: loss (B,), prediction (B,), label (B,)."""
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.float()
        return {
            "loss": nn.functional.cross_entropy(logits, batch["labels"], reduction="none"),
            "prediction": logits.argmax(-1),
            "label": batch["labels"],
        }

    def metrics(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Loss, accuracy and macro F1 over batches of ``evaluate_batch``."""
        from sklearn.metrics import accuracy_score, f1_score

        joined = {key: torch.cat([row[key] for row in rows]).cpu() for key in rows[0]}
        label, prediction = joined["label"].numpy(), joined["prediction"].numpy()
        return {
            "loss": float(joined["loss"].double().mean()),
            "accuracy": float(accuracy_score(label, prediction)),
            "f1_macro": float(
                f1_score(label, prediction, average="macro", zero_division=0)  # type: ignore[arg-type]
            ),
        }

    def baseline(self, train: np.ndarray, rows: np.ndarray) -> float | None:
        """Accuracy on labels ``rows`` of always answering the commonest label of ``train``."""
        return float((rows == np.bincount(train).argmax()).mean())


@dataclass(frozen=True)
class Docstrings(TextClassification):
    """The embedded data set: which package does this docstring come from? Ten classes.

    Args:
        rows_per_label: rows a class, 80 % of them for training.
    """

    rows_per_label: int = 1000

    def folder(self) -> str:
        from fedpeft.data import docstrings

        return str(docstrings.build(self.rows_per_label, cache_folder() / "docstrings"))
