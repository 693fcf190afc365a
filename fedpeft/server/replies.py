"""Reads and checks what clients send back; whatever it is, it must not end the run."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from flwr.app import Message

from fedpeft.compression.base import Codec
from fedpeft.state import State, check, split_prefixed
from fedpeft.wire import unpack

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
    """

    sent: State
    state: State
    extras: State
    num_examples: int
    steps: int
    loss: float


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
    index: Any = content.config_records["config"].get("index", b"")
    sent = unpack(content.array_records["arrays"], index)
    decoded = codec.decode(sent, reference)
    check(decoded, reference)
    state, extras = split_prefixed(decoded)
    return Reply(sent, state, extras, counts[0], counts[1], loss)


def measured(reply: Message) -> dict[str, float]:
    """Read and check the metrics of a client's evaluation.

    Raises:
        ValueError: the reply is an error, or a metric is missing or not finite.
        KeyError: the reply carries no metrics.
    """
    if reply.has_error():
        raise ValueError(reason(reply))
    metrics: dict[str, Any] = dict(reply.content.metric_records["metrics"])
    for key, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} must be a finite number, got {value}")
    if not all(metrics.get(f"{split}-num-examples", 0) >= 1 for split in OWN_SPLITS):
        raise ValueError(f"num-examples of {' and '.join(OWN_SPLITS)} must be >= 1")
    return metrics


def client_means(replies: Mapping[int, Message]) -> tuple[dict[str, float], dict[int, str]]:
    """Average the clients' measures, weighted by rows, e.g. ``client_validation_accuracy``.

    Returns:
        The means, and the clients whose reply cannot be used, with the reason.
    """
    totals: dict[str, float] = {}
    rows: dict[str, int] = {}
    refused: dict[int, str] = {}
    for client in sorted(replies):
        try:
            metrics = measured(replies[client])
        except (ValueError, KeyError) as error:
            refused[client] = str(error)
            continue
        for key, value in metrics.items():
            if not key.endswith("-num-examples"):
                number = int(metrics[f"{key.partition('_')[0]}-num-examples"])
                totals[key] = totals.get(key, 0.0) + number * value
                rows[key] = rows.get(key, 0) + number
    return {f"client_{key}": totals[key] / rows[key] for key in sorted(totals)}, refused


def reason(reply: Message) -> str:
    """Return a client's own sentence, without the text that Flower puts around it."""
    text = reply.error.reason or f"error code {reply.error.code}"
    wrapped = re.search(r"Message: (.*?)(?:'>)?$", text, re.DOTALL)
    return (wrapped.group(1) if wrapped else text).strip()
