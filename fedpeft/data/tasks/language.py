"""Language modelling: predict the next token of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.data.batching import Batch, flat
from fedpeft.data.rows.tables import values
from fedpeft.data.rows.templates import prompt_tokens
from fedpeft.data.tasks.base import Outputs
from fedpeft.data.tasks.text import DocstringsRows, Texts

# Functions import transformers, because it takes seconds.
if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # target of a token that is not predicted


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


def generated(
    model: nn.Module, prompts: list[Tensor], processor: Any, most: int, settings: dict[str, Any]
) -> Tensor:
    """Generate what follows each prompt, greedily unless ``settings`` say otherwise.

    Args:
        model: a causal language model; its ``generation_config`` is replaced.
        prompts: token ids of each row; they are padded on the left.
        processor: the tokenizer.
        most: number of new tokens at most.
        settings: arguments of transformers' ``generate``.

    Returns:
        Token ids (B, T), IGNORED from the end token on.
    """
    from transformers import GenerationConfig

    pad, end = processor.pad_token_id, processor.eos_token_id
    ids = nn.utils.rnn.pad_sequence(prompts, True, pad, padding_side="left")
    mask = nn.utils.rnn.pad_sequence(
        [torch.ones_like(row) for row in prompts], True, 0, padding_side="left"
    )
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": most}
    config = GenerationConfig(**(greedy | {"pad_token_id": pad, "eos_token_id": end} | settings))
    # The model's own settings, such as a repetition penalty, would fill in what is not set.
    model.generation_config = GenerationConfig()  # type: ignore[assignment]
    tokens = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    new = tokens[:, ids.shape[1] :]
    if end is not None:
        ended = (new == end).int().cumsum(-1) > 0
        new = new.masked_fill(ended, IGNORED)
    return new


def decoded(rows: Sequence[Tensor], tokenizer: Any) -> list[str]:
    """Return the texts of token ids, without those that are IGNORED."""
    ids = [row[row != IGNORED].tolist() for row in rows]
    return [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]


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

    def question_arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        """See ``Task.question_arrays``; a text is cut to its last ``max_length`` / 2 tokens."""
        texts = prompt_tokens(values(rows, self.text), processor)
        return flat([ids[-(self.max_length // 2) :] for ids in texts])

    def answer_batch(self, model: nn.Module, batch: Batch, processor: Any) -> dict[str, Tensor]:
        """See ``Task.answer_batch``; text and continuation have ``max_length`` tokens at most."""
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        prompts = [ids[mask == 1] for ids, mask in pairs]
        most = self.max_length - self.max_length // 2
        return {"generated": generated(model, prompts, processor, most, {})}

    def answered(self, outputs: dict[str, Tensor], rows: "Dataset", processor: Any) -> list[Any]:
        """See ``Task.answered``; the generated continuation."""
        return [{"text": text} for text in decoded(list(outputs["generated"]), processor)]


@dataclass(frozen=True)
class DocstringsLM(DocstringsRows, LanguageModelling):
    """Language modelling on the sentences of installed packages' docstrings."""
