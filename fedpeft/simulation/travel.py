"""Sends clients' kept states to the other machines of a Ray cluster, and brings them back.

What clients keep lies in the run's directory, which only the machine that started the run can read.
A message to a worker on another machine takes along the file of the generation from which the
client goes on. The worker's answer brings back the file of the generation that the client keeps
now. Therefore any worker can train any client in any round, a lost machine loses no state, and a
resumed run has all files in its directory.

Only simulations do this, because their server and clients trust each other. In a deployment, what a
client keeps never leaves its node.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict

from fedpeft.client.store import Store, store_of
from fedpeft.protocol import ToClient

NodeConfig = dict[str, Any]


def sent_along(message: Message, config: NodeConfig) -> bytes | None:
    """Return the file that a message's client needs of its kept state; null if there is none.

    What nobody needs any more is deleted here, as the client itself would do.
    """
    store, told = _store(message, config)
    if message.metadata.message_type == MessageType.TRAIN:
        store.forget(told.generation, told.oldest, told.best)
    return store.file(told.generation)


def brought_back(message: Message, config: NodeConfig, file: bytes | None) -> None:
    """Keep what a worker on another machine has kept for a message's client.

    Args:
        message: the message to the client.
        config: the configuration of the client's node.
        file: the kept state; null if the client keeps nothing of this round.
    """
    if file is not None:
        store, told = _store(message, config)
        store.put(told.round, file)


@contextmanager
def unpacked(
    messages: Sequence[Message], configs: Sequence[NodeConfig], files: Sequence[bytes | None]
) -> "Iterator[tuple[list[NodeConfig], Callable[[], list[bytes | None]]]]":
    """Lay the kept states that came with messages into a folder of this machine.

    Args:
        messages: the messages of a parcel.
        configs: the nodes' configurations, whose state-folder is not on this machine.
        files: the file that came with each message, or null, see ``sent_along``.

    Yields:
        The nodes' configurations with the new folder, and a function that returns for each message
        the file that its client has kept since.
    """
    with TemporaryDirectory(prefix="fedpeft-") as folder:
        here = [config | {"state-folder": folder} for config in configs]
        asked = [_store(m, c) for m, c in zip(messages, here, strict=True)]
        for (store, told), file in zip(asked, files, strict=True):
            if file is not None:
                store.put(told.generation, file)
        yield here, lambda: [store.file(told.round) for store, told in asked]


def context_of(message: Message, config: NodeConfig) -> Context:
    """Return the context of a message's node."""
    return Context(1, message.metadata.dst_node_id, config, RecordDict(), {})


def _store(message: Message, config: NodeConfig) -> tuple[Store, ToClient]:
    told = ToClient.of(message)
    return store_of(context_of(message, config), told.run, int(config["partition-id"])), told
