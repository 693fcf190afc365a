"""The server's view of a round: who was asked, who answered, and what that made."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fedpeft.reporting.observer import ABSENT, LATE, OUTCOMES, REFUSED, REPLIED, Line


class RoundFailed(RuntimeError):
    """A round in which too few replies could be used; the message gives the first reason."""


@dataclass
class Asked:
    """The clients of one phase, each with its outcome.

    Attributes:
        phase: ``train`` or ``evaluate``.
        clients: all clients of the phase, including those that no node holds.
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

    @property
    def usable(self) -> int:
        """Number of replies that came in time and were not refused, so far."""
        return len(self.answered - self.refused.keys())

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
        weights: each client's weight in the aggregate, by client, summing to 1.
        traffic: bytes by direction.
        metrics: measures of training.
        asked: the clients of each phase so far.
        by_client: each client's facts for the table of clients: bytes, rows, measures, seconds.
    """

    cohort: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    restarted: set[int] = field(default_factory=set)
    weights: dict[int, float] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)
    by_client: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def last(self) -> Asked:
        """The clients of the last phase."""
        return next(reversed(self.asked.values()))

    def count(self, key: str, amount: int, client: int) -> None:
        """Add bytes to the traffic of the round and of a client.

        Args:
            key: phase, direction and kind of the bytes, as in a line in metrics.jsonl.
            amount: number of bytes.
            client: number of the client that sent or got the bytes.
        """
        self.traffic[key] = self.traffic.get(key, 0) + amount
        noted = self.by_client.setdefault(client, {})
        noted[key] = noted.get(key, 0) + amount

    def count_again(self, failed: "Seen") -> None:
        """Add the traffic of the same round, which failed and was repeated."""
        for client, noted in failed.by_client.items():
            for key in noted.keys() & failed.traffic.keys():
                self.count(key, noted[key], client)

    def entries(self) -> Line:
        """Return the bytes, the clients by outcome, and who was refused or began anew.

        They are a part of the round's line in metrics.jsonl.
        """
        line: Line = dict(self.traffic)
        for asked in self.asked.values():
            line |= asked.counts()
        if self.refused:
            line["refused"] = {str(client): reason for client, reason in self.refused.items()}
        if self.restarted:
            line["restarted"] = sorted(self.restarted)
        return line

    def note(self, client: int, **facts: float | None) -> None:
        """Put facts of a client into the table of clients."""
        self.by_client.setdefault(client, {}).update(facts)

    def rows(self, round: int) -> list[dict[str, Any]]:
        """Return a row of the table of clients for each that was asked, sorted by client."""
        rows: dict[int, dict[str, Any]] = {}
        for phase in self.asked.values():
            key = "outcome" if phase.phase == "train" else "evaluation_outcome"
            for client in phase.clients:
                rows.setdefault(client, {})[key] = phase.outcome(client)
        for client, weight in self.weights.items():
            rows[client]["weight"] = weight
        return [
            {"round": round, "client": client} | rows[client] | self.by_client.get(client, {})
            for client in sorted(rows)
        ]

    def refuse(self, client: int, reason: str) -> None:
        """Note why a client was left out, after the reason noted earlier, if any."""
        self.last.refused[client] = reason
        earlier = self.refused.get(client)
        self.refused[client] = f"{earlier}; {reason}" if earlier else reason
