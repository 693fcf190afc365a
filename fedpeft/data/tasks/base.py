"""Base of tasks: the encoding of rows, the loss, and what an evaluation measures."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fedpeft import evaluate_metrics
from fedpeft.cache import cached
from fedpeft.data.batching import Batch, Examples
from fedpeft.data.rows.cache import recipe
from fedpeft.data.rows.source import Source
from fedpeft.evaluate_metrics import title
from fedpeft.metrics import MEASURES, MODULES, measure

# Functions import datasets, because it takes seconds and cached rows do without it.
if TYPE_CHECKING:
    from datasets import Dataset

RESERVED = ("loss", "baseline")  # names of results that no metric may have
MOST_LOSS = 1e6  # nats; what is beyond says nothing
SHARE = -1.0, 1.0  # least and greatest value of ``KNOWN``
KNOWN = {*MEASURES, "token_accuracy"}
Outputs = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class Task(Source):
    """A source of rows, and what a model learns from them.

    Args:
        metrics: names of ``fedpeft.metrics``, or modules of ``evaluate`` (``/folder/my_metric``,
            ``evaluate:NAME``). The first is the headline.
        less_is_better: results of ``metrics`` of which less is better, by their names.
    """

    metrics: list[str] = field(default_factory=list)
    less_is_better: list[str] = field(default_factory=list)

    auto_class: ClassVar[str]  # class of transformers that builds the model
    measures: ClassVar[tuple[str, ...]]  # names of fedpeft.metrics that ``metrics`` may have
    takes_modules: ClassVar[bool] = True  # true if it may also have modules of evaluate
    reads_rows: ClassVar[bool] = False  # true if ``score`` reads the rows' columns
    suffixes: ClassVar[tuple[str, ...]] = ("",)  # of the names of ``metrics`` in results
    needs: ClassVar[str] = "tokenizer"  # or image_processor: encodes the rows

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.metrics:
            raise ValueError("data.metrics must name at least one, got []")
        for name in self.metrics:
            self._check_metric(name)
        names = [*map(title, self.metrics), *RESERVED]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"data.metrics gives two values the name {repeated[0]}")
        if unknown := [name for name in self.less_is_better if name not in names]:
            raise ValueError(
                f"data.less_is_better must be of {', '.join(map(title, self.metrics))}, got "
                f"{unknown[0]}"
            )

    def _check_metric(self, name: str) -> None:
        if name in self.measures:
            return
        is_text = isinstance(name, str)  # a configuration may hold a list in the list
        if is_text and self.takes_modules and evaluate_metrics.named(name) is not None:
            return evaluate_metrics.check(name)
        other = f", or {MODULES}" if self.takes_modules else ""
        raise ValueError(
            f"data.metrics of {type(self).__name__} must be of {', '.join(self.measures)}{other}, "
            f"got {name}"
        )

    @abstractmethod
    def arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        """Encode rows as the arrays of ``Examples``."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return outputs in float32, (sequences, ...) or, by token, (sequences, tokens, ...)."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""

    def terms(self, batch: Batch) -> int:
        """Return the number of terms in the mean that ``loss`` takes; the base counts rows."""
        return len(batch["row"])

    @abstractmethod
    def evaluate_batch(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return what ``score`` needs of each row, (B, ...)."""

    @abstractmethod
    def score(self, outputs: Outputs, rows: "Dataset", processor: Any) -> dict[str, float]:
        """Return the loss and the metrics of an evaluation, by name.

        Args:
            outputs: each batch's tensors from ``evaluate_batch``, and ``row`` (B,), the rows'
                positions in ``rows``.
            rows: the whole split; null unless ``reads_rows``.
            processor: the model's tokenizer or image processor.
        """

    def scored(
        self, predictions: Sequence[Any], references: Sequence[Any], suffix: str = ""
    ) -> dict[str, float]:
        """Return ``metrics`` of predictions, by name.

        Args:
            predictions: (rows,) as ``measure`` takes them.
            references: right answers (rows,) as ``measure`` takes them.
            suffix: appended to each name.
        """
        return {
            title(m) + suffix: measure(m, predictions, references, self.num_labels)
            for m in self.metrics
        }

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Least and greatest value of all that an evaluation may give, by name.

        The server leaves out of a client's reply what has no range here.
        """
        metrics = {
            title(metric) + suffix: SHARE if metric in KNOWN else (-math.inf, math.inf)
            for metric in self.metrics
            for suffix in self.suffixes
        }
        other = {"loss": (0.0, MOST_LOSS), "token_accuracy": SHARE}
        return other | metrics | {"baseline": metrics[self.headline]}

    def notes_on(self, split: str) -> list[str]:
        """Return sentences to read before a model is measured on a split."""
        return []

    @property
    def label_names(self) -> list[str] | None:
        """Class names by number; null if the task has no classes."""
        return None

    @property
    def num_labels(self) -> int | None:
        """Number of outputs of the model's head; null if the task needs no head."""
        return None

    @property
    def selects(self) -> tuple[str, int]:
        """Name of the result that chooses the best round, and 1 if more is better, -1 if less."""
        name = title(self.metrics[0])
        return name, self.sign(name)

    def sign(self, name: str) -> int:
        """Return 1 if more of a result is better, -1 if less, by its name in an evaluation.

        The baseline is a value of the headline, and has its sign.
        """
        if name == "baseline":
            name = self.headline
        less = {metric + suffix for metric in self.less_is_better for suffix in self.suffixes}
        return -1 if name in less | {"loss"} else 1

    @property
    def headline(self) -> str:
        """Name of the result by which methods are compared."""
        return title(self.metrics[0])

    def generates(self, last: bool) -> bool:
        """Return true if an evaluation also generates text.

        Args:
            last: true in the run's last evaluation.
        """
        return False

    def generate_batch(self, model: nn.Module, batch: Batch, processor: Any) -> dict[str, Tensor]:
        """Return the tensors that ``score_generated`` needs, (B, ...); see ``generates``.

        Args:
            model: the model in evaluation mode.
            batch: B rows, as ``arrays`` made them.
            processor: the model's tokenizer or image processor.

        Raises:
            ValueError: the task generates no text.
        """
        raise ValueError(f"{type(self).__name__} generates no text")

    def score_generated(
        self, outputs: Outputs, rows: "Dataset", processor: Any
    ) -> tuple[dict[str, float], list[dict[str, str]]]:
        """Return the metrics of generated texts, by name, and some of these texts to save.

        Args:
            outputs: each batch's tensors from ``generate_batch``, and ``row`` (B,), the rows'
                positions in ``rows``.
            rows: the whole split; null unless ``reads_rows``.
            processor: the model's tokenizer or image processor.

        Raises:
            ValueError: the task generates no text.
        """
        raise ValueError(f"{type(self).__name__} generates no text")

    def longest(self, examples: Examples) -> tuple[int, int]:
        """Return the position of the row of which a model reads most tokens, and their number."""
        row = int(examples.lengths.argmax())
        return row, int(examples.lengths[row])

    # --- answers to questions without a label --------------------------------------------------

    def asked(self) -> list[str]:
        """Return the columns of a question, which are ``columns()`` without the answer's."""
        return self.columns()

    def question_rows(self, entries: list[dict[str, Any]]) -> "Dataset":
        """Return questions, each with all columns of ``asked``, as rows."""
        from datasets import Dataset

        return Dataset.from_list([{name: e[name] for name in self.asked()} for e in entries])

    def question_arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        """Encode questions as the arrays of ``Examples``.

        Raises:
            ValueError: the task answers no questions.
        """
        raise ValueError(f"{type(self).__name__} answers no questions")

    def answer_batch(self, model: nn.Module, batch: Batch, processor: Any) -> dict[str, Tensor]:
        """Return the tensors that ``answered`` needs, (B, ...).

        Args:
            model: the model in evaluation mode.
            batch: B rows, as ``arrays`` made them.
            processor: the model's tokenizer or image processor.
        """
        return {"outputs": self.forward(model, batch)}

    def answered(self, outputs: dict[str, Tensor], rows: "Dataset", processor: Any) -> list[Any]:
        """Return an answer to each question of a batch, as JSON has it.

        Args:
            outputs: one batch's tensors from ``answer_batch``.
            rows: the batch's questions.
            processor: the model's tokenizer or image processor.

        Raises:
            ValueError: the task answers no questions.
        """
        raise ValueError(f"{type(self).__name__} answers no questions")

    def baseline(self, train: np.ndarray, rows: np.ndarray) -> float | None:
        """Return the headline of a constant answer; null if the task has no such answer.

        Args:
            train: labels of training rows, from which the answer is chosen.
            rows: labels of the rows to measure.
        """
        return None

    def encode(self, split: str, processor: Any) -> Examples:
        """Return a split's rows, encoded once for all processes and starts.

        Modules of ``metrics`` are loaded first, so that their errors come before training.
        """
        for name in self.metrics:
            if name not in self.measures:
                evaluate_metrics.load(name)
        arrays = cached(
            [self._recipe(), recipe(processor), self.sha256(split)],
            lambda: self.arrays(self.split_rows(split), processor),
        )
        return Examples.whole(arrays, split, getattr(processor, "pad_token_id", None) or 0)

    def _recipe(self) -> str:
        """Return the class and the fields that decide how rows are encoded, for the cache.

        Fields of ``Task`` that say where rows come from are left out, because the cache's key has a
        hash of the rows.
        """
        source = {f.name for f in fields(Task)} - {"label"}
        encoding = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in source}
        return f"{type(self).__module__}.{type(self).__qualname__} {encoding}"
