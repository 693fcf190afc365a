"""Classification of texts or images into named classes: labels, loss and metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.data.batching import Batch
from fedpeft.data.rows.tables import kind, values
from fedpeft.data.tasks.base import Outputs, Task
from fedpeft.metrics import LABELS, measure

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Classification(Task):
    """Predicts one of several classes for each row.

    Args:
        labels: class names in order; read from the data if empty.
    """

    labels: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=lambda: ["accuracy", "f1_macro"])

    measures = tuple(LABELS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) == 1:
            raise ValueError(f"data.labels must name two classes or more, got {self.labels[0]}")

    @property
    def label_names(self) -> list[str]:
        """Class names by number: ``labels``, the column's own names, or its sorted values.

        Raises:
            ValueError: there is only one class, or ``metrics`` has ``f1`` and there are not two.
        """
        return self._label_names

    @cached_property
    def _label_names(self) -> list[str]:
        names = list(self.labels) or self.remembered("labels", self._labels_of_data)
        if "f1" in self.metrics and len(names) != 2:
            raise ValueError(
                f"data.metrics has f1, which is F1 of the second of two classes, got {len(names)} "
                "classes: choose f1_macro or f1_weighted"
            )
        return names

    def _labels_of_data(self) -> list[str]:
        rows = self.as_given(self.train_split)
        self.check_columns(self.train_split, rows)
        names = getattr(rows.features[self.target], "names", None)
        if not names:
            names = [_name(v) for v in sorted({v for v in values(rows, self.target) if _is(v)})]
        if len(names) < 2:
            raise ValueError(
                f"column {self.target} of {self.folder()} has fewer than two labels, but "
                "classification needs two"
            )
        return list(names)

    @property
    def num_labels(self) -> int | None:
        """Number of classes."""
        return len(self.label_names)

    def class_numbers(self, rows: "Dataset") -> np.ndarray:
        """Return class numbers int64 (rows,), -1 for a label that is none of ``label_names``."""
        entries = values(rows, self.target)
        names = getattr(rows.features[self.target], "names", None)
        whole = all(isinstance(v, int) for v in entries if v is not None)
        index = {name: i for i, name in enumerate(self.label_names)}
        if whole and names and self._knows(names):
            entries = [names[v] if v is not None and 0 <= v < len(names) else None for v in entries]
        elif whole and (names or not any(str(v) in index for v in {*entries})):
            numbers = np.asarray([-1 if v is None else v for v in entries], np.int64)
            return np.where(numbers < len(self.label_names), np.maximum(numbers, -1), -1)
        # Entries are names, or numbers that are names themselves, such as ratings from 1 to 5.
        # A missing one is none of them, not even of a class called None.
        numbers = [
            index.get(str(v), index.get(_name(v), -1)) if v is not None else -1 for v in entries
        ]
        return np.array(numbers, np.int64)

    def _recipe(self) -> str:
        """See ``Task._recipe``; class names are added, because other splits get train's numbers."""
        return f"{super()._recipe()} {self.label_names}"

    def problems(self, rows: "Dataset") -> dict[int, str]:
        problems = super().problems(rows)
        entries, count = values(rows, self.target), len(self.label_names)
        alike = {_plain(name) for name in self.label_names}
        for i in np.flatnonzero(self.class_numbers(rows) < 0):
            problem = f"has {kind(entries[i])} in {self.target}, must be one of the {count} labels"
            nearly = ", and is one but for blanks or case" if _plain(entries[i]) in alike else ""
            problems.setdefault(int(i), f"{problem} of {self._known}{nearly}")
        return problems

    def _notes(self) -> list[str]:
        """See ``Source.notes``; also names labels alike, and classes that have other names."""
        numbers = self.class_numbers(self._table(self.train_split))
        counts = np.bincount(numbers, minlength=len(self.label_names)).tolist()
        alike: dict[str, list[str]] = {}
        for name, count in zip(self.label_names, counts, strict=True):
            alike.setdefault(_plain(name), []).append(f"'{name}' ({count} rows)")
        return [
            *super()._notes(),
            *dict.fromkeys(note for split in self.splits for note in self.notes_on(split)),
            *(
                f"labels of column {self.target} differ by blanks or case only: {', '.join(names)}"
                for names in alike.values()
                if len(names) > 1
            ),
        ]

    def notes_on(self, split: str) -> list[str]:
        """See ``Task.notes_on``; numbers, or other class names, that are taken in order are named.

        Numbers of ``data.labels`` are as its user wants them.
        """
        rows = self.tables.get(self._table_name(split) or self.train_split)
        column = rows and rows.features.get(self.target)
        names = getattr(column, "names", None)
        if names and not self._knows(names):
            has, pairs = "other class names than", zip(names, self.label_names, strict=False)
        elif not names and not self.labels and rows and self._has_places(rows):
            has, pairs = "numbers in place of the names of", enumerate(self.label_names)
        else:
            return []
        counted = ", ".join(f"{name} counts as {label}" for name, label in pairs)
        return [
            f"column {self.target} has {has} {self._known}, so they are taken in their order: "
            f"{counted}"
        ]

    def _has_places(self, rows: "Dataset") -> bool:
        """Tell whether the column has whole numbers of which none is a class's name."""
        numeric = str(rows.features[self.target].dtype).startswith(("int", "uint"))
        return numeric and not {*map(str, values(rows, self.target))} & {*self.label_names}

    def _knows(self, names: Sequence[str]) -> bool:
        """Tell whether a column's class names are those of the task, in any order.

        A table may lack some of the classes, and the task may use a part of a table's.
        """
        return {*self.label_names} <= {*names} or {*names} <= {*self.label_names}

    @property
    def _known(self) -> str:
        """Name of what gives the class names, for errors."""
        return "data.labels" if self.labels else self.train_split

    def grouped(self, column: str | None) -> tuple[np.ndarray, list[str]]:
        if column in (None, self.target):
            return self.class_numbers(self.train_rows), self.label_names
        return super().grouped(column)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["labels"])

    def evaluate_batch(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return loss, prediction and label, each (B,)."""
        return {
            "loss": nn.functional.cross_entropy(outputs, batch["labels"], reduction="none"),
            "prediction": outputs.argmax(-1),
            "label": batch["labels"],
        }

    def score(self, outputs: Outputs, rows: "Dataset", processor: Any) -> dict[str, float]:
        """See ``Task.score``; the loss is the mean over rows."""
        joined = join(outputs)
        predicted, labels = joined["prediction"].tolist(), joined["label"].tolist()
        return {"loss": float(joined["loss"].double().mean())} | self.scored(predicted, labels)

    def answered(self, outputs: dict[str, Tensor], rows: "Dataset", processor: Any) -> list[Any]:
        """See ``Task.answered``; the class, and the probabilities of all."""
        answers = []
        for shares in outputs["outputs"].softmax(-1).tolist():
            probabilities = dict(zip(self.label_names, shares, strict=True))
            label = max(probabilities, key=probabilities.__getitem__)
            answers.append({"label": label, "probabilities": probabilities})
        return answers

    def baseline(self, train: np.ndarray, rows: np.ndarray) -> float | None:
        """See ``Task.baseline``; the constant answer is the commonest label of ``train``."""
        commonest = int(np.bincount(train).argmax())
        constant = [commonest] * len(rows)
        return measure(self.metrics[0], constant, rows.tolist(), self.num_labels)


def _is(value: Any) -> bool:
    """Tell whether a cell holds a label; a gap among numbers is no number."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _name(value: Any) -> str:
    """Return a label's name; a column of whole numbers with a gap is read as fractional ones."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _plain(label: Any) -> str:
    """Return a label's text in lower case and with single blanks."""
    return " ".join(str(label).split()).casefold()


def join(outputs: Outputs) -> dict[str, Tensor]:
    """Concatenate the outputs of batches, on the CPU."""
    return {key: torch.cat([batch[key] for batch in outputs]).cpu() for key in outputs[0]}
