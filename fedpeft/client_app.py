"""The Flower ClientApp: one client's side of every method, by roles alone."""

import hashlib
from typing import TYPE_CHECKING

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from fedpeft.methods.base import State
    from fedpeft.session import Session

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Says which partition this node holds."""
    return _reply(message, {"partition-id": _client(context)})


@app.train()
def train(message: Message, context: Context) -> Message:
    """Loads initial, received and personal values, trains, sends what is shared."""
    from fedpeft.compression import ERROR
    from fedpeft.methods.base import Role
    from fedpeft.seeding import generator
    from fedpeft.state import names_with, pack, snapshot, split_extras, with_extras, zeros

    session, round, client = _open(message, context)
    config = session.config
    received, extras = _received(message, session, round, client)
    personal, kept = _personal(message, context)
    kept, error = split_extras(kept, ERROR)
    session.load(received, personal, client=client)
    roles = session.roles(round)
    shared, own = (names_with(roles, role) for role in (Role.SHARED, Role.PERSONAL))
    before = snapshot(session.model, shared)
    term = config.strategy.term(before, extras, kept)
    trained = session.train_client(client, round, term)
    after = snapshot(session.model, shared)
    more, kept = term.finish(after, trained.steps, trained.lr)
    state = with_extras(session.blocks(after, client), more)
    start = with_extras(session.blocks(before, client), zeros(more))
    rng = generator(config.seed, "compression", round, client)
    wire, error = config.compression.compress(state, start, error, rng)
    kept = with_extras(kept, error, ERROR)
    _keep(message, context, with_extras(snapshot(session.model, own), kept))
    arrays, index = pack(wire)
    metrics = {
        "num-examples": trained.num_examples,
        "loss": trained.loss,
        "num-steps": trained.steps,
    }
    return _reply(message, metrics, arrays, index)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measures the client's model on its own validation and test rows."""
    session, round, client = _open(message, context)
    received, _ = _received(message, session, round, client)
    personal, _ = _personal(message, context)
    session.load(received, personal, client=client)
    last = round == session.config.num_rounds
    own = session.client_examples(client)
    metrics: dict[str, float] = {}
    for split in ("validation", "test"):
        metrics[f"{split}-num-examples"] = len(own[split])
        for name, value in session.evaluate(own[split], last=last).items():
            metrics[f"{split}_{name}"] = value
        if (baseline := session.baseline(own["train"], own[split])) is not None:
            metrics[f"{split}_baseline"] = baseline
    return _reply(message, metrics)


def _open(message: Message, context: Context) -> "tuple[Session, int, int]":
    from fedpeft.session import open_session

    config = message.content.config_records["config"]
    path = context.node_config.get("data-path")
    session = open_session(str(config["overrides"]), None if path is None else str(path))
    return session, int(config["round"]), _client(context)  # type: ignore[arg-type]


def _client(context: Context) -> int:
    if "partition-id" not in context.node_config:
        raise ValueError("this node has no partition-id: give --node-config partition-id=N")
    return int(context.node_config["partition-id"])


def _received(
    message: Message, session: "Session", round: int, client: int
) -> "tuple[State, State]":
    """Shared parameters and the strategy's extras."""
    from fedpeft.state import split_extras, unpack, with_extras

    index = message.content.config_records["config"]["index"]
    assert isinstance(index, bytes)
    expected = {name: session.initial[name] for name in session.down(round)}
    expected = session.blocks(expected, client)
    if message.metadata.message_type == MessageType.TRAIN:  # extras are for training alone
        expected = with_extras(expected, session.config.strategy.down({}, session.shared(round)))
    state = unpack(message.content.array_records["arrays"], index)
    return split_extras(session.config.compression.received(state, expected))


def _personal_key(message: Message) -> str:
    """A context may serve several configurations in turn; personal values belong to one."""
    overrides = str(message.content.config_records["config"]["overrides"])
    return "personal-" + hashlib.sha256(overrides.encode()).hexdigest()[:16]


def _personal(message: Message, context: Context) -> "tuple[State, State]":
    """Personal parameters, and what the strategy's term kept."""
    from fedpeft.state import split_extras, unpack

    key = _personal_key(message)
    if key not in context.state.array_records:
        return {}, {}
    index = context.state.config_records[key + "-index"]["index"]
    assert isinstance(index, bytes)
    return split_extras(unpack(context.state.array_records[key], index))


def _keep(message: Message, context: Context, state: "State") -> None:
    from fedpeft.state import pack

    if not state:
        return
    key = _personal_key(message)
    context.state[key], index = pack(state)
    context.state[key + "-index"] = ConfigRecord({"index": index})


def _reply(
    message: Message,
    metrics: dict[str, int | float],
    arrays: ArrayRecord | None = None,
    index: bytes = b"",
) -> Message:
    content = RecordDict({"metrics": MetricRecord(dict(metrics))})
    if arrays is not None:
        content["arrays"], content["config"] = arrays, ConfigRecord({"index": index})
    return Message(content, reply_to=message)
