"""Reads and checks what clients send back; whatever it is, it must not end the run."""

import math
from typing import Any, NamedTuple

from flwr.app import Message

from fedpeft.compression.base import Codec
from fedpeft.state import State, check, payload_bytes, split_prefixed
from fedpeft.wire import raised, unpack

MOST_CHARACTERS = 500  # length of a client's text


class Reply(NamedTuple):
    """One client's training.

    Attributes:
        payload_bytes: bytes of the arrays as they came, wire.
        state: shared parameters, block.
        extras: tensors that the strategy's term sent, block.
        num_examples: rows that the client has.
        steps: number of steps taken.
        loss: mean over these steps.
        kept: the client keeps the state of this round.
        restarted: true if the client's kept state was lost, so that it began anew.
        seconds: seconds that the client's training took, by its own clock; null if it does not say.
    """

    payload_bytes: int
    state: State
    extras: State
    num_examples: int
    steps: int
    loss: float
    kept: bool
    restarted: bool
    seconds: float | None


def read(reply: Message, reference: State, codec: Codec) -> Reply:
    """Read and check a reply to training.

    Args:
        reply: one client's reply.
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
    sent = unpack(content.array_records["arrays"], index, len(reference))
    decoded = codec.decode(sent, reference)
    check(decoded, reference)
    state, extras = split_prefixed(decoded)
    kept = config.get("kept") is True
    size = payload_bytes(sent)
    anew, took = restarted(reply), seconds(reply)
    return Reply(size, state, extras, counts[0], counts[1], loss, kept, anew, took)


def seconds(reply: Message) -> float | None:
    """Return the seconds that a client says its work took; null if it says no such number."""
    value: Any = reply.content.metric_records["metrics"].get("seconds")
    if isinstance(value, float) and math.isfinite(value) and value >= 0:
        return float(f"{value:.3f}")
    return None


def restarted(reply: Message) -> bool:
    """Tell whether a client says that its kept state was lost and began anew."""
    config = reply.content.config_records.get("config")
    return config is not None and config.get("restarted") is True


def reason(reply: Message) -> str:
    """Return a client's own sentence, without the text that Flower puts around it."""
    text = reply.error.reason or f"error code {reply.error.code}"
    return printable(raised(text[: 4 * MOST_CHARACTERS]).strip())


def printable(text: str) -> str:
    """Escape what would steer a terminal in a client's text, and cut the text."""
    begin = text[: MOST_CHARACTERS + 1]  # one more, so that a longer text shows that it is cut
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in begin)
    return safe if len(safe) <= MOST_CHARACTERS else safe[: MOST_CHARACTERS - 3] + "..."
