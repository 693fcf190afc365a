"""Measures of a round: of the server's model, and the means of the clients' own."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Message

from fedpeft.data.rows.source import SPLITS
from fedpeft.engine.engine import Engine
from fedpeft.seeding import generator
from fedpeft.server.replies import reason
from fedpeft.state import State

Ranges = Mapping[str, tuple[float, float]]
OWN_SPLITS = ("validation", "test")  # a client measures itself on both


def measure(engine: Engine, split: str, state: State, last: bool = False) -> dict[str, float]:
    """Measure the model that clients would get.

    Args:
        engine: of the server's process.
        split: ``validation``, ``test``, or the name of an extra test.
        state: parameters that the server has set, full.
        last: the run's last evaluation, in which tasks may also measure generated text.

    Returns:
        Measures by name, with the split in front.
    """
    codec = engine.config.compression.down
    draws = generator(engine.config.seed, "compression down", 0)
    engine.replica.load(codec.decode(codec.encode(state, state, draws), state))
    metrics = engine.evaluate(engine.rows.examples(split), os.cpu_count() or 1, last)
    prefix = split if split in SPLITS else f"test_{split}"
    return {f"{prefix}_{key}": value for key, value in metrics.items()}


def measured(reply: Message, ranges: Ranges) -> dict[str, float]:
    """Read and check a client's metrics.

    Args:
        reply: to a message to evaluate.
        ranges: least and greatest value of each metric that the task gives.

    Raises:
        ValueError: the reply is an error, or lacks or holds something that it should not.
    """
    if reply.has_error():
        raise ValueError(reason(reply))
    if "metrics" not in reply.content.metric_records:
        raise ValueError("the reply carries no metrics")
    metrics: dict[str, Any] = dict(reply.content.metric_records["metrics"])
    counts = [f"{split}-num-examples" for split in OWN_SPLITS]
    bounds = {f"{split}_{name}": ends for split in OWN_SPLITS for name, ends in ranges.items()}
    # A mod around the client's app may add metrics of its own, which nobody asked for here.
    metrics = {key: value for key, value in metrics.items() if key in counts or key in bounds}
    for key, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} must be a finite number, got {value!r:.40}")
        least, most = bounds.get(key, (1, math.inf))
        if not least <= value <= most:
            raise ValueError(f"{key} must be from {least:g} to {most:g}, got {value:g}")
    if not all(isinstance(metrics.get(key), int) and metrics[key] >= 1 for key in counts):
        raise ValueError(f"num-examples of {' and '.join(OWN_SPLITS)} must be >= 1")
    return metrics


def client_means(
    replies: Mapping[int, Message], ranges: Ranges, most_rows: Callable[[int], int | None]
) -> tuple[dict[str, float], dict[int, str]]:
    """Average the clients' measures, weighted by rows, e.g. ``client_validation_accuracy``.

    Args:
        replies: by client.
        ranges: least and greatest value of each metric that the task gives.
        most_rows: that a client has; null if the server does not know.

    Returns:
        The means, and the clients whose reply cannot be used, with the reason.
    """
    totals: dict[str, float] = {}
    rows: dict[str, int] = {}
    refused: dict[int, str] = {}
    for client in sorted(replies):
        try:
            metrics = measured(replies[client], ranges)
            _check_rows(metrics, most_rows(client))
        except ValueError as error:
            refused[client] = str(error)
            continue
        for key, value in metrics.items():
            if not key.endswith("-num-examples"):
                number = int(metrics[f"{key.partition('_')[0]}-num-examples"])
                totals[key] = totals.get(key, 0.0) + number * value
                rows[key] = rows.get(key, 0) + number
    return {f"client_{key}": totals[key] / rows[key] for key in sorted(totals)}, refused


def _check_rows(metrics: Mapping[str, float], most: int | None) -> None:
    for split in OWN_SPLITS:
        number = metrics[f"{split}-num-examples"]
        if most is not None and number > most:
            raise ValueError(f"{split}-num-examples is {number}, but the client has {most} rows")
