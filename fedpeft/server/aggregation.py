"""Reads the replies of a round and aggregates those that can be used."""

from collections.abc import Iterable, Sequence

from flwr.app import Message

from fedpeft.compression.base import stepped
from fedpeft.engine.server_model import EngineModel
from fedpeft.methods.base import Round
from fedpeft.server.broadcast import Broadcaster
from fedpeft.server.diagnostics import drift, interference
from fedpeft.server.replies import Reply, read
from fedpeft.server.seen import RoundFailed, Seen
from fedpeft.state import STRATEGY, Role, State, filled, payload_bytes, prefixed, zeros
from fedpeft.wire import wire_bytes


class Aggregator:
    """Aggregates by the method, and then steps by the algorithm.

    Args:
        down: the server's values, which take the result.
    """

    def __init__(self, down: Broadcaster) -> None:
        self.down, self.engine = down, down.engine
        self.config, self.replica, self.roles = down.config, down.replica, down.roles

    def aggregate(
        self, number: int, replies: Iterable[tuple[int, Message]], seen: Seen, late: str
    ) -> None:
        """Check each reply, refuse those that cannot be used, and aggregate the rest.

        Args:
            number: of the round.
            replies: client and reply, as they arrive.
            seen: of the round; takes bytes, refusals and metrics.
            late: reason to note for clients that did not reply.

        Raises:
            RoundFailed: no reply can be used.
        """
        usable = self._usable(number, replies, seen, late)
        before, algorithm = self.down.broadcast(number).received, self.config.strategy
        round = Round(
            number=number,
            ats=[self.down.at(number, client) for client in usable],
            states=[filled(reply.state, before) for reply in usable.values()],
            weights=algorithm.weigh([reply.num_examples for reply in usable.values()]),
            before=before,
            steps=[reply.steps for reply in usable.values()],
            extras=[reply.extras for reply in usable.values()],
            share=len(usable) / self.config.num_clients,
            server=EngineModel(self.engine),
            memory=self.down.method_memory,
        )
        mean = self.config.method.aggregate(round)
        after = algorithm.server(mean, round, self.down.memory)
        seen.metrics = self._train_metrics(round, [r.loss for r in usable.values()], mean)
        if mean and not after:
            seen.metrics["unchanged"] = 1.0  # the strategy had too few replies to go by
        if not self.config.compression.down.exact:
            after = stepped(after, before, self.down.values)
        self.down.update(after)

    def _train_metrics(
        self, round: Round, losses: Sequence[float], mean: State
    ) -> dict[str, float | None]:
        """Return the loss, the clients' drift and the interference of the mean."""
        metrics: dict[str, float | None] = {}
        metrics["train_loss"] = sum(w * x for w, x in zip(round.weights, losses, strict=True))
        metrics |= drift(round.before, round.states)
        if self.config.evaluation.interference and self.config.evaluates(round.number):
            metrics["interference"] = self._interference(round, mean)
        return metrics

    def _interference(self, round: Round, mean: State) -> float | None:
        """Return null if a factor stays on the client, because its product is then unknown."""
        if Role.PERSONAL in self.roles.by_name(round.number).values():
            return None
        method, states = self.config.method, round.states
        return interference(self.replica.model, method, round.before, states, round.weights, mean)

    def _usable(
        self, round: int, replies: Iterable[tuple[int, Message]], seen: Seen, late: str
    ) -> dict[int, Reply]:
        """Read replies as they arrive, while others still train; sort them by client."""
        before = self.down.broadcast(round).received
        shared = {name: before[name] for name in self.roles.shared(round)}
        usable: dict[int, Reply] = {}
        silent = dict.fromkeys(seen.cohort)
        for client, reply in replies:
            silent.pop(client, None)
            try:
                usable[client] = self._read(client, reply, shared, round, seen)
            except Exception as error:  # whatever a client sends, it must not end the run
                reason = str(error) if isinstance(error, ValueError) else repr(error)
                seen.refuse(client, reason)
        for client in silent:
            seen.refuse(client, late)
        seen.refused = dict(sorted(seen.refused.items()))
        if not usable:
            client, reason = next(iter(seen.refused.items()))
            raise RoundFailed(f"no client's reply was usable; client {client}: {reason}")
        return {client: usable[client] for client in sorted(usable)}

    def _read(self, client: int, reply: Message, shared: State, round: int, seen: Seen) -> Reply:
        """Count a reply's bytes and check it against the client's blocks."""
        if not reply.has_error():
            seen.count("uplink_bytes", wire_bytes(reply.content))
        start = self.replica.blocks(shared, self.down.at(round, client))
        extras = prefixed(zeros(self.config.strategy.up(start)), STRATEGY)
        usable = read(reply, start | extras, self.config.compression.up)
        seen.count("uplink_payload_bytes", payload_bytes(usable.sent))
        return usable
