"""One client's side of every method, by roles alone.

A round of a client: the message gives what the server has, the store what the client keeps, the
engine trains, the store keeps what is personal, and the reply carries what is shared.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict

from fedpeft.client.store import Lost, store_of
from fedpeft.compression.base import ERROR, OfUpdate
from fedpeft.config.message import of_message
from fedpeft.engine.cpu import give_back
from fedpeft.engine.engine import Engine, Result, open_engine
from fedpeft.engine.plan import Job
from fedpeft.methods.base import At
from fedpeft.protocol import ToClient, overrides_of
from fedpeft.seeding import generator
from fedpeft.state import (
    METHOD,
    STRATEGY,
    Role,
    State,
    check,
    filled,
    names_with,
    prefixed,
    split_prefixed,
    zeros,
)
from fedpeft.wire import pack, unpack

OPTIMIZER = "optimizer:"  # prefix of the optimizer's moments in what a client keeps
T = TypeVar("T")


class Kept(NamedTuple):
    """The kept state of a client, by kind; every part may be empty.

    Attributes:
        personal: parameters that never leave the client, full.
        strategy: state of the strategy's term, full.
        method: state of the method's term.
        error: updates that sparse compression did not send, block.
        moments: the optimizer's state.
    """

    personal: State
    strategy: State
    method: State
    error: State
    moments: State

    @classmethod
    def parted(cls, state: State) -> "Kept":
        """Split the state that the store holds."""
        parts = []
        for prefix in (STRATEGY, METHOD, ERROR, OPTIMIZER):
            state, part = split_prefixed(state, prefix)
            parts.append(part)
        return cls(state, *parts)

    def joined(self) -> State:
        """Join the parts into one state for the store."""
        state = dict(self.personal)
        for prefix, part in zip((STRATEGY, METHOD, ERROR, OPTIMIZER), self[1:], strict=True):
            state |= prefixed(part, prefix)
        return state


class Begun(NamedTuple):
    """A client between its message and its reply.

    Attributes:
        job: the client's job for the engine; its terms are the method's and the strategy's.
        kept: the client's kept state of earlier rounds.
        before: shared parameters from which training starts, full.
    """

    job: Job
    kept: Kept
    before: State


def answer_all(
    messages: Sequence[Message], contexts: Sequence[Context], engine: Engine | None = None
) -> list[Message | Exception]:
    """Answer messages of one kind, round and configuration, each for a client of its own.

    Args:
        messages: messages to train or to evaluate. Clients whose messages come together train in
            one pass a step where the model allows it.
        contexts: contexts of the clients' nodes, in the same order.
        engine: trains and evaluates; null to open it by the messages' configuration.

    Returns:
        For each message, in order, its reply or the error that ended this client's work.
    """
    engine = engine or engine_of(messages[0], contexts[0])
    clients = [Client(m, c, engine) for m, c in zip(messages, contexts, strict=True)]
    if messages[0].metadata.message_type == MessageType.EVALUATE:
        answers = [_tried(client.evaluate) for client in clients]
    else:
        answers = _trained(clients, engine)
    give_back()
    return [
        answer if isinstance(answer, Exception) else Message(answer, reply_to=message)
        for message, answer in zip(messages, answers, strict=True)
    ]


def engine_of(message: Message, context: Context) -> Engine:
    """Open the engine of a message's configuration on this node's data."""
    path = context.node_config.get("data-path")
    overrides = overrides_of(message)
    of_message(overrides)
    return open_engine(overrides, None if path is None else str(path))


def _trained(clients: "Sequence[Client]", engine: Engine) -> list[RecordDict | Exception]:
    """Train clients; one client's failure leaves the others alone."""
    begun = [_tried(client.begin) for client in clients]
    jobs = [start.job for start in begun if isinstance(start, Begun)]
    results = iter(engine.train(jobs) if jobs else ())
    answers: list[RecordDict | Exception] = []
    for client, start in zip(clients, begun, strict=True):
        result = next(results) if isinstance(start, Begun) else start
        if isinstance(start, Begun) and isinstance(result, Result):
            answers.append(_tried(lambda c=client, s=start, r=result: c.finish(s, r)))
        else:
            assert isinstance(result, Exception)
            answers.append(result)
    return answers


def _tried(function: Callable[[], T]) -> T | Exception:
    """Return a function's result or the error that it raised."""
    try:
        return function()
    except Exception as error:
        return error


