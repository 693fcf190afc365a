"""Answers of a trained model to lines of text."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from fedpeft.data.batching import Examples
from fedpeft.data.tasks.base import Task
from fedpeft.engine.evaluate import evaluate
from fedpeft.export.load import Opened


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
        number: of the line, for errors.

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
