"""Multiple choice among any number of candidates a row, as in COPA and ReCoRD."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from fedpeft.data.batching import REPORTED, Batch
from fedpeft.data.rows.tables import kind, values
from fedpeft.data.rows.templates import check_prompt, prompt_tokens, rendered, template_columns
from fedpeft.data.tasks.base import Outputs, Task
from fedpeft.data.tasks.classification import join
from fedpeft.data.tasks.language import sequences, targets_of, token_outputs, token_sums
from fedpeft.data.tasks.text import model_logits, token_arrays
from fedpeft.evaluate_metrics import title
from fedpeft.metrics import TEXTS, measure

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class MultipleChoice(Task):
    """Chooses the best of a row's candidates; the loss is the cross-entropy over their scores.

    Args:
        choices: columns with one candidate each, or one column with lists of candidates.
        prompt: Jinja template over the columns, of the text before a candidate.
        candidate: Jinja template over the columns, of a candidate; ``choice`` is its text.
        answers: column with a list of the right candidates' texts; null if ``label`` is the number
            of the right one. With it, ``label`` only serves to partition, and may be null.
        scoring: ``head`` scores the pair of prompt and candidate by a new output layer, for
            encoders. ``likelihood`` scores by the mean log-likelihood of the candidate's tokens
            after the prompt, for decoders, as the FedTT paper's LLaMA runs do.
        max_length: tokens of a prompt with a candidate at most.
    """

    choices: list[str] = field(default_factory=lambda: ["choice1", "choice2"])
    prompt: str = "{{ premise }}"
    candidate: str = "{{ choice }}"
    answers: str | None = None
    scoring: str = "head"
    max_length: int = 128
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])

    measures = ("accuracy", *TEXTS)
    reads_rows = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scoring not in ("head", "likelihood"):
            raise ValueError(f"data.scoring must be head or likelihood, got {self.scoring}")
        if self.max_length < 4:
            raise ValueError(f"data.max_length must be >= 4, got {self.max_length}")
        if self.prompt.isidentifier():
            check_prompt(self.prompt)
        if "choice" not in template_columns(self.candidate):
            raise ValueError(
                f"data.candidate={self.candidate} does not use {{{{ choice }}}}, so all candidates "
                "of a row would be the same"
            )
        if self.answers is None and self.label is None:
            raise ValueError("data.label or data.answers must say which candidate is right")

    @property
    def auto_class(self) -> str:  # type: ignore[override]
        """Class of a classifier with one output, or of a language model."""
        head = self.scoring == "head"
        return "AutoModelForSequenceClassification" if head else "AutoModelForCausalLM"

    @property
    def num_labels(self) -> int | None:
        return 1 if self.scoring == "head" else None

    def columns(self) -> list[str]:
        named = {*template_columns(self.prompt), *template_columns(self.candidate)} - {"choice"}
        return [*dict.fromkeys([*sorted(named), *self.choices, *filter(None, [self.answers])])]

    def candidates(self, rows: "Dataset") -> list[list[str]]:
        """Return the texts of each row's candidates; repeats in a list are dropped."""
        if len(self.choices) == 1:
            return [list(dict.fromkeys(_texts(cell))) for cell in values(rows, self.choices[0])]
        return [list(texts) for texts in zip(*(values(rows, c) for c in self.choices), strict=True)]

    def right(self, rows: "Dataset") -> list[list[int]]:
        """Return the numbers of each row's right candidates."""
        all_candidates = self.candidates(rows)
        if self.answers is None:
            return [
                _place(label, len(candidates))
                for label, candidates in zip(values(rows, self.target), all_candidates, strict=True)
            ]
        return [
            [i for i, text in enumerate(candidates) if text in answers]
            for candidates, answers in zip(
                all_candidates, map(_answers, values(rows, self.answers)), strict=True
            )
        ]

    def problems(self, rows: "Dataset") -> dict[int, str]:
        problems = super().problems(rows)
        for column in self.choices if len(self.choices) == 1 else []:
            for i, cell in enumerate(values(rows, column)):
                if cell is not None and not _texts(cell) and cell != []:
                    problems.setdefault(i, f"has {kind(cell)} in {column}, must be a list of texts")
        for i, (texts, right) in enumerate(
            zip(self.candidates(rows), self.right(rows), strict=True)
        ):
            if len(texts) < 2:
                problems.setdefault(i, f"has {len(texts)} candidates, needs 2")
            elif not right:
                column = self.answers or self.target
                rule = "texts of candidates" if self.answers else "the number of a candidate"
                stored = kind(rows[i][column])
                problems.setdefault(i, f"has {stored} in {column}, must be {rule}")
        return problems

    def arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        """Encode one sequence a candidate; ``right`` (sequences,) marks the right ones."""
        candidates, right = self.candidates(rows), self.right(rows)
        row = [i for i, texts in enumerate(candidates) for _ in texts]
        repeated = rows.select(np.asarray(row, np.int64))
        prompts = rendered(self.prompt, repeated)
        texts = rendered(self.candidate, repeated, choice=[t for c in candidates for t in c])
        marks = [j in r for r, c in zip(right, candidates, strict=True) for j in range(len(c))]
        groups = np.cumsum([0, *map(len, candidates)]).astype(np.int64)
        arrays = self._encoded(prompts, texts, processor)
        cut = {n: np.logical_or.reduceat(arrays[n], groups[:-1]) for n in REPORTED if n in arrays}
        return arrays | cut | {"groups": groups, "right": np.asarray(marks)}

    def asked(self) -> list[str]:
        return [name for name in self.columns() if name != self.answers]

    def question_arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        """See ``Task.question_arrays``; the first candidate stands for the right one."""
        if self.answers is None:
            marked = rows.add_column(self.target, [0] * len(rows))  # type: ignore[call-arg]
        else:
            marked = rows.add_column(self.answers, self.candidates(rows))  # type: ignore[call-arg]
        return self.arrays(marked, processor)

    def answer_batch(self, model: nn.Module, batch: Batch, processor: Any) -> dict[str, Tensor]:
        return {"scores": self.scores(self.forward(model, batch), batch)}

    def answered(self, outputs: dict[str, Tensor], rows: "Dataset", processor: Any) -> list[Any]:
        """See ``Task.answered``; the best candidate, and the shares of all in the softmax."""
        answers = []
        for texts, scores in zip(self.candidates(rows), outputs["scores"], strict=True):
            shares = scores.softmax(-1)[: len(texts)].tolist()
            chosen = texts[shares.index(max(shares))]
            probabilities = dict(zip(texts, shares, strict=True))
            answers.append({"choice": chosen, "probabilities": probabilities})
        return answers

    def _encoded(
        self, prompts: list[str], texts: list[str], tokenizer: Any
    ) -> dict[str, np.ndarray]:
        if self.scoring == "head":
            return token_arrays((prompts, texts), tokenizer, self.max_length)
        answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
        starts = prompt_tokens(prompts, tokenizer)
        return sequences(starts, answers, self.max_length, self.max_length // 2)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.scoring == "head":
            return model_logits(model, batch)
        return token_outputs(model, batch, targets_of(batch))

    def scores(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return scores (B, most candidates of a row), -inf where a row has fewer."""
        if self.scoring == "head":
            flat_scores = outputs.squeeze(-1)
        else:
            sums = token_sums(outputs, targets_of(batch))
            flat_scores = -sums["loss"] / sums["count"]
        return _by_row(flat_scores, batch["choices"], float("-inf"))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._losses(self.scores(outputs, batch), batch).mean()

    def _losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return -log of the right candidates' share of the softmax, (B,)."""
        right = _by_row(batch["right"], batch["choices"], False)
        wanted = scores.masked_fill(~right, float("-inf"))
        return scores.logsumexp(-1) - wanted.logsumexp(-1)

    def evaluate_batch(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return loss, prediction (a candidate's number) and hit (true if right), each (B,)."""
        scores = self.scores(outputs, batch)
        prediction = scores.argmax(-1)
        right = _by_row(batch["right"], batch["choices"], False)
        hit = right.gather(1, prediction.unsqueeze(1)).squeeze(1)
        return {"loss": self._losses(scores, batch), "prediction": prediction, "hit": hit}

    def score(self, outputs: Outputs, rows: "Dataset", processor: Any) -> dict[str, float]:
        """See ``Task.score``.

        ``accuracy`` measures the choices, and text metrics measure the chosen candidates' texts.
        """
        joined = join(outputs)
        chosen = rows.select(joined["row"].numpy())
        candidates, right = self.candidates(chosen), self.right(chosen)
        texts = [c[p] for c, p in zip(candidates, joined["prediction"].tolist(), strict=True)]
        answers = [[c[j] for j in r] for c, r in zip(candidates, right, strict=True)]
        hits = joined["hit"].int().tolist()
        metrics = {
            title(name): measure(name, hits, [1] * len(hits))
            if name == "accuracy"
            else measure(name, texts, answers)
            for name in self.metrics
        }
        return {"loss": float(joined["loss"].double().mean())} | metrics


def _by_row(values: Tensor, sizes: Tensor, fill: float | bool) -> Tensor:
    """Return values (sequences,) as (B, most sequences of a row), filled up with ``fill``."""
    groups = values.split(sizes.tolist())
    return nn.utils.rnn.pad_sequence(list(groups), True, fill)


def _place(label: Any, count: int) -> list[int]:
    """Return a label as the number of one of ``count`` candidates; empty if it is none.

    A column of whole numbers with a gap is read as one of fractional numbers.
    """
    whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
    return [int(label)] if whole and 0 <= label < count else []


def _texts(cell: Any) -> list[str]:
    """Return a cell's list of texts; empty if it is anything else."""
    texts = isinstance(cell, list) and all(isinstance(text, str) for text in cell)
    return cell if texts else []


def _answers(cell: Any) -> list[str]:
    """Return the right texts of a cell, which may be one text."""
    return [cell] if isinstance(cell, str) else _texts(cell)
