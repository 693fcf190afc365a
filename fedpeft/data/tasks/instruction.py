"""Instruction tuning and question answering: prompts, answers and generated text."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.data.batching import Batch, Examples
from fedpeft.data.rows.conversations import (
    Conversation,
    as_text,
    divided,
    problem,
    said_by_user,
)
from fedpeft.data.rows.tables import kind, values
from fedpeft.data.rows.templates import (
    chat_prompts,
    check_prompt,
    keep_ends,
    prompt_tokens,
    rendered,
    template_columns,
)
from fedpeft.data.tasks.base import Outputs, Task
from fedpeft.data.tasks.language import (
    IGNORED,
    decoded,
    generated,
    next_token_loss,
    sequences,
    targets_of,
    token_means,
    token_outputs,
    token_sums,
)
from fedpeft.data.tasks.text import DocstringsRows
from fedpeft.evaluate_metrics import title
from fedpeft.metrics import TEXTS
from fedpeft.words import beyond_latin

# Functions import transformers, because it takes seconds.
if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_WORDS = ("rouge_l", "bleu4", "token_f1")  # metrics that compare words


@dataclass(frozen=True)
class InstructionTuning(Task):
    """Teaches a causal language model to answer; ``label`` only serves to partition the rows.

    The prompt goes through the model's chat or instruction template. If prompt and answer together
    are longer than ``max_length``, the answer keeps ``max_answer_length`` tokens or more, and the
    prompt loses its middle, so that the instruction, the question and the beginning of the answer
    always stay. The summary counts both cuts.

    Metrics have two forms. ``..._generated`` compares generated text with the whole reference, or
    with its beginning (``cut_references``).
    ``..._teacher_forced`` compares the most likely next tokens, each predicted after the right
    ones, with the (cut) reference, as some published code does.

    Args:
        prompt: Jinja template over the columns.
        answer: column of the answer.
        messages: column of conversations, in place of prompt and answer: lists of ``{role,
            content}``. The assistant's last message is the answer, and those before are the prompt.
        max_length: tokens of prompt and answer together at most, the end token included.
        max_answer_length: tokens that the answer keeps at least, if it has them, and that are
            generated at most; null for half of ``max_length``.
        loss_on: ``answer``, or ``all`` for the prompt's tokens too.
        generate: ``last`` generates for test rows after the last round, the server's and the
            clients' own; ``always`` in every evaluation, also for validation rows; ``never`` not
            at all.
        generation: arguments of transformers' ``generate``, such as ``num_beams``; greedy if empty.
            ``max_new_tokens`` sets the length, and ``max_length`` is refused.
        cut_references: compare generated text with as many tokens of the reference as may be
            generated. Otherwise a long reference lowers the measures, because no generated text can
            be as long.
    """

    prompt: str = "{{ instruction }}"
    answer: str = "response"
    messages: str | None = None
    max_length: int = 512
    max_answer_length: int | None = None
    loss_on: str = "answer"
    generate: str = "last"
    generation: dict[str, Any] = field(default_factory=dict)
    cut_references: bool = False
    metrics: list[str] = field(default_factory=lambda: ["rouge_l", "bleu4"])

    several_answers: ClassVar[bool] = False  # true if a row may have a list of answers
    measures = tuple(TEXTS)
    suffixes = ("_teacher_forced", "_generated")
    reads_rows = True
    auto_class = "AutoModelForCausalLM"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.messages is None:
            check_prompt(self.prompt)
        elif (self.prompt, self.answer) != (type(self).prompt, type(self).answer):
            raise ValueError("data.messages stands in place of data.prompt and data.answer")
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
            if "max_length" in self.generation:
                raise ValueError(
                    "data.generation.max_length counts the prompt too, got "
                    f"{self.generation['max_length']}: set data.generation.max_new_tokens"
                )
            if (count := self.generation.get("num_return_sequences", 1)) != 1:
                raise ValueError(
                    "data.generation.num_return_sequences must be 1, because one answer a question "
                    f"is scored, got {count}"
                )
        if self.loss_on not in ("answer", "all"):
            raise ValueError(f"data.loss_on must be answer or all, got {self.loss_on}")
        if self.generate not in ("last", "always", "never"):
            raise ValueError(f"data.generate must be last, always or never, got {self.generate}")

    @property
    def answer_room(self) -> int:
        """Number of tokens that an answer keeps at least and that are generated at most."""
        return self.max_length // 2 if self.max_answer_length is None else self.max_answer_length

    @property
    def most_new_tokens(self) -> int:
        """Most tokens that are generated."""
        return self.generation.get("max_new_tokens", self.answer_room)

    @property
    def prompt_room(self) -> int:
        """Most tokens of a prompt for which an answer is generated."""
        return self.max_length - self.answer_room

    @property
    def selects(self) -> tuple[str, int]:
        return "loss", -1

    @property
    def headline(self) -> str:
        form = "teacher_forced" if self.generate == "never" else "generated"
        return f"{title(self.metrics[0])}_{form}"

    def generates(self, last: bool) -> bool:
        return self.generate == "always" or (last and self.generate == "last")

    def longest(self, examples: Examples) -> tuple[int, int]:
        """See ``Task.longest``; where texts are generated, new tokens count too."""
        if not self.generates(last=True):
            return super().longest(examples)
        prompts = np.minimum(examples.arrays["prompts"][examples.rows], self.prompt_room)
        lengths = np.maximum(examples.lengths, prompts + self.most_new_tokens)
        row = int(lengths.argmax())
        return row, int(lengths[row])

    def columns(self) -> list[str]:
        return (
            [*template_columns(self.prompt), self.answer]
            if self.messages is None
            else [self.messages]
        )

    def problems(self, rows: "Dataset") -> dict[int, str]:
        """See ``Source.problems``; a column may be empty, but neither prompt nor answer."""
        if self.messages is not None:
            reasons = [problem(conversation) for conversation in values(rows, self.messages)]
            return {i: f"{why} in {self.messages}" for i, why in enumerate(reasons) if why}
        problems: dict[int, str] = {}
        advice = f"must be a text; data.messages={self.answer} reads conversations"
        for i, value in enumerate([] if self.several_answers else values(rows, self.answer)):
            if isinstance(value, list | dict):
                problems[i] = f"has {kind(value)} in {self.answer}, {advice}"
        for i, answer in enumerate(self.references(rows)):
            if not any(text.strip() for text in answer):
                problems[i] = f"has an empty {self.answer}"
        for i, prompt in enumerate(rendered(self.prompt, rows)):
            if not prompt.strip():
                problems.setdefault(i, f"has an empty prompt {self.prompt}")
        return problems

    def references(self, rows: "Dataset") -> list[list[str]]:
        """Return the right answers of each row; the first one trains."""
        if self.messages is not None:
            return [[divided(conversation)[1]] for conversation in values(rows, self.messages)]
        return [["" if text is None else str(text)] for text in values(rows, self.answer)]

    def _notes(self) -> list[str]:
        """See ``Source.notes``; answers of other scripts than Latin have words of other rules."""
        rows = [self.references(self.split_rows(split)) for split in ("validation", "test")]
        answers = [texts for part in rows for texts in part]
        count = sum(map(beyond_latin, answers))
        names = [name for name in self.metrics if name in SPLIT_WORDS]
        if not count or not names:
            return super()._notes()
        return super()._notes() + [
            f"{count} of the {len(answers)} answers of validation and test are mainly of another "
            f"script than Latin: for them {' and '.join(names)} take letters of any script, and "
            "each character of a script without spaces as a word"
        ]

    def questions(self, rows: "Dataset") -> list[Conversation]:
        """Return the messages before each row's answer."""
        if self.messages is not None:
            return [divided(conversation)[0] for conversation in values(rows, self.messages)]
        return [said_by_user(text) for text in rendered(self.prompt, rows)]

    def prompts(self, rows: "Dataset") -> list[str]:
        """Return each row's prompt as people read it."""
        if self.messages is not None:
            return [as_text(messages) for messages in self.questions(rows)]
        return rendered(self.prompt, rows)

    def arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        prompts = prompt_tokens(chat_prompts(self.questions(rows), processor), processor)
        end = [] if processor.eos_token_id is None else [processor.eos_token_id]
        texts = [answers[0] for answers in self.references(rows)]
        answers = [[*ids, *end] for ids in processor(texts, add_special_tokens=False)["input_ids"]]
        return sequences(prompts, answers, self.max_length, self.answer_room)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return token_outputs(model, batch, targets_of(self._learnt(batch)))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return next_token_loss(outputs, targets_of(self._learnt(batch)))

    def terms(self, batch: Batch) -> int:
        """Return the number of predicted tokens that ``loss_on`` counts."""
        return int((targets_of(self._learnt(batch)) != IGNORED).sum())

    def _learnt(self, batch: Batch) -> Batch:
        """Return the batch, without its prompts' lengths if prompts are predicted too."""
        if self.loss_on == "answer":
            return batch
        return {key: value for key, value in batch.items() if key != "prompts"}

    def evaluate_batch(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``token_sums`` of the answers, and predicted and target ids, each (B, L-1)."""
        targets = targets_of(batch)
        predicted = outputs[..., 1].long().masked_fill(targets == IGNORED, IGNORED)
        return token_sums(outputs, targets) | {"predicted": predicted, "targets": targets}

    def score(self, outputs: Outputs, rows: "Dataset", processor: Any) -> dict[str, float]:
        """See ``Task.score``; returns ``token_means`` and the teacher-forced metrics."""
        predicted = decoded([ids for batch in outputs for ids in batch["predicted"]], processor)
        targets = decoded([ids for batch in outputs for ids in batch["targets"]], processor)
        return token_means(outputs) | self.scored(predicted, targets, "_teacher_forced")

    def generate_batch(self, model: nn.Module, batch: Batch, processor: Any) -> dict[str, Tensor]:
        """Generate answers to the prompts of a batch, which are padded on the left.

        Args:
            model: a causal language model; its ``generation_config`` is replaced.
            batch: ``input_ids`` (B, L) and ``prompts`` (B,).
            processor: the tokenizer.

        Returns:
            ``generated`` (B, T) token ids, IGNORED from the end token on.
        """
        room = self.prompt_room
        rows = zip(batch["input_ids"], batch["prompts"].tolist(), strict=True)
        prompts = [ids[keep_ends(list(range(n)), room)] for ids, n in rows]
        return {
            "generated": generated(model, prompts, processor, self.answer_room, self.generation)
        }

    def asked(self) -> list[str]:
        return template_columns(self.prompt) if self.messages is None else [self.messages]

    def question_arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        """See ``Task.question_arrays``; a prompt keeps its ends.

        With ``messages``, a question is a conversation up to the answer, or the user's one text.
        """
        if self.messages is None:
            conversations = self.questions(rows)
        else:
            messages = values(rows, self.messages)
            conversations = [said_by_user(q) if isinstance(q, str) else list(q) for q in messages]
        prompts = prompt_tokens(chat_prompts(conversations, processor), processor)
        return sequences(prompts, [[] for _ in prompts], self.max_length, self.answer_room)

    def answer_batch(self, model: nn.Module, batch: Batch, processor: Any) -> dict[str, Tensor]:
        return self.generate_batch(model, batch, processor)

    def answered(self, outputs: dict[str, Tensor], rows: "Dataset", processor: Any) -> list[Any]:
        """See ``Task.answered``; the generated text."""
        return [{"text": text} for text in decoded(list(outputs["generated"]), processor)]

    def score_generated(
        self, outputs: Outputs, rows: "Dataset", processor: Any
    ) -> tuple[dict[str, float], list[dict[str, str]]]:
        """Return metrics of generated text against the references, and samples.

        Args:
            outputs: each batch's tensors from ``generate_batch``, and ``row`` (B,), the rows'
                positions in ``rows``.
            rows: the whole split.
            processor: the tokenizer.

        Returns:
            Metrics by name, and prompt, reference and generated text of each row, in row order.
        """
        texts = decoded([ids for batch in outputs for ids in batch["generated"]], processor)
        order = torch.cat([batch["row"] for batch in outputs]).cpu().numpy()
        chosen = rows.select(order)
        references, prompts = self.references(chosen), self.prompts(chosen)
        compared = self._cut(references, processor) if self.cut_references else references
        metrics = self.scored(texts, compared, "_generated")
        samples = [
            {"row": str(r), "prompt": p, "reference": a[0], "generated": t}
            for r, p, a, t in sorted(
                zip(order, prompts, references, texts, strict=True), key=lambda s: s[0]
            )
        ]
        return metrics, samples

    def _cut(self, references: list[list[str]], processor: Any) -> list[list[str]]:
        """Return the references without the tokens that no generated text has room for."""
        room = self.most_new_tokens

        def beginning(text: str) -> str:
            ids = processor(text, add_special_tokens=False)["input_ids"]
            return text if len(ids) <= room else decoded([torch.tensor(ids[:room])], processor)[0]

        return [[beginning(text) for text in texts] for texts in references]


@dataclass(frozen=True)
class QuestionAnswering(InstructionTuning):
    """Answers questions by generation, as in SQuAD: several references, exact match and F1.

    Args:
        answer: column with ``{"text": [references]}``, a list of references, or one text or
            number. The first trains.
    """

    prompt: str = "{{ context }}\n\n{{ question }}"
    answer: str = "answers"
    metrics: list[str] = field(default_factory=lambda: ["token_f1", "exact_match"])

    several_answers = True

    def references(self, rows: "Dataset") -> list[list[str]]:
        if self.messages is not None:
            return super().references(rows)
        references = []
        for value in values(rows, self.answer):
            found = value.get("text") if isinstance(value, dict) else value
            texts = found if isinstance(found, list) else [found]
            references.append([str(text) for text in texts if text is not None])
        return references


@dataclass(frozen=True)
class DocstringsQA(DocstringsRows, InstructionTuning):
    """Answers what a name of an installed package stands for, by its docstring's first sentence."""

    prompt: str = "What does {{ name }} do?"
    answer: str = "text"
    max_length: int = 96
