"""What a model learns from rows: their encoding, the loss, and what is measured."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fedpeft import evaluate_metrics
from fedpeft.data.batching import Batch, Examples
from fedpeft.data.rows.cache import cached, recipe
from fedpeft.data.rows.source import Source
from fedpeft.evaluate_metrics import title
from fedpeft.metrics import MODULES, measure

if TYPE_CHECKING:
    from datasets import Dataset

RESERVED = ("loss", "baseline")  # names of values that no metric gives
Outputs = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class Task(Source):
    """A kind of task: a source of rows, and what a model learns from them.

    Args:
        metrics: names of ``fedpeft.metrics``, or modules of ``evaluate`` (``/folder/my_metric``,
            ``evaluate:NAME``); the first is the headline, and more of it must be better.
    """

    metrics: list[str] = field(default_factory=list)

    auto_class: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]  # what of ours ``metrics`` can name
    takes_modules: ClassVar[bool] = True  # whether it can also name modules of evaluate
    reads_rows: ClassVar[bool] = False  # whether ``score`` needs more of rows than their arrays
    needs: ClassVar[str] = "tokenizer"  # or image_processor: the model's part that encodes

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.metrics:
            raise ValueError("data.metrics must name at least one, got []")
        for name in self.metrics:
            self._check_metric(name)
        names = [*map(title, self.metrics), *RESERVED]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"data.metrics gives two values the name {twice[0]}")

    def _check_metric(self, name: str) -> None:
        if name in self.measures:
            return
        named = isinstance(name, str)  # a list in the list reaches here
        if named and self.takes_modules and evaluate_metrics.named(name) is not None:
            return evaluate_metrics.check(name)
        other = f", or {MODULES}" if self.takes_modules else ""
        raise ValueError(
            f"data.metrics of {type(self).__name__} must be of {', '.join(self.measures)}{other}, "
            f"got {name}"
        )

    @abstractmethod
    def arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        """Rows encoded as the arrays of ``Examples``."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's outputs in float32, (sequences, ...) or (sequences, L, V)."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""

    def terms(self, batch: Batch) -> int:
        """Return over how many terms ``loss`` takes the mean: rows, if no task says otherwise."""
        return len(batch["row"])

    @abstractmethod
    def evaluate_batch(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return what ``score`` needs of each row, (B, ...)."""

    @abstractmethod
    def score(self, outputs: Outputs, rows: "Dataset", processor: Any) -> dict[str, float]:
        """Loss and metrics over batches of ``evaluate_batch``, whose ``row`` numbers ``rows``."""

    def scored(
        self, predictions: Sequence[Any], references: Sequence[Any], suffix: str = ""
    ) -> dict[str, float]:
        """``metrics`` of predictions.

        Args:
            predictions: (rows,) as ``measure`` takes them; ``references`` too.
            references: what is right.
            suffix: put behind each name.

        Returns:
            Values by name.
        """
        return {title(m) + suffix: measure(m, predictions, references) for m in self.metrics}

    @property
    def num_labels(self) -> int | None:
        """Outputs of the model's head, if the task needs one."""
        return None

    @property
    def selects(self) -> tuple[str, int]:
        """The measure that chooses the best round, and 1 if more is better, -1 if less."""
        return title(self.metrics[0]), 1

    @property
    def headline(self) -> str:
        """The measure by which methods are compared."""
        return title(self.metrics[0])

    def generates(self, last: bool) -> bool:
        """Whether a round's evaluation also generates text.

        A task that does has ``generate_batch`` and ``score_generated`` too: see
        ``InstructionTuning``.
        """
        return False

    def baseline(self, train: np.ndarray, rows: np.ndarray) -> float | None:
        """The headline measure of a constant answer, given the labels; None if there is none."""
        return None

    def encode(self, split: str, processor: Any) -> Examples:
        """A split's rows, encoded once for all processes and starts; loads ``metrics`` too."""
        for name in self.metrics:
            if name not in self.measures:
                evaluate_metrics.load(name)
        arrays = cached(
            [self._recipe(), recipe(processor), self.sha256(split)],
            lambda: self.arrays(self.split_rows(split), processor),
        )
        return Examples.whole(arrays, split, getattr(processor, "pad_token_id", None) or 0)

    def _recipe(self) -> str:
        """The class and those of its fields that say how, not where from."""
        source = {f.name for f in fields(Task)} - {"label"}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in source}
        return f"{type(self).__module__}.{type(self).__qualname__} {own}"
