"""Reads the replies of a round and aggregates those that can be used."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from flwr.app import Message

from fedpeft.compression.base import stepped
from fedpeft.engine.server_model import EngineModel
from fedpeft.methods.base import At, Memory, Round
from fedpeft.reporting.observer import Line
from fedpeft.server.broadcast import Broadcaster
from fedpeft.server.diagnostics import drift, interference
from fedpeft.server.limits import (
    FRAME,
    MOST_ROWS,
    capped,
    check_size,
    lower_median,
    norms_per_step,
    too_far,
    update_norms,
)
from fedpeft.server.nodes import Nodes
from fedpeft.server.replies import Reply, printable, read
from fedpeft.server.seen import RoundFailed, Seen
from fedpeft.server.shelf import Shelf
from fedpeft.state import (
    STRATEGY,
    Role,
    State,
    filled,
    is_finite,
    payload_bytes,
    prefixed,
    zeros,
)
from fedpeft.wire import sentence, wire_bytes

MEDIAN = "update_norm_median"  # key of the median norm of an update a step, in a round's line


class Aggregator:
    """Aggregates by the method, and then steps by the algorithm.

    Args:
        down: the server's values, which take the result.
        nodes: the clients' nodes.

    Attributes:
        said: rows that each client with rows of its own said at its first usable reply; it may
            never say more.
    """

    def __init__(self, down: Broadcaster, nodes: Nodes) -> None:
        self.down, self.engine, self.nodes = down, down.engine, nodes
        self.config, self.replica, self.roles = down.config, down.replica, down.roles
        self.folder: Path | None = None  # takes replies for which the memory has no room
        self.median = 0.0  # norm of an update a step: the largest of the good rounds so far
        self.said: dict[int, int] = {}

    def aggregate(
        self, number: int, replies: Iterable[tuple[int, Message]], seen: Seen, late: str
    ) -> None:
        """Check each reply, refuse those that cannot be used, and aggregate the rest.

        Args:
            number: the round's number.
            replies: client and reply, as they arrive.
            seen: the server's view of the round; takes bytes, refusals and metrics.
            late: reason to note for clients that did not reply.

        Raises:
            RoundFailed: fewer replies can be used than ``runtime.min_replies`` asks for.
        """
        usable, median = self._usable(number, replies, seen, late)
        before, algorithm = self.down.broadcast(number).received, self.config.strategy
        memory, method_memory = _copy(self.down.memory), _copy(self.down.method_memory)
        weights = algorithm.weigh([reply.num_examples for reply in usable.values()])
        round = Round(
            number=number,
            ats=[self.down.at(number, client) for client in usable],
            states=[filled(reply.state, before) for reply in usable.values()],
            weights=capped(weights, self.most_weight(usable)),
            before=before,
            steps=[reply.steps for reply in usable.values()],
            extras=[reply.extras for reply in usable.values()],
            share=len(usable) / self.config.num_clients,
            server=EngineModel(self.engine),
            memory=method_memory,
        )
        seen.weights = dict(zip(usable, round.weights, strict=True))
        mean = self.config.method.aggregate(round)
        after = algorithm.server(mean, round, memory)
        seen.metrics = self._train_metrics(round, [r.loss for r in usable.values()], mean)
        seen.metrics[MEDIAN] = median
        if mean and not after:
            seen.metrics["unchanged"] = 1.0  # the strategy had too few replies to go by
        if not self.config.compression.down.exact:
            after = stepped(after, before, self.down.values)
        if broken := [name for name, value in after.items() if not is_finite(value)]:
            self._drop(broken[0], usable, before, seen)
            return
        self.take_median(seen.metrics)
        kept = [client for client, reply in usable.items() if reply.kept]
        self.down.accept(number, after, memory, method_memory, kept)
        seen.restarted |= {client for client, reply in usable.items() if reply.restarted}

    def _drop(self, name: str, usable: Mapping[int, Reply], before: State, seen: Seen) -> None:
        """Leave the last good state as it is, and name who moved furthest."""
        norms = update_norms(before, [reply.state for reply in usable.values()])
        _, client = max(zip(norms, usable, strict=True))
        seen.metrics["unchanged"] = 1.0
        seen.refuse(
            client,
            f"the round is dropped, because its aggregate is not finite in {name} and this "
            "client's update has the largest norm",
        )

    def take_median(self, line: Line) -> None:
        """Take over the median norm of a good round's line, also in a run that is resumed."""
        if "unchanged" not in line:
            self.median = max(self.median, line.get(MEDIAN) or 0.0)

    def most_weight(self, clients: Iterable[int]) -> float:
        """Return the share of a mean over clients beyond which none of them weighs."""
        if self.config.strategy.max_weight is not None:
            return self.config.strategy.max_weight
        return 0.5 if self.nodes.own_rows & set(clients) else 1.0

    def _train_metrics(
        self, round: Round, losses: Sequence[float], mean: State
    ) -> dict[str, float | None]:
        """Return the loss, the clients' drift and the interference of the mean."""
        metrics: dict[str, float | None] = {}
        metrics["train_loss"] = sum(w * x for w, x in zip(round.weights, losses, strict=True))
        metrics |= drift([self._start(round, at) for at in round.ats], round.states)
        if self.config.evaluation.interference and self.config.evaluates(round.number):
            metrics["interference"] = self._interference(round, mean)
        return metrics

    def _start(self, round: Round, at: At) -> State:
        """Return shared parameters as a client started from them, full."""
        shared = {name: round.before[name] for name in self.roles.shared(round.number)}
        return filled(self.replica.blocks(shared, at), shared)

    def _interference(self, round: Round, mean: State) -> float | None:
        """Return the round's interference.

        It is null if a factor stays on a client, because its product is then unknown.
        """
        if Role.PERSONAL in self.roles.by_name(round.number).values():
            return None
        method, states = self.config.method, round.states
        return interference(self.replica.model, method, round.before, states, round.weights, mean)

    def _usable(
        self, round: int, replies: Iterable[tuple[int, Message]], seen: Seen, late: str
    ) -> tuple[dict[int, Reply], float]:
        """Return the replies that can be used, by client, and their updates' median norm a step."""
        before = self.down.broadcast(round).received
        usable = self._read_all(round, replies, before, seen, late)
        norms = update_norms(before, [reply.state for reply in usable.values()])
        by_client = dict(zip(usable, norms, strict=True))
        for client, reply in usable.items():
            seen.note(
                client,
                train_rows=reply.num_examples,
                steps=reply.steps,
                train_loss=reply.loss,
                update_norm=by_client[client],
                train_seconds=reply.seconds,
            )
        steps = {client: reply.steps for client, reply in usable.items()}
        by_step = norms_per_step(by_client, steps, self.nodes.own_rows)
        far = too_far(by_step, self.config.strategy.max_norm_ratio, self.median)
        for client, reason in far.items():
            del usable[client]
            seen.refuse(client, reason)
        seen.refused = dict(sorted(seen.refused.items()))
        self._require_enough(usable, seen)
        for client in usable.keys() & self.nodes.own_rows:
            self.said.setdefault(client, usable[client].num_examples)
        median = lower_median([by_step[client] for client in usable])
        return {client: usable[client] for client in sorted(usable)}, median

    def _read_all(
        self,
        round: int,
        replies: Iterable[tuple[int, Message]],
        before: State,
        seen: Seen,
        late: str,
    ) -> dict[int, Reply]:
        """Read replies as they arrive, while others still train.

        Args:
            round: the round's number.
            replies: client and reply, as they arrive.
            before: parameters as the clients received them, full.
            seen: the server's view of the round; takes bytes and refusals.
            late: reason for clients that do not reply.
        """
        shared = {name: before[name] for name in self.roles.shared(round)}
        usable: dict[int, Reply] = {}
        shelf = Shelf(self.folder)
        silent = {client: late for client in seen.cohort if client not in seen.refused}
        for client, reply in replies:
            try:
                if silent.pop(client, None) is None:
                    raise ValueError("the client replied twice")
                checked = self._read(client, reply, shared, round, seen)
                usable[client] = checked._replace(
                    state=shelf.take(checked.state), extras=shelf.take(checked.extras)
                )
            except Exception as error:  # whatever a client sends, it must not end the run
                usable.pop(client, None)
                seen.refuse(client, printable(sentence(error)))
        for client, reason in silent.items():
            seen.refuse(client, reason)
        return usable

    def _require_enough(self, usable: Mapping[int, Reply], seen: Seen) -> None:
        """Raise RoundFailed if fewer replies can be used than ``runtime.min_replies`` asks for."""
        least = self.config.fewest_replies(len(seen.cohort))
        if len(usable) >= least:
            return
        client, reason = next(iter(seen.refused.items()))
        few = "no client's reply was usable"
        if usable:
            few = (
                f"only {len(usable)} of {len(seen.cohort)} replies were usable, and "
                f"runtime.min_replies={self.config.runtime.min_replies} asks for {least}"
            )
        raise RoundFailed(f"{few}; client {client}: {reason}")

    def _read(self, client: int, reply: Message, shared: State, round: int, seen: Seen) -> Reply:
        """Count a reply's bytes and check it against the client's blocks."""
        start = self.replica.blocks(shared, self.down.at(round, client))
        extras = prefixed(zeros(self.config.strategy.up(start)), STRATEGY)
        if not reply.has_error():
            size = wire_bytes(reply.content)
            seen.count("uplink_bytes", size, client)
            check_size(size, _most_bytes(start | extras))
        usable = read(reply, start | extras, self.config.compression.up)
        self._check_counts(self.down.at(round, client), usable)
        seen.count("uplink_payload_bytes", usable.payload_bytes, client)
        return usable

    def most_bytes(self, round: int) -> int:
        """Return how many bytes a client's reply to training may have at most."""
        shared = {name: self.down.values[name] for name in self.roles.shared(round)}
        return _most_bytes(shared | prefixed(zeros(self.config.strategy.up(shared)), STRATEGY))

    def known_rows(self, client: int) -> dict[str, int] | None:
        """Return how many rows a client has, by split; null for rows of its own."""
        if client in self.nodes.own_rows:
            return None
        return {s: len(rows) for s, rows in self.engine.rows.client_examples(client).items()}

    def _check_counts(self, at: At, reply: Reply) -> None:
        """Check what a client says of its rows and steps against what the server knows.

        Raises:
            ValueError: the client says more training rows than it holds or has said before, or
                other steps than it was told to take.
        """
        if self.config.strategy.pooled:
            return
        client = at.client
        assert client is not None
        known = self.known_rows(client)
        most = self.said.get(client, MOST_ROWS) if known is None else known["train"]
        if reply.num_examples > most:
            raise ValueError(f"num-examples is {reply.num_examples}, but the client has {most}")
        steps = self.engine.shared_steps(at, reply.num_examples)
        if reply.steps != steps:
            raise ValueError(f"num-steps is {reply.steps}, but the round has {steps}")


def _most_bytes(state: State) -> int:
    """Return the most bytes of a reply that holds a state, whatever the codec."""
    return 2 * payload_bytes(state) + FRAME


def _copy(memory: Memory) -> Memory:
    """Copy the dictionaries; tensors are replaced, never changed in place."""
    return {key: dict(state) for key, state in memory.items()}
