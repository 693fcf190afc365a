"""The Flower ClientApp: its three verbs.

Imports stand inside of functions, because a process that only registers the app, such as the one
that starts Ray, would wait seconds for torch.
"""

import logging
from collections.abc import Sequence
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.errors import public_text

log = logging.getLogger(__name__)


def query(message: Message, context: Context) -> Message:
    """Reply with the partition that this node holds, and whether its rows are its own.

    A query with a configuration is one of ``fedpeft check``: the node opens model and rows, and
    replies with its facts too.

    Raises:
        ValueError: the node's configuration has no partition.
        RuntimeError: model or rows cannot be opened.
    """
    if "partition-id" not in context.node_config:
        raise ValueError("this node has no partition-id: give --node-config partition-id=N")
    metrics = {
        "partition-id": int(context.node_config["partition-id"]),
        "own-rows": int("data-path" in context.node_config),
    }
    content = RecordDict({"metrics": MetricRecord({**metrics})})
    if "config" in message.content.config_records:
        content["facts"] = _facts(message, context)
    return Message(content, reply_to=message)


def _facts(message: Message, context: Context) -> ConfigRecord:
    """Open model and rows, and return versions, a hash, counts and sizes, see ``facts``."""
    from fedpeft.client.client import engine_of
    from fedpeft.engine.facts import facts, rows_by_split

    try:
        engine = engine_of(message, context)
        rows = rows_by_split(engine, int(context.node_config["partition-id"]))
        return ConfigRecord({**facts(engine), **rows})
    except Exception as error:
        raise _public(error, context) from None


def train(message: Message, context: Context) -> Message:
    """Load initial, received and personal values, train, and send what is shared."""
    return _answer(message, context)


def evaluate(message: Message, context: Context) -> Message:
    """Measure the client's model on its own validation and test rows."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    """Answer a message; Flower sends the server the text of what is raised here.

    Raises:
        RuntimeError: the client failed. Its text is public, and it has no cause that Flower could
            send with it.
    """
    from fedpeft.client.client import answer_all

    try:
        (answer,) = answer_all([message], [context])
    except Exception as error:  # the configuration or the data, before any client's work
        answer = error
    if isinstance(answer, Exception):
        raise _public(answer, context) from None
    return answer


def _public(error: Exception, context: Context) -> RuntimeError:
    """Return what a server may know of an error; the node's log has all of it."""
    log.error("client %s failed", context.node_config.get("partition-id"), exc_info=error)
    return RuntimeError(public_text(error))


def client_app(mods: Sequence[Any] = ()) -> ClientApp:
    """Return a ClientApp with these verbs, for example to put Flower's mods around them."""
    app = ClientApp(mods=list(mods))
    app.query()(query)
    app.train()(train)
    app.evaluate()(evaluate)
    return app


def ready() -> None:
    """Import the modules that the first message needs."""
    import fedpeft.client.client  # noqa: F401


app = client_app()
