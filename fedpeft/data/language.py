"""Language modelling: the next token of any table of texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fedpeft.data.batching import Batch
from fedpeft.data.text import Docstrings, TextClassification


@dataclass(frozen=True)
class LanguageModelling(TextClassification):
    """Next-token prediction on a column of texts; ``label`` only serves to partition them."""

    auto_class = "AutoModelForCausalLM"
    metric = "token_accuracy"

    @property
    def num_labels(self) -> int | None:
        return None

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, L-1, V) and their targets (B, L-1), -100 on padding."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        return logits.float(), targets

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = self._logits(model, batch)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def evaluate_batch(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over the tokens of each row: loss, correct, count (B,)."""
        logits, targets = self._logits(model, batch)
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return {
            "loss": loss.sum(-1),
            "correct": (logits.argmax(-1) == targets).sum(-1),
            "count": (targets != -100).sum(-1),
        }

    def metrics(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss and share of right next tokens (teacher-forced) over all tokens."""
        total = {key: float(sum(row[key].double().sum() for row in rows)) for key in rows[0]}
        return {
            "loss": total["loss"] / total["count"],
            "token_accuracy": total["correct"] / total["count"],
        }

    def baseline(self, train: np.ndarray, rows: np.ndarray) -> float | None:
        """None: there is no majority to beat."""
        return None


@dataclass(frozen=True)
class DocstringsLM(Docstrings, LanguageModelling):
    """Language modelling of the embedded data set's sentences."""
