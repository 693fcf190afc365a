"""The Flower strategy: every method's rounds, read off the roles alone."""

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedpeft.diagnostics import drift, interference
from fedpeft.methods.base import Role, State
from fedpeft.seeding import generator
from fedpeft.session import Session
from fedpeft.state import check, pack, payload_bytes, unpack, wire_bytes

POLL_SECONDS = 0.05
OWN_SPLITS = ("validation", "test")  # what a client measures itself on


class RoundFailed(RuntimeError):
    """A round in which no client's reply could be used; the message gives the first reason."""


@dataclass
class Round:
    """What the server saw of one round."""

    cohort: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)

    def count(self, key: str, amount: int) -> None:
        """Adds to the round's traffic."""
        self.traffic[key] = self.traffic.get(key, 0) + amount


class RoleStrategy(Strategy):
    """Sends what was shared so far, takes what is shared this round, and aggregates it.

    Args:
        session: the server's own model and configuration.
        overrides: the configuration as the clients get it.
    """

    def __init__(self, session: Session, overrides: str) -> None:
        self.session = session
        self.overrides = overrides
        self.nodes: dict[int, int] = {}
        self.state: State = {}  # every parameter that was shared so far, as aggregated
        self.round = Round()
        self._clients_of: dict[str, int] = {}

    # --- who is there ------------------------------------------------------------------------

    def join(self, grid: Grid) -> None:
        """Waits until every partition 0..num_clients-1 has a node, and maps them.

        Node ids differ from run to run, so everything is ordered by partition.

        Raises:
            TimeoutError: partitions are missing after ``runtime.join_timeout``.
            ValueError: two nodes name the same partition, or a number out of range.
        """
        wanted, asked = self.session.config.num_clients, set()
        deadline = time.monotonic() + self.session.config.runtime.join_timeout
        while len(self.nodes) < wanted:
            new = [n for n in grid.get_node_ids() if n not in asked]
            asked.update(new)
            queries = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
            for reply in self.exchange(grid, queries, new, max(1, deadline - time.monotonic())):
                self._register(reply, wanted)
            if time.monotonic() > deadline:
                missing = sorted(set(range(wanted)) - self.nodes.keys())
                raise TimeoutError(f"no client holds partitions {missing} of num_clients={wanted}")
            if not new:
                time.sleep(POLL_SECONDS)

    def _register(self, reply: Message, wanted: int) -> None:
        if reply.has_error():
            raise ValueError(f"a client could not be asked: {_reason(reply)}")
        partition = int(reply.content.metric_records["metrics"]["partition-id"])  # type: ignore[arg-type]
        if not 0 <= partition < wanted:
            raise ValueError(
                f"a client holds partition {partition}, but num_clients={wanted}: start "
                f"{wanted} clients, or set num_clients"
            )
        if partition in self.nodes:
            raise ValueError(f"two clients hold partition {partition}")
        self.nodes[partition] = reply.metadata.src_node_id

    def cohort(self, round: int) -> list[int]:
        """The clients of a round, sorted; drawn from (seed, round)."""
        config = self.session.config
        drawn = generator(config.seed, "cohort", round).permutation(config.num_clients)
        return sorted(int(client) for client in drawn[: config.cohort_size()])

    # --- messages ----------------------------------------------------------------------------

    def exchange(
        self,
        grid: Grid,
        messages: list[Message],
        clients: list[int],
        timeout: float,
        on_reply: Callable[[], None] = lambda: None,
    ) -> list[Message]:
        """Sends messages and collects replies in the order of ``clients`` until the timeout."""
        ids = list(grid.push_messages(messages))
        if len(ids) != len(messages):
            raise RuntimeError(f"only {len(ids)} of {len(messages)} messages could be sent")
        self._clients_of = dict(zip(ids, clients, strict=True))
        waiting, replies = set(ids), []
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            arrived = list(grid.pull_messages(waiting))
            for reply in arrived:
                on_reply()
                waiting.discard(reply.metadata.reply_to_message_id)
            replies += arrived
            if not arrived:
                time.sleep(POLL_SECONDS)
        return sorted(replies, key=self._client_of)

    def _client_of(self, reply: Message) -> int:
        return self._clients_of[reply.metadata.reply_to_message_id]

    def packed(self, round: int) -> tuple[ArrayRecord, ConfigRecord]:
        """What a client receives in a round, and the configuration that goes with it."""
        names = self.session.down(round)
        state = {n: self.state.get(n, self.session.initial[n]) for n in names}
        arrays, index = pack(state)
        self._down_payload = payload_bytes(state)
        config = {"overrides": self.overrides, "round": round, "index": index}
        return arrays, ConfigRecord(config)  # type: ignore[arg-type]

    def _messages(
        self, kind: str, clients: list[int], arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        content = RecordDict({"arrays": arrays, "config": config})
        wire = wire_bytes(content)
        prefix = "" if kind == MessageType.TRAIN else "evaluation_"
        self.round.count(prefix + "downlink_bytes", wire * len(clients))
        self.round.count(prefix + "downlink_payload_bytes", self._down_payload * len(clients))
        return [Message(content, self.nodes[client], kind) for client in clients]

    # --- the four verbs ----------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The same message for every client of the round's cohort, in their order."""
        self.round = Round(cohort=self.cohort(server_round))
        return self._messages(MessageType.TRAIN, self.round.cohort, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Checks each reply, leaves out with its reason what cannot be used, aggregates the rest.

        Raises:
            RoundFailed: nothing is left.
        """
        states, numbers, losses = self._usable(server_round, list(replies))
        session = self.session
        weights = session.config.strategy.weigh(numbers)
        method = session.config.method
        after = method.aggregate(states, weights)
        before = {n: self.state.get(n, session.initial[n]) for n in after}
        metrics = self.round.metrics
        metrics["train_loss"] = sum(w * x for w, x in zip(weights, losses, strict=True))
        metrics |= drift(before, states)
        if session.config.evaluation.interference:
            metrics["interference"] = self._interference(server_round, states, weights, after)
        self.state.update(after)
        return pack(after)[0], MetricRecord({k: v for k, v in metrics.items() if v is not None})

    def _usable(
        self, round: int, replies: list[Message]
    ) -> tuple[list[State], list[int], list[float]]:
        expected = self.session.shared(round)
        states: list[State] = []
        numbers: list[int] = []
        losses: list[float] = []
        silent = dict.fromkeys(self.round.cohort)
        for reply in replies:
            client = self._client_of(reply)
            silent.pop(client, None)
            try:
                state, number, loss = self._read(reply, expected)
            except Exception as error:  # whatever a client sends, it must not end the run
                self.round.refused[client] = (
                    str(error) if isinstance(error, ValueError) else repr(error)
                )
                continue
            states.append(state)
            numbers.append(number)
            losses.append(loss)
        for client in silent:
            limit = self.session.config.runtime.round_timeout
            self.round.refused[client] = f"no reply within runtime.round_timeout={limit:g} s"
        if not states:
            client, reason = next(iter(self.round.refused.items()))
            raise RoundFailed(f"no client's reply was usable; client {client}: {reason}")
        return states, numbers, losses

    def _read(self, reply: Message, expected: State) -> tuple[State, int, float]:
        """A reply's state, number of examples and loss, or an error that says what is wrong."""
        if reply.has_error():
            raise ValueError(_reason(reply))
        content = reply.content
        records = (content.array_records, content.config_records, content.metric_records)
        for name, of_kind in zip(("arrays", "config", "metrics"), records, strict=True):
            if name not in of_kind:
                raise ValueError(f"the reply carries no {name}")
        metrics = content.metric_records["metrics"]
        number: Any = metrics.get("num-examples", 0)
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"num-examples must be a whole number >= 1, got {number}")
        loss: Any = metrics.get("loss")
        if not isinstance(loss, float) or not math.isfinite(loss):
            raise ValueError(f"loss must be a finite number, got {loss}")
        index: Any = content.config_records["config"].get("index", b"")
        state = unpack(content.array_records["arrays"], index)
        self.round.count("uplink_bytes", wire_bytes(content))
        self.round.count("uplink_payload_bytes", payload_bytes(state))
        check(state, expected)
        return state, number, loss

    def _interference(
        self, round: int, states: list[State], weights: list[float], after: State
    ) -> float | None:
        """None also where a factor stays on the client: the server cannot know the product."""
        session = self.session
        if Role.PERSONAL in session.roles(round).values():
            return None
        before = session.initial | self.state
        return interference(session.model, session.config.method, before, states, weights, after)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The same message for every client."""
        return self._messages(MessageType.EVALUATE, sorted(self.nodes), arrays, config)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Means over the clients' own splits, weighted by rows: ``client_validation_accuracy``."""
        totals: dict[str, float] = {}
        rows: dict[str, int] = {}
        for reply in replies:
            try:
                metrics = self._measured(reply)
            except (ValueError, KeyError) as error:
                self.round.refused[self._client_of(reply)] = f"evaluation: {error}"
                continue
            self.round.count("evaluation_uplink_bytes", wire_bytes(reply.content))
            for key, value in metrics.items():
                if not key.endswith("-num-examples"):
                    number = int(metrics[f"{key.partition('_')[0]}-num-examples"])
                    totals[key] = totals.get(key, 0.0) + number * value
                    rows[key] = rows.get(key, 0) + number
        if not totals:
            return None
        return MetricRecord({f"client_{key}": totals[key] / rows[key] for key in sorted(totals)})

    def _measured(self, reply: Message) -> dict[str, float]:
        """A client's metrics, or an error that says what is wrong."""
        if reply.has_error():
            raise ValueError(_reason(reply))
        metrics: dict[str, Any] = dict(reply.content.metric_records["metrics"])
        for key, value in metrics.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{key} must be a finite number, got {value}")
        if not all(metrics.get(f"{split}-num-examples", 0) >= 1 for split in OWN_SPLITS):
            raise ValueError(f"num-examples of {' and '.join(OWN_SPLITS)} must be >= 1")
        return metrics

    def summary(self) -> None:
        """Nothing to log: the run's directory holds the configuration."""


def _reason(reply: Message) -> str:
    """The client's own sentence out of Flower's wrapping."""
    text = reply.error.reason or f"error code {reply.error.code}"
    wrapped = re.search(r"Message: (.*?)(?:'>)?$", text, re.DOTALL)
    return (wrapped.group(1) if wrapped else text).strip()
