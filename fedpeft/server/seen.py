"""The server's view of a round: who was asked, who answered, and what that made."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from fedpeft.reporting.observer import ABSENT, LATE, OUTCOMES, REFUSED, REPLIED


class RoundFailed(RuntimeError):
    """A round in which too few replies could be used; the message gives the first reason."""


@dataclass
class Asked:
    """The clients of one phase, each with its outcome.

    Attributes:
        phase: ``train`` or ``evaluate``.
        clients: of the phase, those that no node holds too.
        sent: clients to which a message went.
        answered: clients whose reply came in time.
        refused: clients that the phase went on without, and why.
    """

    phase: str
    clients: Collection[int] = ()
    sent: Collection[int] = ()
    answered: set[int] = field(default_factory=set)
    refused: dict[int, str] = field(default_factory=dict)

    def outcome(self, client: int) -> str:
        """Return replied, late (no reply came in time), refused or absent (no node holds it)."""
        if client not in self.sent:
            return ABSENT
        if client not in self.answered:
            return LATE
        return REFUSED if client in self.refused else REPLIED

    def counts(self) -> dict[str, int]:
        """Count the clients by outcome, under the keys of a line in metrics.jsonl."""
        counts = Counter(map(self.outcome, self.clients))
        prefix = "" if self.phase == "train" else "evaluation_"
        return {f"{prefix}{outcome}_clients": counts[outcome] for outcome in OUTCOMES}


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
        asked: the clients of each phase so far.
    """

    cohort: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    restarted: set[int] = field(default_factory=set)
    weights: dict[int, float] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)

    @property
    def last(self) -> Asked:
        """The clients of the last phase."""
        return next(reversed(self.asked.values()))

    def count(self, key: str, amount: int) -> None:
        """Add to the round's traffic."""
        self.traffic[key] = self.traffic.get(key, 0) + amount

    def refuse(self, client: int, reason: str) -> None:
        """Note why a client was left out, after the reason noted earlier, if any."""
        self.last.refused[client] = reason
        earlier = self.refused.get(client)
        self.refused[client] = f"{earlier}; {reason}" if earlier else reason
