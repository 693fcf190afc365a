"""Language modelling: predict the next token of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.data.batching import Batch, flat
from fedpeft.data.rows.tables import values
from fedpeft.data.rows.templates import keep_ends, prompt_tokens
from fedpeft.data.tasks.base import Outputs
from fedpeft.data.tasks.text import DocstringsRows, Texts, model_logits
from fedpeft.models.heads import parted
from fedpeft.nn.token_loss import IGNORED, losses_of, token_losses

# Functions import transformers, because it takes seconds.
if TYPE_CHECKING:
    from datasets import Dataset


def token_outputs(model: nn.Module, batch: Batch, targets: Tensor) -> Tensor:
    """Return each next token's loss and the most likely token, in float32 (B, L-1, 2).

    They are 0 where nothing is predicted. No more logits are held at once than the losses need.

    Args:
        model: gives logits (B, L, V).
        batch: ``input_ids`` and ``attention_mask`` (B, L).
        targets: the tokens to predict, (B, L-1), see ``targets_of``.
    """
    parts = parted(model)
    if parts is None:
        return losses_of(model_logits(model, batch)[:, :-1], targets)
    hidden = parts.backbone(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return token_losses(parts.head, hidden[:, :-1], targets, parts.vocabulary)


def targets_of(batch: Batch) -> Tensor:
    """Return the tokens to predict, (B, L-1): ``IGNORED`` on padding and on prompts.

    Args:
        batch: ``input_ids`` and ``attention_mask`` (B, L), perhaps ``prompts`` (B,).
    """
    ignored = batch["attention_mask"] == 0
    if "prompts" in batch:
        place = ignored.new_ones(ignored.shape).cumsum(-1)  # 1, 2, ... in every row
        ignored = ignored | (place <= batch["prompts"].unsqueeze(-1))
    return batch["input_ids"].masked_fill(ignored, IGNORED)[:, 1:]


def next_token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss over the batch's predicted tokens, a scalar.

    Args:
        outputs: losses and most likely tokens, (B, L-1, 2), see ``token_outputs``.
        targets: the tokens to predict, (B, L-1), for which ``outputs`` was computed.
    """
    return outputs[..., 0].sum() / (targets != IGNORED).sum()


def token_sums(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return sums over the predicted tokens of each row: loss, correct and count, each (B,).

    Args:
        outputs: losses and most likely tokens, (B, L-1, 2), perhaps with values where
            ``targets`` is ``IGNORED``.
        targets: the tokens to predict, (B, L-1); ``IGNORED`` where nothing is predicted.
    """
    read = targets != IGNORED
    return {
        "loss": outputs[..., 0].where(read, 0).sum(-1),
        "correct": (outputs[..., 1] == targets).sum(-1),
        "count": read.sum(-1),
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

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return token_outputs(model, batch, targets_of(batch))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return next_token_loss(outputs, targets_of(batch))

    def terms(self, batch: Batch) -> int:
        """Return the number of predicted tokens."""
        return int((targets_of(batch) != IGNORED).sum())

    def evaluate_batch(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``token_sums``."""
        return token_sums(outputs, targets_of(batch))

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


def sequences(
    prompts: list[list[int]], answers: list[list[int]], max_length: int, answer_room: int
) -> dict[str, np.ndarray]:
    """Join prompts and answers, cut to ``max_length`` tokens.

    Args:
        prompts: token ids of each row.
        answers: token ids of each row.
        max_length: tokens of a joined row at most.
        answer_room: tokens that an answer keeps at least, if it has them.

    Returns:
        ``tokens`` and ``offsets``; ``prompts`` (rows,), lengths of the prompts after cutting;
        ``cut_prompt`` and ``cut_answer`` (rows,), true where one was cut.
    """
    joined, lengths, cut_prompts, cut_answers = [], [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        end = answer[: max(answer_room, max_length - len(prompt))]
        start = keep_ends(prompt, max_length - len(end))
        joined.append(start + end)
        lengths.append(len(start))
        cut_prompts.append(len(start) < len(prompt))
        cut_answers.append(len(end) < len(answer))
    return flat(joined) | {
        "prompts": np.asarray(lengths, np.int64),
        "cut_prompt": np.asarray(cut_prompts),
        "cut_answer": np.asarray(cut_answers),
    }
