"""The Flower strategy: every method's rounds, read off the roles alone."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedpeft.algorithms.base import Replies
from fedpeft.diagnostics import drift, interference
from fedpeft.methods.base import Role, State
from fedpeft.replies import Reply, measured, read, reason
from fedpeft.seeding import generator
from fedpeft.session import Session
from fedpeft.state import (
    filled,
    pack,
    payload_bytes,
    split_extras,
    unpack,
    wire_bytes,
    with_extras,
    zeros,
)

POLL_SECONDS = 0.05


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
        self.state: State = {}  # every parameter that the server has set so far
        self.memory: dict[str, State] = {}  # the algorithm's own
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
            raise ValueError(f"a client could not be asked: {reason(reply)}")
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
        if config.strategy.pooled:
            return [0]
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

    @property
    def values(self) -> State:
        """All that can change, as it now is."""
        return self.session.initial | self.state

    def before(self, round: int) -> State:
        """All that can change, as a round's clients get it."""
        values, compression = self.values, self.session.config.compression
        given = {name: values[name] for name in self.session.down(round)}
        return values | compression.received(compression.down(given), given)

    def packed(self, round: int) -> tuple[ArrayRecord, ConfigRecord]:
        """What a client of full rank receives to train, and the configuration along with it."""
        values, session = self.values, self.session
        shared = {name: values[name] for name in session.shared(round)}
        extras = session.config.strategy.down(self.memory, shared)
        state = with_extras({name: values[name] for name in session.down(round)}, extras)
        return self._record(session.config.compression.down(state), round)

    def _record(self, state: State, round: int) -> tuple[ArrayRecord, ConfigRecord]:
        arrays, index = pack(state)
        config = {"overrides": self.overrides, "round": round, "index": index}
        return arrays, ConfigRecord(config)  # type: ignore[arg-type]

    def _messages(
        self, kind: str, clients: list[int], arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        """One content for all clients that train the same blocks."""
        state = unpack(arrays, config["index"])  # type: ignore[arg-type]
        parameters, extras = split_extras(state)
        if kind == MessageType.EVALUATE:
            extras = {}
        contents: dict[tuple[Any, ...], tuple[RecordDict, int, int]] = {}
        messages = []
        for client in clients:
            own = with_extras(self.session.blocks(parameters, client), extras)
            shapes = tuple(value.shape for value in own.values())
            if shapes not in contents:
                given = self._record(own, int(config["round"]))  # type: ignore[arg-type]
                content = RecordDict({"arrays": given[0], "config": given[1]})
                contents[shapes] = content, wire_bytes(content), payload_bytes(own)
            content, wire, payload = contents[shapes]
            prefix = "" if kind == MessageType.TRAIN else "evaluation_"
            self.round.count(prefix + "downlink_bytes", wire)
            self.round.count(prefix + "downlink_payload_bytes", payload)
            messages.append(Message(content, self.nodes[client], kind))
        return messages

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
        usable = self._usable(server_round, list(replies))
        session, before = self.session, self.before(server_round)
        strategy, method = session.config.strategy, session.config.method
        weights = strategy.weigh([reply.num_examples for reply in usable])
        states = [filled(reply.state, before) for reply in usable]
        steps, extras = [r.steps for r in usable], [r.extras for r in usable]
        given = Replies(states, weights, steps, extras, len(usable) / session.config.num_clients)
        mean = method.aggregate(states, weights, before, server_round)
        after = strategy.server(mean, before, given, self.memory)
        metrics = self.round.metrics
        metrics["train_loss"] = sum(w * r.loss for w, r in zip(weights, usable, strict=True))
        metrics |= drift(before, states)
        if session.config.evaluation.interference:
            found = self._interference(server_round, before, states, weights, mean)
            metrics["interference"] = found
        if mean and not after:
            metrics["unchanged"] = 1.0  # the strategy found too few replies to go by
        self.state.update(after)
        return pack(after)[0], MetricRecord({k: v for k, v in metrics.items() if v is not None})

    def _usable(self, round: int, replies: list[Message]) -> list[Reply]:
        before, extras = self.before(round), self.session.config.strategy.up
        shared = {name: before[name] for name in self.session.shared(round)}
        usable: list[Reply] = []
        silent = dict.fromkeys(self.round.cohort)
        for reply in replies:
            client = self._client_of(reply)
            silent.pop(client, None)
            try:
                start = self.session.blocks(shared, client)
                usable.append(self._counted(reply, with_extras(start, zeros(extras(start)))))
            except Exception as error:  # whatever a client sends, it must not end the run
                self.round.refused[client] = (
                    str(error) if isinstance(error, ValueError) else repr(error)
                )
        for client in silent:
            limit = self.session.config.runtime.round_timeout
            self.round.refused[client] = f"no reply within runtime.round_timeout={limit:g} s"
        if not usable:
            client, reason = next(iter(self.round.refused.items()))
            raise RoundFailed(f"no client's reply was usable; client {client}: {reason}")
        return usable

    def _counted(self, reply: Message, start: State) -> Reply:
        if not reply.has_error():
            self.round.count("uplink_bytes", wire_bytes(reply.content))
        found = read(reply, start, self.session.config.compression)
        self.round.count("uplink_payload_bytes", payload_bytes(found.sent))
        return found

    def _interference(
        self, round: int, before: State, states: list[State], weights: list[float], mean: State
    ) -> float | None:
        """None also where a factor stays on the client: the server cannot know the product."""
        session = self.session
        if Role.PERSONAL in session.roles(round).values():
            return None
        method = session.config.method
        return interference(session.model, method, before, states, weights, mean)

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
                metrics = measured(reply)
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

    def summary(self) -> None:
        """Nothing to log: the run's directory holds the configuration."""
