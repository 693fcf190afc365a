"""Sequence classification and regression on any table of texts."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from fedpeft.data.batching import Batch, flat
from fedpeft.data.rows import docstrings
from fedpeft.data.rows.cache import cache_folder
from fedpeft.data.rows.tables import values
from fedpeft.data.tasks.base import Outputs, Task
from fedpeft.data.tasks.classification import Classification, join
from fedpeft.metrics import NUMBERS

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Texts(Task):
    """One text a row, or a pair.

    Args:
        text: column of the text; ``text_pair`` of the second text.
        max_length: tokens; longer texts are truncated.
    """

    text: str = "text"
    text_pair: str | None = None
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"data.max_length must be >= 2, got {self.max_length}")

    def columns(self) -> list[str]:
        return [self.text] if self.text_pair is None else [self.text, self.text_pair]

    def check_columns(self, split: str, rows: "Dataset") -> None:
        super().check_columns(split, rows)
        for column in self.columns():
            kind = getattr(rows.features[column], "dtype", "lists")
            if "string" not in kind and kind != "null":  # rows of nulls are named one by one
                raise ValueError(f"column {column} of {split} must hold texts, got {kind}")

    def tokenised(self, rows: "Dataset", tokenizer: Any) -> dict[str, np.ndarray]:
        """``tokens`` and ``offsets``."""
        texts = [values(rows, column) for column in self.columns()]
        found = tokenizer(*texts, truncation=True, max_length=self.max_length)
        return flat(found["input_ids"])

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model_logits(model, batch)


def model_logits(model: nn.Module, batch: Batch) -> Tensor:
    """A text model's logits in float32."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return model(input_ids=ids, attention_mask=mask).logits.float()


@dataclass(frozen=True)
class TextClassification(Classification, Texts):
    """Sequence classification of one text or a pair."""

    auto_class = "AutoModelForSequenceClassification"

    def arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        return self.tokenised(rows, processor) | {"labels": self.class_numbers(rows)}


@dataclass(frozen=True)
class Regression(Texts):
    """A number for one text or a pair, by mean squared error; never scored by argmax."""

    metrics: list[str] = field(default_factory=lambda: ["spearman", "pearson"])

    measures = tuple(NUMBERS)
    auto_class = "AutoModelForSequenceClassification"

    @property
    def num_labels(self) -> int | None:
        return 1

    def problems(self, rows: "Dataset") -> dict[int, str]:
        found = super().problems(rows)
        for i, value in enumerate(values(rows, self.target)):
            if not isinstance(value, int | float) or not np.isfinite(value):
                found.setdefault(i, f"has {self.target} {value}, which is no finite number")
        return found

    def arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        labels = np.asarray(values(rows, self.target), np.float32)
        return self.tokenised(rows, processor) | {"labels": labels}

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(outputs.squeeze(-1), batch["labels"])

    def evaluate_batch(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return loss, prediction and label, each (B,)."""
        predicted = outputs.squeeze(-1)
        loss = (predicted - batch["labels"]) ** 2
        return {"loss": loss, "prediction": predicted, "label": batch["labels"]}

    def score(self, outputs: Outputs, rows: "Dataset", processor: Any) -> dict[str, float]:
        """Mean squared error, and ``metrics`` of the predicted numbers."""
        joined = join(outputs)
        predicted, labels = joined["prediction"].tolist(), joined["label"].tolist()
        return {"loss": float(joined["loss"].double().mean())} | self.scored(predicted, labels)


@dataclass(frozen=True)
class Docstrings(TextClassification):
    """The embedded data set: which package does this docstring come from? Ten classes.

    Args:
        rows_per_label: rows a class, 80 % of them for training.
    """

    rows_per_label: int = 1000

    def folder(self) -> str:
        return docstrings_folder(self.rows_per_label)


def docstrings_folder(rows_per_label: int) -> str:
    """Return the folder of the installed packages' docstrings, built if it is not there yet."""
    return str(docstrings.build(rows_per_label, cache_folder() / "docstrings"))