class Client:
    """One client and the message to it.

    Args:
        message: carries the round, what the server has, and the configuration.
        context: context of the client's node.
        engine: this process's engine.
    """

    def __init__(self, message: Message, context: Context, engine: Engine) -> None:
        self.message, self.engine, self.config = message, engine, engine.config
        self.number = int(context.node_config["partition-id"])
        self.told = ToClient.of(message, engine.config.num_rounds)
        self.round = self.told.round
        self.last = self.round > engine.config.num_rounds or self.told.last
        self.store = store_of(context, self.told.run, self.number)
        self.restarted = False

    def _check_rows(self) -> None:
        """Refuse rows of this node's own that have changed; the server knows the others."""
        if self.engine.rows.owns_all_rows:
            self.store.check_rows(self.engine.task.sha256("train"))

    def begin(self) -> Begun:
        """Collect the values to start from: initial, then received, then kept; and corrections."""
        self._check_rows()
        replica, told = self.engine.replica, self.told
        self.store.forget(told.generation, told.oldest, told.best)
        kept = self._kept()
        at, received, extras = self._received()
        start = replica.values(received, kept.personal, at=at)
        before = {name: start[name] for name in replica.roles.shared(self.round)}
        terms = (
            self.config.method.term(at, start, kept.method),
            self.config.strategy.term(before, extras, kept.strategy),
        )
        return Begun(Job(at, start, terms, self._moments(kept, at)), kept, before)

    def _kept(self) -> Kept:
        """Load the generation that the server goes on from.

        If it is lost, begin this client anew where ``runtime.lost_state`` says so.
        """
        try:
            return Kept.parted(self.store.load(self.told.generation))
        except Lost:
            if self.config.runtime.lost_state != "restart":
                raise
            self.restarted = True
            return Kept.parted({})

    def _moments(self, kept: Kept, at: At) -> State:
        """Cut the optimizer's moments to the client's blocks; a block may shrink by round."""
        replica, moments = self.engine.replica, dict(kept.moments)
        for key, value in kept.moments.items():
            name = key.partition(":")[2]
            if value.dim() and name in replica.initial:
                block = replica.blocks({name: value}, at)
                moments[key] = filled(block, {name: value})[name]
        return moments

    def _error(self, kept: Kept, at: At) -> State:
        """Cut the updates not sent earlier to the client's blocks, which may differ by round."""
        parameters, extras = split_prefixed(kept.error, STRATEGY)
        replica = self.engine.replica
        return replica.blocks(filled(parameters, replica.initial), at) | prefixed(extras, STRATEGY)

    def finish(self, begun: Begun, result: Result) -> RecordDict:
        """Keep what is personal and return what is shared, encoded."""
        trained, replica, kept = result.trained, self.engine.replica, begun.kept
        shared = {name: result.after[name] for name in begun.before}
        of_method, of_strategy = begun.job.terms
        _, method = of_method.finish(shared, trained.steps, trained.lr)
        extras, strategy = of_strategy.finish(shared, trained.steps, trained.lr)
        at = begun.job.at
        state = replica.blocks(shared, at) | prefixed(extras, STRATEGY)
        reference = replica.blocks(begun.before, at) | prefixed(zeros(extras), STRATEGY)
        wire, error = self._encoded(state, reference, self._error(kept, at))
        # Personal parameters that rest in this round stay kept, because roles change by round.
        names = names_with(replica.roles.by_name(self.round), Role.PERSONAL)
        personal = kept.personal | {name: result.after[name] for name in names}
        state = Kept(personal, strategy, method, error, result.moments).joined()
        if state:
            self.store.keep(self.round, state)
        arrays, index = pack(wire)
        metrics = {
            "num-examples": trained.num_examples,
            "loss": trained.loss,
            "num-steps": trained.steps,
            "seconds": result.seconds,
        }
        said: Any = {"index": index, "kept": bool(state), "restarted": self.restarted}
        return RecordDict(
            {"metrics": MetricRecord(metrics), "arrays": arrays, "config": ConfigRecord(said)}
        )

    def _encoded(self, state: State, reference: State, error: State) -> tuple[State, State]:
        """Return the wire form of what is shared, and the error to keep."""
        draws = generator(self.config.seed, "compression", self.round, self.number)
        codec = self.config.compression.up
        if self.config.compression.feedback:
            assert isinstance(codec, OfUpdate)
            return codec.encode_with_error(state, reference, error, draws)
        return codec.encode(state, reference, draws), error

    def evaluate(self) -> RecordDict:
        """Measure the client's model on its own validation and test rows.

        A site with rows of its own does not send the baseline, because the
        baseline times the number of rows tells how many rows have the commonest label.
        """
        engine, begun = self.engine, time.perf_counter()
        self._check_rows()
        at, received, _ = self._received()
        engine.replica.load(received, self._kept().personal, at=at)
        splits = engine.rows.client_examples(self.number)
        metrics: dict[str, Any] = {}
        for split in ("validation", "test"):
            metrics[f"{split}-num-examples"] = len(splits[split])
            last = self.last and split == "test"  # only then generate=last generates text
            for name, value in engine.evaluate(splits[split], last=last).items():
                metrics[f"{split}_{name}"] = value
            baseline = engine.baseline(splits["train"], splits[split])
            if baseline is not None and not engine.rows.owns_all_rows:
                metrics[f"{split}_baseline"] = baseline
        metrics["seconds"] = time.perf_counter() - begun
        config = ConfigRecord({"restarted": self.restarted})
        return RecordDict({"metrics": MetricRecord(metrics), "config": config})

    def _received(self) -> tuple[At, State, State]:
        """Return the client's ``At``, the received parameters (block) and the strategy's extras.

        Raises:
            ValueError: the message does not hold what this round's roles say.
        """
        content, replica, method = self.message.content, self.engine.replica, self.config.method
        at = replica.roles.at(self.round, self.number)
        remembered = method.down({}, at)
        down = {name: replica.initial[name] for name in replica.roles.down(self.round)}
        extras: State = {}
        if self.message.metadata.message_type == MessageType.TRAIN:  # only training needs extras
            sent = self.config.strategy.down({}, replica.shared(self.round))
            extras = prefixed(sent, STRATEGY)
        count = len(down) + len(extras) + len(remembered)
        whole = unpack(content.array_records["arrays"], self.told.index, count)
        state, memory = split_prefixed(whole, METHOD)
        check(memory, remembered)
        at = at._replace(memory=memory)
        expected = replica.blocks(down, at) | extras
        decoded = self.config.compression.down.decode(state, expected)
        return at, *split_prefixed(decoded, STRATEGY)
