"""The observers of a run: each is told how it goes on, and shows it in a way of its own."""

from collections.abc import Sequence
from typing import Any

Line = dict[str, Any]  # a round in metrics.jsonl
# Suffixes of what sums up a measure of the clients; without one it is the mean weighted by rows.
UNWEIGHTED, WORST, P10 = SPREAD = ("_unweighted", "_worst", "_p10")
REPLIED, LATE, REFUSED, ABSENT = OUTCOMES = ("replied", "late", "refused", "absent")


class Observer:
    """The base of what is told how a run goes on; it does nothing."""

    def start(self, title: str, num_rounds: int) -> None:
        """Note that a run begins."""

    def note(self, text: str) -> None:
        """Note a fact that may be intended, such as a split set aside, before the first round."""

    def phase(self, name: str, clients: int) -> None:
        """Note that the server begins to wait for this many clients."""

    def clients_done(self, count: int) -> None:
        """Note that this many more clients replied."""

    def left_out(self, phase: str, client: int, outcome: str, reason: str) -> None:
        """Note that a phase ended without a client.

        Args:
            phase: ``train`` or ``evaluate``.
            client: the client's number.
            outcome: ``late``, ``refused`` or ``absent``.
            reason: one sentence.
        """

    def round_done(self, line: Line) -> None:
        """Note that a round ended."""

    def stop(self, status: str = "completed", reason: str = "") -> None:
        """Note that the run ended, and let go of what observing it took.

        Args:
            status: ``completed``, ``stopped`` by somebody, or ``failed``.
            reason: one sentence; empty if the run is completed.
        """


class Observers(Observer):
    """Tells several observers, in their order; the last to start is the first to stop.

    Args:
        observers: the observers of one run.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def start(self, title: str, num_rounds: int) -> None:
        for observer in self.observers:
            observer.start(title, num_rounds)

    def note(self, text: str) -> None:
        for observer in self.observers:
            observer.note(text)

    def phase(self, name: str, clients: int) -> None:
        for observer in self.observers:
            observer.phase(name, clients)

    def clients_done(self, count: int) -> None:
        for observer in self.observers:
            observer.clients_done(count)

    def left_out(self, phase: str, client: int, outcome: str, reason: str) -> None:
        for observer in self.observers:
            observer.left_out(phase, client, outcome, reason)

    def round_done(self, line: Line) -> None:
        for observer in self.observers:
            observer.round_done(line)

    def stop(self, status: str = "completed", reason: str = "") -> None:
        for observer in reversed(self.observers):
            observer.stop(status, reason)
