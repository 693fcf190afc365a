"""Sequence classification and regression on any table of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from fedpeft.cache import cache_folder
from fedpeft.data.batching import Batch, flat
from fedpeft.data.rows import docstrings
from fedpeft.data.rows.source import Source
from fedpeft.data.rows.tables import kind, values
from fedpeft.data.rows.text_files import TextFormat
from fedpeft.data.tasks.base import Outputs, Task
from fedpeft.data.tasks.classification import Classification, join
from fedpeft.metrics import NUMBERS

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Texts(Task):
    """Reads one text a row, or a pair.

    Args:
        text: column of the text.
        text_pair: column of the second text of a pair; null for one text.
        max_length: tokens of a row at most; longer texts are truncated.
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
            if "string" not in kind and kind != "null":  # ``problems`` names rows of nulls
                raise ValueError(f"column {column} of {split} must hold texts, got {kind}")

    def tokenised(self, rows: "Dataset", tokenizer: Any) -> dict[str, np.ndarray]:
        """Return the texts as ``token_arrays``."""
        texts = [values(rows, column) for column in self.columns()]
        return token_arrays(texts, tokenizer, self.max_length)

    def question_arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        return self.tokenised(rows, processor)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model_logits(model, batch)


def token_arrays(
    texts: Sequence[Sequence[str]], tokenizer: Any, max_length: int
) -> dict[str, np.ndarray]:
    """Return texts or pairs of texts as the arrays ``tokens`` and ``offsets``.

    Where some were longer than ``max_length``, ``cut_text`` bool (sequences,) tells which.

    Args:
        texts: the texts, or the first and the second ones of pairs.
        tokenizer: the model's.
        max_length: tokens of a sequence at most; longer ones are truncated.
    """
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    cut = np.array([bool(each.overflowing) for each in encoded.encodings or ()])
    return flat(encoded["input_ids"]) | ({"cut_text": cut} if cut.any() else {})


def model_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return a text model's logits in float32."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return model(input_ids=ids, attention_mask=mask).logits.float()


@dataclass(frozen=True)
class TextClassification(Classification, Texts):
    """Sequence classification of one text or a pair."""

    auto_class = "AutoModelForSequenceClassification"

    def arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        return self.tokenised(rows, processor) | {"labels": self.class_numbers(rows)}

    def _notes(self) -> list[str]:
        """See ``Source.notes``; a column of numbers is perhaps no label."""
        rows, count = len(self._table(self.train_split)), len(self.label_names)
        if self.labels or count <= max(20, rows / 2):
            return super()._notes()
        return [
            *super()._notes(),
            f"column {self.target} has {count} labels in {rows} rows: to learn a number, set "
            "data._target_=fedpeft.data.tasks.text.Regression and data.metrics=[spearman,pearson]",
        ]


@dataclass(frozen=True)
class Regression(Texts):
    """Predicts a number for one text or a pair; the loss is the mean squared error."""

    metrics: list[str] = field(default_factory=lambda: ["spearman", "pearson"])

    measures = tuple(NUMBERS)
    auto_class = "AutoModelForSequenceClassification"

    @property
    def num_labels(self) -> int | None:
        return 1

    @property
    def _format(self) -> TextFormat:
        return replace(super()._format, numbers=(self.target,))

    def problems(self, rows: "Dataset") -> dict[int, str]:
        problems = super().problems(rows)
        for i, value in enumerate(values(rows, self.target)):
            if not isinstance(value, int | float) or not np.isfinite(value):
                problem = f"has {kind(value)} in {self.target}, must be a finite number"
                problems.setdefault(i, problem)
        return problems

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
        """See ``Task.score``; the loss is the mean over rows."""
        joined = join(outputs)
        predicted, labels = joined["prediction"].tolist(), joined["label"].tolist()
        return {"loss": float(joined["loss"].double().mean())} | self.scored(predicted, labels)

    def answered(self, outputs: dict[str, Tensor], rows: "Dataset", processor: Any) -> list[Any]:
        """See ``Task.answered``; the predicted number."""
        return [{"value": value} for value in outputs["outputs"].squeeze(-1).tolist()]


@dataclass(frozen=True)
class DocstringsRows(Source):
    """Rows of the docstrings set, which takes no ``path``; a task names it as first base.

    Args:
        rows_per_label: rows of each of ten packages, 80 % of them for training.
    """

    rows_per_label: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is not None:
            raise ValueError(
                "data.path must not be set, because this set builds its own rows, got "
                f"{self.path}: choose a set that reads a folder, such as data=table or "
                "data=instructions"
            )

    def folder(self) -> str:
        """Return the set's folder, built from the installed packages if it is not there yet."""
        return str(docstrings.build(self.rows_per_label, cache_folder() / "docstrings"))


@dataclass(frozen=True)
class Docstrings(DocstringsRows, TextClassification):
    """Classification of docstrings by the installed package that they come from, of ten."""
