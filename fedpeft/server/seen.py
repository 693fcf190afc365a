"""The server's view of a round, and the observer that is told of it."""

from dataclasses import dataclass, field
from typing import Any

Line = dict[str, Any]  # a round in metrics.jsonl


class RoundFailed(RuntimeError):
    """A round in which too few replies could be used; the message gives the first reason."""


@dataclass
class Seen:
    """The server's view of one round.

    Attributes:
        cohort: the clients of the round, sorted.
        refused: clients whose reply was left out, and why.
        restarted: clients whose kept state was lost and began anew.
        weights: of the clients in the aggregate.
        traffic: bytes by direction.
        metrics: measures of training.
    """

    cohort: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    restarted: set[int] = field(default_factory=set)
    weights: dict[int, float] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)

    def count(self, key: str, amount: int) -> None:
        """Add to the round's traffic."""
        self.traffic[key] = self.traffic.get(key, 0) + amount

    def refuse(self, client: int, reason: str) -> None:
        """Note why a client was left out, after the reason noted earlier, if any."""
        earlier = self.refused.get(client)
        self.refused[client] = f"{earlier}; {reason}" if earlier else reason


class Observer:
    """Is told how a run goes on; this one does nothing."""

    def phase(self, name: str, clients: int) -> None:
        """Note that the server begins to wait for this many clients."""

    def clients_done(self, count: int) -> None:
        """Note that this many more clients replied."""

    def round_done(self, line: Line) -> None:
        """Note that a round ended."""
