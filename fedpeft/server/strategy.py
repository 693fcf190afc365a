"""The Flower strategy: every method's rounds, read off the roles alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedpeft.algorithms.base import Replies
from fedpeft.engine.session import Session
from fedpeft.methods.base import Role, State
from fedpeft.seeding import generator
from fedpeft.server.diagnostics import drift, interference
from fedpeft.server.nodes import Hosts
from fedpeft.server.replies import Reply, measured, read
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

MOST_MESSAGES = 64  # of an evaluation; each costs some milliseconds, whatever it holds


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
        folder: in simulation, where clients keep what is theirs.
    """

    def __init__(self, session: Session, overrides: str, folder: str | None = None) -> None:
        self.session = session
        config = session.config
        self.hosts = Hosts(config.num_clients, config.runtime.join_timeout, folder)
        self.overrides = overrides
        self.state: State = {}  # every parameter that the server has set so far
        self.memory: dict[str, State] = {}  # the algorithm's own
        self.round = Round()

    def cohort(self, round: int) -> list[int]:
        """The clients of a round, sorted; drawn from (seed, round)."""
        config = self.session.config
        if config.strategy.pooled:
            return [0]
        drawn = generator(config.seed, "cohort", round).permutation(config.num_clients)
        return sorted(int(client) for client in drawn[: config.cohort_size()])

    # --- messages ----------------------------------------------------------------------------

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
        self, kind: str, clients: Sequence[int], arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        """One content for all clients that train the same blocks."""
        state = unpack(arrays, config["index"])  # type: ignore[arg-type]
        parameters, extras = split_extras(state)
        if kind == MessageType.EVALUATE:
            extras = {}
        alike: dict[tuple[Any, ...], tuple[State, list[int]]] = {}
        for client in clients:
            own = with_extras(self.session.blocks(parameters, client), extras)
            shapes = tuple(value.shape for value in own.values())
            alike.setdefault(shapes, (own, []))[1].append(client)
        messages: list[Message] = []
        prefix = "" if kind == MessageType.TRAIN else "evaluation_"
        for own, group in alike.values():
            given = self._record(own, int(config["round"]))  # type: ignore[arg-type]
            content = RecordDict({"arrays": given[0], "config": given[1]})
            self.round.count(prefix + "downlink_bytes", len(group) * wire_bytes(content))
            self.round.count(prefix + "downlink_payload_bytes", len(group) * payload_bytes(own))
            messages += self.hosts.messages(kind, content, self._groups(kind, group))
        return messages

    def _groups(self, kind: str, clients: list[int]) -> list[list[int]]:
        """Clients by message: in simulation a cohort each, the longest work first."""
        if not self.hosts.folder:
            return [[client] for client in clients]
        if kind == MessageType.EVALUATE:
            size = -(-len(clients) // MOST_MESSAGES)
        else:
            size = self.session.together()
            clients = sorted(clients, key=self.session.work, reverse=True)
        count = -(-len(clients) // size)
        return [[int(c) for c in part] for part in np.array_split(clients, count)]

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
        usable = self._usable(server_round, replies)
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
        if session.config.evaluation.interference and session.config.evaluates(server_round):
            found = self._interference(server_round, before, states, weights, mean)
            metrics["interference"] = found
        if mean and not after:
            metrics["unchanged"] = 1.0  # the strategy found too few replies to go by
        after = session.config.compression.kept(after, before, self.values)
        self.state.update(after)
        return pack(after)[0], MetricRecord({k: v for k, v in metrics.items() if v is not None})

    def _usable(self, round: int, replies: Iterable[Message]) -> list[Reply]:
        """In the order of clients; each is read as it arrives, while others still train."""
        before, extras = self.before(round), self.session.config.strategy.up
        shared = {name: before[name] for name in self.session.shared(round)}
        usable: dict[int, Reply] = {}
        silent = dict.fromkeys(self.round.cohort)
        for reply in replies:
            client = self.hosts.client_of(reply)
            silent.pop(client, None)
            try:
                start = self.session.blocks(shared, client)
                usable[client] = self._counted(reply, with_extras(start, zeros(extras(start))))
            except Exception as error:  # whatever a client sends, it must not end the run
                self._refuse(client, str(error) if isinstance(error, ValueError) else repr(error))
        for client in silent:
            self._refuse(client, self._late())
        self.round.refused = dict(sorted(self.round.refused.items()))
        if not usable:
            client, reason = next(iter(self.round.refused.items()))
            raise RoundFailed(f"no client's reply was usable; client {client}: {reason}")
        return [usable[client] for client in sorted(usable)]

    def _late(self) -> str:
        limit = self.session.config.runtime.round_timeout
        return f"no reply within runtime.round_timeout={limit:g} s"

    def _refuse(self, client: int, reason: str) -> None:
        """Notes why a client's reply was left out, after what was wrong with an earlier one."""
        refused = self.round.refused
        refused[client] = f"{refused[client]}; {reason}" if client in refused else reason

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
        clients = range(self.session.config.num_clients)
        return self._messages(MessageType.EVALUATE, clients, arrays, config)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Means over the clients' own splits, weighted by rows: ``client_validation_accuracy``."""
        totals: dict[str, float] = {}
        rows: dict[str, int] = {}
        silent = dict.fromkeys(range(self.session.config.num_clients))
        for reply in sorted(replies, key=self.hosts.client_of):
            client = self.hosts.client_of(reply)
            silent.pop(client, None)
            try:
                metrics = measured(reply)
            except (ValueError, KeyError) as error:
                self._refuse(client, f"evaluation: {error}")
                continue
            self.round.count("evaluation_uplink_bytes", wire_bytes(reply.content))
            for key, value in metrics.items():
                if not key.endswith("-num-examples"):
                    number = int(metrics[f"{key.partition('_')[0]}-num-examples"])
                    totals[key] = totals.get(key, 0.0) + number * value
                    rows[key] = rows.get(key, 0) + number
        for client in silent:
            self._refuse(client, f"evaluation: {self._late()}")
        if not totals:
            return None
        return MetricRecord({f"client_{key}": totals[key] / rows[key] for key in sorted(totals)})

    def summary(self) -> None:
        """Nothing to log: the run's directory holds the configuration."""
