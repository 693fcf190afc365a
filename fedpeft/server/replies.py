"""What clients send back, read and checked: whatever it is, it must not end the run."""

import math
import re
from typing import Any, NamedTuple

from flwr.app import Message

from fedpeft.compression.base import Compression
from fedpeft.methods.base import State
from fedpeft.state import check, split_extras, unpack

OWN_SPLITS = ("validation", "test")  # what a client measures itself on


class Reply(NamedTuple):
    """One client's training: what it sent, and the parameters and a strategy's extras in it."""

    sent: State
    state: State
    extras: State
    num_examples: int
    steps: int
    loss: float


def read(reply: Message, start: State, compression: Compression) -> Reply:
    """A reply to training, or an error that says what is wrong.

    Args:
        start: the parameters, as the client got them, and zeros for a strategy's extras.
        compression: of what was sent.

    Raises:
        ValueError: it is an error, or lacks or holds something that it should not.
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
    restored = compression.restore(sent, start)
    check(restored, start)
    state, extras = split_extras(restored)
    return Reply(sent, state, extras, counts[0], counts[1], loss)


def measured(reply: Message) -> dict[str, float]:
    """A client's metrics, or an error that says what is wrong."""
    if reply.has_error():
        raise ValueError(reason(reply))
    metrics: dict[str, Any] = dict(reply.content.metric_records["metrics"])
    for key, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} must be a finite number, got {value}")
    if not all(metrics.get(f"{split}-num-examples", 0) >= 1 for split in OWN_SPLITS):
        raise ValueError(f"num-examples of {' and '.join(OWN_SPLITS)} must be >= 1")
    return metrics


def reason(reply: Message) -> str:
    """The client's own sentence out of Flower's wrapping."""
    text = reply.error.reason or f"error code {reply.error.code}"
    wrapped = re.search(r"Message: (.*?)(?:'>)?$", text, re.DOTALL)
    return (wrapped.group(1) if wrapped else text).strip()
