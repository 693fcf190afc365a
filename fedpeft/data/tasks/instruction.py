"""Instruction tuning and question answering: a prompt, an answer, and text that is generated."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.data.batching import Batch, flat
from fedpeft.data.rows.tables import values
from fedpeft.data.rows.templates import (
    chat_prompts,
    keep_ends,
    prompt_tokens,
    rendered,
    template_columns,
)
from fedpeft.data.tasks.base import Outputs, Task
from fedpeft.data.tasks.language import (
    next_token_loss,
    next_tokens,
    targets_of,
    token_means,
    token_sums,
)
from fedpeft.data.tasks.text import model_logits
from fedpeft.evaluate_metrics import title
from fedpeft.metrics import TEXTS

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # a target that is not predicted


@dataclass(frozen=True)
class InstructionTuning(Task):
    """A causal language model learns to answer; ``label`` only serves to partition the rows.

    The prompt goes through the model's chat or instruction template. Where prompt and answer are
    longer than ``max_length``, the answer keeps up to ``max_answer_length`` tokens and the prompt
    loses its middle, so that the instruction, the question and a beginning of the answer always
    stay. The summary counts both cuts.

    Metrics have two forms: ``..._generated`` compares real generation with the whole reference;
    ``..._teacher_forced`` compares the most likely next tokens, each given the right ones before
    it, with the (cut) reference, as some published code does.

    Args:
        prompt: Jinja template over the columns.
        answer: column of the answer.
        max_length: tokens of prompt and answer together, its end included.
        max_answer_length: tokens that the answer keeps at least, if it has them, and that
            generation makes at the most; null for half of ``max_length``.
        loss_on: ``answer``, or ``all`` for the prompt's tokens too.
        generate: on test rows after the ``last`` round, ``always`` (also when validating, and
            the clients' own), or ``never``.
        generation: arguments of transformers' ``generate``, such as ``num_beams``; greedy if empty.
    """

    prompt: str = "{{ instruction }}"
    answer: str = "response"
    max_length: int = 512
    max_answer_length: int | None = None
    loss_on: str = "answer"
    generate: str = "last"
    generation: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=lambda: ["rouge_l", "bleu4"])

    measures = tuple(TEXTS)
    reads_rows = True
    auto_class = "AutoModelForCausalLM"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 4:
            raise ValueError(f"data.max_length must be >= 4, got {self.max_length}")
        if not 1 <= self.answer_room < self.max_length:
            raise ValueError(
                f"data.max_answer_length must be from 1 to data.max_length - 1 = "
                f"{self.max_length - 1}, got {self.max_answer_length}"
            )
        if self.generation:
            from transformers import GenerationConfig

            if wrong := [key for key in self.generation if not hasattr(GenerationConfig(), key)]:
                raise ValueError(f"data.generation.{wrong[0]} is no argument of generate")
        if self.loss_on not in ("answer", "all"):
            raise ValueError(f"data.loss_on must be answer or all, got {self.loss_on}")
        if self.generate not in ("last", "always", "never"):
            raise ValueError(f"data.generate must be last, always or never, got {self.generate}")

    @property
    def answer_room(self) -> int:
        """Tokens that an answer keeps at least."""
        return self.max_length // 2 if self.max_answer_length is None else self.max_answer_length

    @property
    def selects(self) -> tuple[str, int]:
        return "loss", -1

    @property
    def headline(self) -> str:
        form = "teacher_forced" if self.generate == "never" else "generated"
        return f"{title(self.metrics[0])}_{form}"

    def generates(self, last: bool) -> bool:
        return self.generate == "always" or (last and self.generate == "last")

    def columns(self) -> list[str]:
        return [*template_columns(self.prompt), self.answer]

    def problems(self, rows: "Dataset") -> dict[int, str]:
        """An empty answer, or a prompt that comes out empty: single columns may be."""
        found: dict[int, str] = {}
        for i, answer in enumerate(self.references(rows)):
            if not any(text.strip() for text in answer):
                found[i] = f"has an empty {self.answer}"
        for i, prompt in enumerate(rendered(self.prompt, rows)):
            if not prompt.strip():
                found.setdefault(i, f"has an empty prompt {self.prompt}")
        return found

    def references(self, rows: "Dataset") -> list[list[str]]:
        """The right answers of each row, at least one."""
        return [["" if text is None else str(text)] for text in values(rows, self.answer)]

    def arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        prompts = prompt_tokens(chat_prompts(rendered(self.prompt, rows), processor), processor)
        end = [] if processor.eos_token_id is None else [processor.eos_token_id]
        texts = [answers[0] for answers in self.references(rows)]
        answers = [[*ids, *end] for ids in processor(texts, add_special_tokens=False)["input_ids"]]
        return sequences(prompts, answers, self.max_length, self.answer_room)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model_logits(model, batch)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return next_token_loss(outputs, self._learnt(batch))

    def terms(self, batch: Batch) -> int:
        """Return the number of predicted tokens that ``loss_on`` counts."""
        return int((targets_of(self._learnt(batch)) != IGNORED).sum())

    def _learnt(self, batch: Batch) -> Batch:
        """Return the batch, without its prompts' lengths if prompts are predicted too."""
        if self.loss_on == "answer":
            return batch
        return {key: value for key, value in batch.items() if key != "prompts"}

    def evaluate_batch(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return of the answers loss, correct, count (B,), predicted and target ids (B, L-1)."""
        logits, targets = next_tokens(outputs, batch)
        predicted = logits.argmax(-1).masked_fill(targets == IGNORED, IGNORED)
        return token_sums(logits, targets) | {"predicted": predicted, "targets": targets}

    def score(self, outputs: Outputs, rows: "Dataset", processor: Any) -> dict[str, float]:
        """Loss, token accuracy and the teacher-forced metrics."""
        predicted = decoded([ids for batch in outputs for ids in batch["predicted"]], processor)
        targets = decoded([ids for batch in outputs for ids in batch["targets"]], processor)
        return token_means(outputs) | self.scored(predicted, targets, "_teacher_forced")

    def generate_batch(self, model: nn.Module, batch: Batch, processor: Any) -> dict[str, Tensor]:
        """generated (B, T) token ids, IGNORED after the end, from prompts padded on the left."""
        from transformers import GenerationConfig

        room = self.max_length - self.answer_room  # so that prompt and new tokens fit the model
        rows = zip(batch["input_ids"], batch["prompts"].tolist(), strict=True)
        given = [ids[keep_ends(list(range(n)), room)] for ids, n in rows]
        pad = processor.pad_token_id
        ids = nn.utils.rnn.pad_sequence(given, True, pad, padding_side="left")
        mask = nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in given], True, 0, padding_side="left"
        )
        end = processor.eos_token_id
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": self.answer_room}
        config = GenerationConfig(
            **(settings | {"pad_token_id": pad, "eos_token_id": end} | self.generation)
        )
        # else the model's own, such as a repetition penalty, fills in what is not given here
        model.generation_config = GenerationConfig()  # type: ignore[assignment]
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
        new = found[:, ids.shape[1] :]
        if end is not None:
            ended = (new == end).int().cumsum(-1) > 0
            new = new.masked_fill(ended, IGNORED)
        return {"generated": new}

    def score_generated(
        self, outputs: Outputs, rows: "Dataset", processor: Any
    ) -> tuple[dict[str, float], list[dict[str, str]]]:
        """Metrics of generated text against the whole references; texts in the rows' order."""
        texts = decoded([ids for batch in outputs for ids in batch["generated"]], processor)
        order = torch.cat([batch["row"] for batch in outputs]).cpu().numpy()
        chosen = rows.select(order)
        references, prompts = self.references(chosen), rendered(self.prompt, chosen)
        found = self.scored(texts, references, "_generated")
        samples = [
            {"row": str(r), "prompt": p, "reference": a[0], "generated": t}
            for r, p, a, t in sorted(
                zip(order, prompts, references, texts, strict=True), key=lambda s: s[0]
            )
        ]
        return found, samples


@dataclass(frozen=True)
class QuestionAnswering(InstructionTuning):
    """Extractive-style answers by generation, as SQuAD's: several references, exact match and F1.

    Args:
        answer: column with ``{"text": [references]}``, a list of references, or one text. The
            first trains.
    """

    prompt: str = "{{ context }}\n\n{{ question }}"
    answer: str = "answers"
    metrics: list[str] = field(default_factory=lambda: ["token_f1", "exact_match"])

    def references(self, rows: "Dataset") -> list[list[str]]:
        found = []
        for value in values(rows, self.answer):
            texts = value.get("text") if isinstance(value, dict) else value
            found.append([texts] if isinstance(texts, str) else list(texts or []))
        return found


def sequences(
    prompts: list[list[int]], answers: list[list[int]], max_length: int, answer_room: int
) -> dict[str, np.ndarray]:
    """Prompts and answers joined and cut: tokens, offsets, prompts, and which were cut (rows,)."""
    joined, given, cut_prompts, cut_answers = [], [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        kept = answer[: max(answer_room, max_length - len(prompt))]
        start = keep_ends(prompt, max_length - len(kept))
        joined.append(start + kept)
        given.append(len(start))
        cut_prompts.append(len(start) < len(prompt))
        cut_answers.append(len(kept) < len(answer))
    return flat(joined) | {
        "prompts": np.asarray(given, np.int64),
        "cut_prompt": np.asarray(cut_prompts),
        "cut_answer": np.asarray(cut_answers),
    }


def decoded(rows: list[Tensor], tokenizer: Any) -> list[str]:
    """Texts of token ids, without those that are IGNORED."""
    ids = [row[row != IGNORED].tolist() for row in rows]
    return [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
