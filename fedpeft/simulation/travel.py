"""Kept states travel with the messages to machines that do not see the run's directory.

The clients' states lie in one place, in the run's directory on the machine that started the run. A
worker on another machine gets the file of the generation that its message goes on from, and sends
back the file of the one that it keeps. So any worker can take any client in any round, a machine
that is lost takes nothing with it, and a resumed run finds everything. Driver and clients of a
simulation are one trust domain; in a deployment nothing of the kind is sent.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from fedpeft.client.store import Store, store_of

Config = dict[str, Any]  # a node's configuration


def sent_along(message: Message, config: Config) -> bytes | None:
    """Return the file that a message's client needs of its kept state; null if there is none.

    What nobody needs any more is deleted here, as the client itself would do.
    """
    store, said = _store(message, config)
    generation = _number(said, "generation")
    if message.metadata.message_type == MessageType.TRAIN:
        store.forget(generation, _number(said, "oldest"), _number(said, "best"))
    return store.file(generation)


def brought_back(message: Message, config: Config, file: bytes | None) -> None:
    """Keep what a worker on another machine has kept for a message's client."""
    if file is not None:
        store, said = _store(message, config)
        store.put(_number(said, "round"), file)


@contextmanager
def unpacked(
    messages: Sequence[Message], configs: Sequence[Config], files: Sequence[bytes | None]
) -> "Iterator[tuple[list[Config], Callable[[], list[bytes | None]]]]":
    """Lay the kept states that came with messages into a folder of this machine.

    Args:
        messages: of a pass.
        configs: of the nodes, whose state-folder is not here.
        files: came with each message, see ``sent_along``.

    Yields:
        The nodes' configurations with the new folder, and a function that returns for each message
        the file that its client has kept since.
    """
    with TemporaryDirectory(prefix="fedpeft-") as folder:
        here = [config | {"state-folder": folder} for config in configs]
        asked = [_store(m, c) for m, c in zip(messages, here, strict=True)]
        for (store, said), file in zip(asked, files, strict=True):
            if file is not None:
                store.put(_number(said, "generation"), file)
        yield here, lambda: [store.file(_number(said, "round")) for store, said in asked]


def context_of(message: Message, config: Config) -> Context:
    """Return the context of a message's node."""
    return Context(1, message.metadata.dst_node_id, config, RecordDict(), {})


def _store(message: Message, config: Config) -> tuple[Store, ConfigRecord]:
    said = message.content.config_records["config"]
    return store_of(context_of(message, config), said, int(config["partition-id"])), said


def _number(said: ConfigRecord, key: str) -> int:
    return int(said[key])  # type: ignore[arg-type]
