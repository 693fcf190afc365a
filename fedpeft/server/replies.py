"""Reads and checks what clients send back; whatever it is, it must not end the run."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flwr.app import Message

from fedpeft.compression.base import Codec
from fedpeft.state import State, check, split_prefixed
from fedpeft.wire import unpack

Ranges = Mapping[str, tuple[float, float]]
MOST_CHARACTERS = 500  # of a client's text
OWN_SPLITS = ("validation", "test")  # a client measures itself on both


class Reply(NamedTuple):
    """One client's training.

    Attributes:
        sent: arrays as they came, wire.
        state: shared parameters, block.
        extras: what the strategy's term sent, block.
        num_examples: rows that the client has.
        steps: number of steps taken.
        loss: mean over these steps.
        kept: the client keeps the state of this round.
        restarted: its kept state was lost, and it began anew.
    """

    sent: State
    state: State
    extras: State
    num_examples: int
    steps: int
    loss: float
    kept: bool
    restarted: bool


def read(reply: Message, reference: State, codec: Codec) -> Reply:
    """Read and check a reply to training.

    Args:
        reply: from one client.
        reference: the parameters (block) as the client got them, and zeros for a strategy's extras.
        codec: decodes what clients send.

    Raises:
        ValueError: the reply is an error, or lacks or holds something that it should not.
    """
    if reply.has_error():
        raise ValueError(reason(reply))
    content = reply.content
    records = (content.array_records, content.config_records, content.metric_records)
    for name, of_kind in zip(("arrays", "config", "metrics"), records, strict=True):
        if name not in of_kind:
            raise ValueError(f"the reply carries no {name}")
    metrics = content.metric_records["metrics"]
    counts: list[Any] = [metrics.get(key, 0) for key in ("num-examples", "num-steps")]
    for key, number in zip(("num-examples", "num-steps"), counts, strict=True):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{key} must be a whole number >= 1, got {number}")
    loss: Any = metrics.get("loss")
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise ValueError(f"loss must be a finite number, got {loss}")
    config = content.config_records["config"]
    index: Any = config.get("index", b"")
    sent = unpack(content.array_records["arrays"], index)
    decoded = codec.decode(sent, reference)
    check(decoded, reference)
    state, extras = split_prefixed(decoded)
    kept = config.get("kept") is True
    return Reply(sent, state, extras, counts[0], counts[1], loss, kept, restarted(reply))


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


def restarted(reply: Message) -> bool:
    """Tell whether a client says that its kept state was lost and began anew."""
    config = reply.content.config_records.get("config")
    return config is not None and config.get("restarted") is True


def reason(reply: Message) -> str:
    """Return a client's own sentence, without the text that Flower puts around it."""
    text = reply.error.reason or f"error code {reply.error.code}"
    wrapped = re.search(r"Message: (.*?)(?:'>)?$", text[: 4 * MOST_CHARACTERS], re.DOTALL)
    return printable((wrapped.group(1) if wrapped else text).strip())


def printable(text: str) -> str:
    """Cut a client's text, and escape what would steer a terminal."""
    cut = text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
