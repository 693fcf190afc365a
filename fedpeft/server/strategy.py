"""``FederatedPEFT``: the Flower strategy that runs every method.

A round: the server draws the clients, encodes what they need once, and sends one message to each.
Each trains and replies with what is shared. The server checks every reply, leaves out what it
cannot use, lets the method aggregate the rest, and lets the algorithm step from the mean.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedpeft.config import load as configuration
from fedpeft.config.message import for_clients
from fedpeft.config.overrides import split
from fedpeft.engine.engine import Engine, open_engine
from fedpeft.reporting.observer import Line, Observer
from fedpeft.seeding import generator
from fedpeft.server.aggregation import Aggregator
from fedpeft.server.broadcast import Broadcaster
from fedpeft.server.checkpoint import Checkpoint
from fedpeft.server.evaluation import Evaluator, measure
from fedpeft.server.limits import FRAME
from fedpeft.server.nodes import Nodes, exchange
from fedpeft.server.seen import Asked, RoundFailed, Seen
from fedpeft.server.selection import Selection
from fedpeft.state import State
from fedpeft.wire import named_arrays


class FederatedPEFT(Strategy):
    """Runs a configuration's method, algorithm and compression as a Flower strategy.

    Args:
        overrides: the configuration, as on the command line; the clients get it with each message.
        engine: this process's engine; null to open it by the overrides.

    Raises:
        ValueError: ``early_stopping.patience`` is set, but the method needs its last round, or
            nobody measures.

    Attributes:
        down: the server's values, and what goes down.
        up: reads replies and aggregates.
        evaluator: reads and sums up what clients measured.
        nodes: the clients' nodes.
        observer: is told how the rounds go on.
        seen: the server's view of the last round.
        selection: knows the best round, and whether the run ends early.
        next_round: the round that ``start`` begins with; round 0 measures the initial model.
    """

    def __init__(self, overrides: str | Sequence[str], engine: Engine | None = None) -> None:
        listed = split(overrides)
        self.overrides = for_clients(listed)
        self.engine = engine or open_engine(self.overrides, None)
        self.config, self.replica = self.engine.config, self.engine.replica
        self.roles = self.replica.roles
        self.nodes = Nodes(self.config.num_clients, self.config.runtime.join_timeout)
        self.observer = Observer()
        self.down = Broadcaster(self.engine, self.overrides)
        self.up = Aggregator(self.down, self.nodes)
        self.evaluator = Evaluator(self.up)
        self.seen = Seen()
        self.selection = self._selection(configuration.settings(listed).early_stopping.patience)
        self.next_round = 0
        self._timeout = self.config.runtime.round_timeout
        self._sent: dict[int, Message] = {}  # the last messages, by client

    def _selection(self, patience: int | None) -> Selection:
        """Return a selection by the server's measure, or the clients' if a parameter is personal.

        Raises:
            ValueError: the run should end early, but the method needs its last round, or nobody
                measures.
        """
        if patience is not None and not self.config.method.can_end_early():
            raise ValueError(
                f"early_stopping.patience={patience} may end the run before its last round, which "
                f"this {type(self.config.method).__name__} needs: set it to null"
            )
        personal = self.roles.has_personal
        metric, sign = self.engine.task.selects
        name = f"{'client_' if personal else ''}validation_{metric}"
        if patience is not None and personal and not self.clients_measure:
            raise ValueError(
                f"early_stopping.patience={patience} waits for {name}, which nobody measures with "
                f"evaluation.clients={self.config.evaluation.clients}: set it to auto"
            )
        return Selection(name, sign, patience)

    def restore(self, checkpoints: Sequence[Checkpoint], lines: Iterable[Line]) -> None:
        """Go on after a run's last checkpoint.

        Args:
            checkpoints: the checkpoints that are kept, oldest first.
            lines: the lines of the rounds so far.
        """
        last = checkpoints[-1]
        self.down.restore(checkpoints)
        self.next_round = last.round + 1
        self.nodes.goes_on = True
        self.nodes.own_rows.update(last.own_rows)  # they may come back later
        self.up.said.update(last.said)
        for line in lines:
            self.up.take_median(line)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds; clients also measure round 0, and replies are read as they arrive.

        Flower's own ``Strategy.start`` gives the same state, but knows no ``early_stopping``.

        Args:
            grid: reaches the clients' nodes.
            initial_arrays: values to start from, by name; null for the seeded ones.
            num_rounds: number of rounds, at most the configuration's; null for the configuration's.
            timeout: seconds to wait for a round's replies; null for ``runtime.round_timeout``.
            train_config: not sent, because clients take the configuration from the overrides.
            evaluate_config: not sent either.
            evaluate_fn: measures the arrays after each round.

        Returns:
            The arrays after the last round, and the measures by round.

        Raises:
            RoundFailed: a round had too few usable replies twice.
            ValueError: there are more rounds than the configuration has.
        """
        rounds = self.config.num_rounds if num_rounds is None else num_rounds
        if rounds > self.config.num_rounds:
            raise ValueError(
                f"num_rounds must be <= {self.config.num_rounds}, which schedules and methods "
                f"count on, got {rounds}: set num_rounds in the overrides"
            )
        self.down.begin()
        if initial_arrays is not None:
            self.down.load(initial_arrays)
        self._timeout = timeout or self._timeout
        result = Result()
        for round in range(self.next_round, rounds + 1):
            if self.selection.stopped:
                break
            line = self._run_round(grid, round)
            clients = {k: v for k, v in line.items() if k.startswith("client_")}
            result.evaluate_metrics_clientapp[round] = _record(clients)
            if round:
                result.train_metrics_clientapp[round] = _record(self.seen.metrics)
            if evaluate_fn is not None:
                measures = evaluate_fn(round, self.arrays())
                if measures is not None:
                    result.evaluate_metrics_serverapp[round] = measures
        result.arrays = self.arrays()
        return result

    def _run_round(self, grid: Grid, round: int) -> Line:
        """Train (not in round 0), evaluate when it is time, and report the line."""
        begun = time.perf_counter()
        line: Line = {"round": round}
        if not round:
            self.nodes.join(grid)
        else:
            try:
                self._train(grid, round)
            except RoundFailed as failed:
                line["repeated"], first = str(failed), self.seen
                self._train(grid, round)
                self.seen.count_again(first)
            line |= {"cohort": self.seen.cohort} | self.seen.metrics
            line["weights"] = {str(c): w for c, w in self.seen.weights.items()}
        if self.config.evaluates(round):
            line |= self._evaluate(grid, round)
            if self.selection.is_last(line) and self._last_measures_more(round):
                line |= self._evaluate_clients(grid, round, last=True)
        line |= self.seen.entries()
        if self.nodes.left_out:
            line["left_out"] = {str(n): reason for n, reason in self.nodes.left_out.items()}
        line["seconds"] = float(f"{time.perf_counter() - begun:.3f}")
        self.report(line)
        return line

    def report(self, line: Line) -> None:
        """Take in a round that ended, and tell the observer."""
        self.selection.add(line)
        self.observer.round_done(line)

    def _last_measures_more(self, round: int) -> bool:
        """Tell whether clients measure more in the last evaluation, which this round's was not."""
        task = self.engine.task
        more = task.generates(True) and not task.generates(False)
        return more and self.clients_measure and round < self.config.num_rounds

    def _train(self, grid: Grid, round: int) -> None:
        """Wait for the nodes that the round needs, train its cohort and aggregate."""
        cohort = self.cohort(round)
        self.nodes.join(grid, cohort, self.config.fewest_replies(len(cohort)))
        messages = self._train_messages(round)
        self.observer.phase("train", len(messages))
        try:
            replies = self._exchange(grid, messages, self.up.most_bytes(round))
            self.up.aggregate(round, replies, self.seen, self._late())
        finally:
            self._tell_who_was_left_out()

    def _tell_who_was_left_out(self) -> None:
        """Tell the observer, also of a round that failed."""
        asked = self.seen.last
        for client, reason in asked.refused.items():
            self.observer.left_out(asked.phase, client, asked.outcome(client), reason)

    def _exchange(
        self, grid: Grid, messages: Mapping[int, Message], most: int = FRAME
    ) -> Iterable[tuple[int, Message]]:
        """Send messages and yield client and reply as they arrive.

        Args:
            grid: carries the messages.
            messages: one message a client, by client.
            most: bytes that the arrays of a reply may take.
        """
        asked, wait = self.seen.last, self.config.runtime.wait_after_min
        least = self.config.fewest_replies(len(asked.clients))
        done, enough = self.observer.clients_done, lambda: asked.usable >= least
        for client, reply in exchange(grid, messages, self._timeout, done, enough, wait, most):
            asked.answered.add(client)
            yield client, reply

    @property
    def state(self) -> State:
        """Every parameter that the server has set so far, full."""
        return self.down.state

    @property
    def values(self) -> State:
        """Current values of all that can change, full."""
        return self.down.values

    def arrays(self) -> ArrayRecord:
        """Return what the server has set so far, one array a parameter."""
        return named_arrays(self.down.state)

    def initial_arrays(self) -> ArrayRecord:
        """Return the values that round 1 sends, one array a parameter."""
        self.down.begin()
        return named_arrays({name: self.values[name] for name in self.roles.down(1)})

    def cohort(self, round: int) -> list[int]:
        """Draw the clients of a round from (seed, round), sorted."""
        if self.config.strategy.pooled:
            return [0]
        draws = generator(self.config.seed, "cohort", round)
        drawn = draws.permutation(self.config.num_clients)
        return sorted(int(client) for client in drawn[: self.config.cohort_size()])

    def _train_messages(self, round: int) -> dict[int, Message]:
        self.seen = Seen(cohort=self.cohort(round))
        return self._messages(MessageType.TRAIN, round, self.seen.cohort)

    def _messages(
        self, kind: str, round: int, clients: Iterable[int], last: bool = False
    ) -> dict[int, Message]:
        asked = list(clients)
        nodes = {client: self.nodes.of[client] for client in asked if client in self.nodes.of}
        self.seen.asked[kind] = Asked(kind, asked, nodes.keys())
        for client in asked:
            if client not in nodes:
                self.seen.refuse(client, "no node holds this partition now")
        self._sent = self.down.messages(kind, round, nodes, self.seen, last)
        return self._sent

    # --- Flower's verbs ------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each client of the round's cohort.

        Args:
            server_round: 1, 2, ....
            arrays: parameters to go on from, by name.
            config: not used.
            grid: asked once for the clients' nodes.
        """
        self.down.begin()
        self.down.load(arrays)
        self.nodes.join(grid)
        return list(self._train_messages(server_round).values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the replies that can be used; return all values and the training metrics.

        Raises:
            RoundFailed: fewer replies can be used than ``runtime.min_replies`` asks for.
        """
        self.up.aggregate(server_round, self._by_client(replies), self.seen, self._late())
        return self.arrays(), _record(self.seen.metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See ``configure_train``; return no messages if clients do not measure in this round."""
        self._sent = {}
        if self.config.evaluates(server_round) and self.clients_measure:
            return list(self._evaluate_messages(server_round).values())
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the clients' measures, see ``over_clients``; null if clients do not measure."""
        if not self._sent:
            return None
        pairs = self._by_client(replies)
        return _record(self.evaluator.over(pairs, self._sent, self.seen, self._late()))

    def summary(self) -> None:
        """Log nothing, because a run's directory holds the configuration."""

    def _by_client(self, replies: Iterable[Message]) -> Iterable[tuple[int, Message]]:
        """Pair each reply with its client; messages get their ids when they are pushed.

        A reply to no message of this round is ignored, because a site may send any.
        """
        clients = {m.metadata.message_id: client for client, m in self._sent.items()}
        by_message = [(reply.metadata.reply_to_message_id, reply) for reply in replies]
        pairs = [(clients[message], reply) for message, reply in by_message if message in clients]
        self.seen.last.answered.update(client for client, _ in pairs)
        return pairs

    def _late(self) -> str:
        wait = self.config.runtime.wait_after_min
        sooner = f", or runtime.wait_after_min={wait:g} s after enough others" if wait else ""
        return f"no reply within runtime.round_timeout={self._timeout:g} s{sooner}"

    # --- evaluation ----------------------------------------------------------------------------

    @property
    def clients_measure(self) -> bool:
        """True if clients measure the model on their own rows."""
        choice = self.config.evaluation.clients
        return choice == "always" or (choice == "auto" and self.roles.has_personal)

    def _evaluate(self, grid: Grid, round: int) -> Line:
        """Measure the server's model if none of it is personal, and the clients' if configured."""
        line: Line = {}
        if not self.roles.has_personal:
            line |= measure(self.engine, "validation", self.down.state, round)
        if self.clients_measure:
            line |= self._evaluate_clients(grid, round)
        return line

    def _evaluate_clients(self, grid: Grid, round: int, last: bool = False) -> Line:
        messages = self._evaluate_messages(round, last)
        self.observer.phase("evaluate", len(messages))
        replies = self._exchange(grid, messages)
        measures = self.evaluator.over(replies, messages, self.seen, self._late())
        self._tell_who_was_left_out()
        return measures

    def _evaluate_messages(self, round: int, last: bool = False) -> dict[int, Message]:
        """Return messages with what the next round would start from.

        The server may have changed parameters that are first sent down in the next round.
        """
        clients = range(self.config.num_clients)
        return self._messages(MessageType.EVALUATE, round + 1, clients, last)


def _record(metrics: Mapping[str, Any]) -> MetricRecord:
    """Return metrics as Flower's record, which holds neither nulls nor texts."""
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    return MetricRecord(numbers)  # pyright: ignore[reportArgumentType]
