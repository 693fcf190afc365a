"""Answers of a trained model to lines of text."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from fedpeft.data.batching import Examples
from fedpeft.data.tasks.base import Task
from fedpeft.engine.evaluate import evaluate, scored
from fedpeft.export.load import Opened
from fedpeft.export.run import FinishedRun, open_run

UNTUNED = "before training"


class Question(NamedTuple):
    """A test row's question.

    Attributes:
        prompt: the question.
        reference: the right answer.
        answers: generated, by the model's name.
    """

    prompt: str
    reference: str
    answers: dict[str, str]

    def text(self) -> str:
        """Return the question and its answers as Markdown."""
        lines = [f"- {name}: {answer}" for name, answer in self.answers.items()]
        return "\n".join([f"**{self.prompt}**\n", f"- reference: {self.reference}", *lines])


def asked(runs: Mapping[str, Path], count: int) -> list[Question]:
    """Let the untuned model and the models of finished runs answer the first test rows.

    The model of a run is client 0's, because some methods have no model that all clients share.

    Args:
        runs: directories of runs of one base model and one task, by name.
        count: number of rows, at least one. The task generates text.
    """
    questions: list[Question] = []
    for name, folder in runs.items():
        run = open_run(folder, client=0, whole=False)
        if not questions:
            untuned = _samples(run, run.replica.base_model(), count)
            questions = [
                Question(row["prompt"], row["reference"], {UNTUNED: row["generated"]})
                for row in untuned
            ]
        for question, row in zip(questions, _samples(run, run.replica.model, count), strict=True):
            question.answers[name] = row["generated"]
    return questions


def _samples(run: FinishedRun, model: nn.Module, count: int) -> list[dict[str, str]]:
    """Return prompt, reference and generated text of the first test rows."""
    processor = run.replica.processor
    examples = run.config.data.encode("test", processor)
    first = examples.select(np.sort(examples.rows)[:count])
    return scored(model.to(run.replica.device), run.config, processor, first, last=True)[1] or []


def answers(opened: Opened, lines: Sequence[str], first: int = 1) -> list[Any]:
    """Return an answer to each line, as JSON has it.

    Args:
        opened: the model and its task.
        lines: texts, or JSON objects with the columns that the task asks.
        first: number of the first line, for errors.

    Returns:
        An answer a line; null to an empty line.

    Raises:
        ValueError: a line lacks a column, or it is no UTF-8.
    """
    task, processor, settings = opened.config.data, opened.processor, opened.config.evaluation
    asked = [number for number, line in enumerate(lines) if line.strip()]
    entries = [entry(task, lines[number], first + number) for number in asked]
    if not entries:
        return [None] * len(lines)
    rows = task.question_rows(entries)
    arrays = task.question_arrays(rows, processor)
    pad = getattr(processor, "pad_token_id", None) or 0
    outputs = evaluate(
        opened.model,
        partial(task.answer_batch, processor=processor),
        Examples.whole(arrays, "questions", pad),
        settings.batch_size,
        settings.max_tokens,
        opened.config.precision,
    )
    answered: dict[int, Any] = {}
    for batch in outputs:
        numbers = batch["row"].tolist()
        values = {name: value.cpu() for name, value in batch.items()}
        answers = task.answered(values, rows.select(numbers), processor)
        answered |= dict(zip((asked[number] for number in numbers), answers, strict=True))
    return [answered.get(number) for number in range(len(lines))]


def entry(task: Task, line: str, number: int) -> dict[str, Any]:
    """Return the columns of one line.

    Args:
        task: says the columns.
        line: a JSON object, or the text of the only column.
        number: the line's number, for errors.

    Raises:
        ValueError: the line lacks a column, or it is no UTF-8.
    """
    columns = task.asked()
    if any("\udc80" <= character <= "\udcff" for character in line):  # surrogateescape's
        raise ValueError(f"line {number} is not UTF-8")
    try:
        value = json.loads(line) if line.lstrip().startswith("{") else None
    except ValueError:
        value = None
    if isinstance(value, dict) and all(column in value for column in columns):
        return value
    if isinstance(value, dict) or len(columns) != 1:
        raise ValueError(f"line {number} must be a JSON object with {', '.join(columns)}")
    return {columns[0]: line}
