"""Language modelling: predict the next token of texts."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from fedpeft.data.batching import Batch
from fedpeft.data.tasks.base import Outputs
from fedpeft.data.tasks.text import DocstringsRows, Texts

if TYPE_CHECKING:
    from datasets import Dataset


def next_tokens(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits (B, L-1, V) and their targets (B, L-1): -100 on padding and on prompts.

    Args:
        logits: of all tokens, (B, L, V).
        batch: ``input_ids`` and ``attention_mask`` (B, L), perhaps ``prompts`` (B,).
    """
    return logits[:, :-1], targets_of(batch)


def targets_of(batch: Batch) -> Tensor:
    """Return the tokens to predict, (B, L-1): -100 on padding and on prompts."""
    ignored = batch["attention_mask"] == 0
    if "prompts" in batch:
        place = ignored.new_ones(ignored.shape).cumsum(-1)  # 1, 2, ... in every row
        ignored = ignored | (place <= batch["prompts"].unsqueeze(-1))
    return batch["input_ids"].masked_fill(ignored, -100)[:, 1:]


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the batch's predicted tokens, a scalar."""
    logits, targets = next_tokens(logits, batch)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def token_sums(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return sums over the predicted tokens of each row: loss, correct and count, each (B,).

    Args:
        logits: (B, L-1, V).
        targets: (B, L-1), -100 where nothing is predicted.
    """
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return {
        "loss": loss.sum(-1),
        "correct": (logits.argmax(-1) == targets).sum(-1),
        "count": (targets != -100).sum(-1),
    }


def token_means(outputs: Outputs) -> dict[str, float]:
    """Return the mean loss and the share of right tokens (teacher-forced) over predicted tokens."""
    total = {
        key: float(sum(batch[key].double().sum() for batch in outputs))
        for key in ("loss", "correct", "count")
    }
    return {
        "loss": total["loss"] / total["count"],
        "token_accuracy": total["correct"] / total["count"],
    }


@dataclass(frozen=True)
class LanguageModelling(Texts):
    """Predicts the next token of texts; ``label`` only serves to partition the rows."""

    metrics: list[str] = field(default_factory=lambda: ["token_accuracy"])

    measures = ("token_accuracy",)
    takes_modules = False  # because it keeps sums over tokens, not the tokens
    auto_class = "AutoModelForCausalLM"

    def arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        return self.tokenised(rows, processor)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return next_token_loss(outputs, batch)

    def terms(self, batch: Batch) -> int:
        """Return the number of predicted tokens."""
        return int((targets_of(batch) != -100).sum())

    def evaluate_batch(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``token_sums``."""
        return token_sums(*next_tokens(outputs, batch))

    def score(self, outputs: Outputs, rows: "Dataset", processor: Any) -> dict[str, float]:
        """See ``Task.score``; returns ``token_means``."""
        return token_means(outputs)


@dataclass(frozen=True)
class DocstringsLM(DocstringsRows, LanguageModelling):
    """Language modelling on the sentences of installed packages' docstrings."""
