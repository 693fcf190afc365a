"""One client's side of every method, by roles alone."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict

from fedpeft.compression.base import ERROR
from fedpeft.engine.plan import Trained, Work
from fedpeft.engine.session import Session, open_session
from fedpeft.methods.base import Role, State
from fedpeft.models.precision import give_back
from fedpeft.seeding import generator
from fedpeft.server.nodes import clients_of, folder_of, joined
from fedpeft.simulation.launch import SIMULATED
from fedpeft.state import names_with, pack, split_extras, unpack, with_extras, zeros

Answer = RecordDict | Exception
T = TypeVar("T")


def partition_of(context: Context) -> int:
    """Which partition a node holds.

    Raises:
        ValueError: it was not told.
    """
    if "partition-id" not in context.node_config:
        raise ValueError("this node has no partition-id: give --node-config partition-id=N")
    return int(context.node_config["partition-id"])


def prepare(message: Message) -> None:
    """Loads model and rows; what is wrong with them, the server says."""
    with suppress(Exception):
        session = open_session(str(message.content.config_records["config"]["overrides"]), None)
        session.client_rows  # noqa: B018  # computed here
        session.examples("train")


def answered(
    message: Message, context: Context, answer: "Callable[[Sequence[Client]], list[Answer]]"
) -> Message:
    """The answers of the clients that a message is for, each as if it were alone."""
    config = message.content.config_records["config"]
    path = context.node_config.get("data-path")
    session = open_session(str(config["overrides"]), None if path is None else str(path))
    if folder_of(message) is None:
        (own,) = answer([Client(message, context, session, partition_of(context))])
        give_back()
        if isinstance(own, Exception):
            raise own
        return Message(own, reply_to=message)
    if SIMULATED not in context.node_config:
        raise ValueError("the message names clients and a folder, which only a simulation may")
    numbers = clients_of(message)
    answers = answer([Client(message, context, session, number) for number in numbers])
    give_back()
    return Message(joined(dict(zip(numbers, answers, strict=True))), reply_to=message)


def trained(clients: "Sequence[Client]") -> list[Answer]:
    """What each client sends after training, or why it sends nothing."""
    works = [_tried(client.begin) for client in clients]
    begun = [work for work in works if isinstance(work, Work)]
    found = iter(clients[0].session.train(begun, clients[0].round) if begun else ())
    answers: list[Answer] = []
    for client, work in zip(clients, works, strict=True):
        result = next(found) if isinstance(work, Work) else work
        if not isinstance(result, Exception):
            result = _tried(lambda c=client, r=result: c.finish(*r))
        answers.append(result)
    return answers


def evaluated(clients: "Sequence[Client]") -> list[Answer]:
    """Each client's metrics."""
    return [_tried(client.evaluate) for client in clients]


def _tried(function: Callable[[], T]) -> T | Exception:
    """A client's failure is its own: the others of its message go on."""
    try:
        return function()
    except Exception as error:
        return error


class Client:
    """One client and the message to it."""

    def __init__(self, message: Message, context: Context, session: Session, number: int) -> None:
        self.message, self.context, self.session, self.number = message, context, session, number
        self.round = int(message.content.config_records["config"]["round"])  # type: ignore[arg-type]

    def begin(self) -> Work:
        """Initial, received and personal values, and the strategy's part."""
        session, client = self.session, self.number
        received, extras = self._received()
        self.personal, kept = self._kept()
        kept, self.error = split_extras(kept, ERROR)
        start = session.values(received, self.personal, client=client)
        self.roles = session.roles(self.round)
        self.before = {n: start[n] for n in names_with(self.roles, Role.SHARED)}
        self.term = session.config.strategy.term(self.before, extras, kept)
        return Work(client, start, self.term)

    def finish(self, trained: Trained, after: State) -> RecordDict:
        """What is sent; what is personal stays."""
        session, config, client = self.session, self.session.config, self.number
        shared = {name: after[name] for name in self.before}
        more, kept = self.term.finish(shared, trained.steps, trained.lr)
        state = with_extras(session.blocks(shared, client), more)
        start = with_extras(session.blocks(self.before, client), zeros(more))
        rng = generator(config.seed, "compression", self.round, client)
        wire, error = config.compression.compress(state, start, self.error, rng)
        # Also what rests in this round: where roles change, it trained in an earlier one.
        own = self.personal | {n: after[n] for n in names_with(self.roles, Role.PERSONAL)}
        self._keep(with_extras(own, with_extras(kept, error, ERROR)))
        arrays, index = pack(wire)
        metrics = {
            "num-examples": trained.num_examples,
            "loss": trained.loss,
            "num-steps": trained.steps,
        }
        config = ConfigRecord({"index": index})
        return RecordDict({"metrics": MetricRecord(metrics), "arrays": arrays, "config": config})

    def evaluate(self) -> RecordDict:
        """Measures the client's model on its own validation and test rows."""
        session, client = self.session, self.number
        received, _ = self._received()
        personal, _ = self._kept()
        session.load(received, personal, client=client)
        last = self.round > session.config.num_rounds  # the message is the next round's
        own = session.client_examples(client)
        metrics: dict[str, Any] = {}
        for split in ("validation", "test"):
            metrics[f"{split}-num-examples"] = len(own[split])
            for name, value in session.evaluate(own[split], last=last).items():
                metrics[f"{split}_{name}"] = value
            if (baseline := session.baseline(own["train"], own[split])) is not None:
                metrics[f"{split}_baseline"] = baseline
        return RecordDict({"metrics": MetricRecord(metrics)})

    def _received(self) -> tuple[State, State]:
        """Shared parameters and the strategy's extras."""
        session, content = self.session, self.message.content
        index = content.config_records["config"]["index"]
        assert isinstance(index, bytes)
        expected = {name: session.initial[name] for name in session.down(self.round)}
        expected = session.blocks(expected, self.number)
        if self.message.metadata.message_type == MessageType.TRAIN:  # extras are for training alone
            extras = session.config.strategy.down({}, session.shared(self.round))
            expected = with_extras(expected, extras)
        state = unpack(content.array_records["arrays"], index)
        return split_extras(session.config.compression.received(state, expected))

    # --- what a client keeps from round to round: with its node or, simulated, in a file ---------

    @property
    def _file(self) -> Path | None:
        folder = folder_of(self.message)
        return None if folder is None else Path(folder) / f"client_{self.number}.safetensors"

    @property
    def _key(self) -> str:
        """A context may serve several configurations in turn; personal values belong to one."""
        overrides = str(self.message.content.config_records["config"]["overrides"])
        return "personal-" + hashlib.sha256(overrides.encode()).hexdigest()[:16]

    def _kept(self) -> tuple[State, State]:
        """Personal parameters, and what the strategy's term kept."""
        if self._file is not None:
            from safetensors.torch import load_file

            return split_extras(load_file(self._file) if self._file.exists() else {})
        state, key = self.context.state, self._key
        if key not in state.array_records:
            return {}, {}
        index = state.config_records[key + "-index"]["index"]
        assert isinstance(index, bytes)
        return split_extras(unpack(state.array_records[key], index))

    def _keep(self, state: State) -> None:
        if not state:
            return
        if (file := self._file) is not None:
            from safetensors.torch import save_file

            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".part")
            save_file({name: value.contiguous() for name, value in state.items()}, draft)
            draft.replace(file)
            return
        self.context.state[self._key], index = pack(state)
        self.context.state[self._key + "-index"] = ConfigRecord({"index": index})
