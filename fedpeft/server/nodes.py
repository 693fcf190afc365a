"""The clients' nodes, and the exchange of messages with them."""

import time
from collections.abc import Callable, Iterator, Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.server.replies import reason

POLL_SECONDS = 0.02


class Nodes:
    """Knows the node of each client; a node holds one partition, which is one client.

    Args:
        num_clients: partitions 0..num_clients-1.
        timeout: seconds to wait for all nodes.
    """

    def __init__(self, num_clients: int, timeout: float) -> None:
        self.num_clients, self.timeout = num_clients, timeout
        self.of: dict[int, int] = {}  # node id by client

    def join(self, grid: Grid) -> None:
        """Wait until every partition has a node.

        Node ids differ from run to run, so everything is ordered by partition.

        Raises:
            TimeoutError: partitions are missing after the timeout.
            ValueError: two nodes name the same partition, or a number out of range.
        """
        queried: set[int] = set()
        deadline = time.monotonic() + self.timeout
        while len(self.of) < self.num_clients:
            new = [node for node in grid.get_node_ids() if node not in queried]
            queried.update(new)
            queries = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
            numbered = dict(enumerate(queries))
            for _, reply in exchange(grid, numbered, max(1, deadline - time.monotonic())):
                self._register(reply)
            if time.monotonic() > deadline:
                missing = sorted(set(range(self.num_clients)) - self.of.keys())
                raise TimeoutError(
                    f"no client holds partitions {missing} of num_clients={self.num_clients}"
                )
            if not new:
                time.sleep(POLL_SECONDS)

    def _register(self, reply: Message) -> None:
        if reply.has_error():
            raise ValueError(f"a client could not be asked: {reason(reply)}")
        partition = int(reply.content.metric_records["metrics"]["partition-id"])  # type: ignore[arg-type]
        if not 0 <= partition < self.num_clients:
            raise ValueError(
                f"a client holds partition {partition}, but num_clients={self.num_clients}: start "
                f"{self.num_clients} clients, or set num_clients"
            )
        if partition in self.of:
            raise ValueError(f"two clients hold partition {partition}")
        self.of[partition] = reply.metadata.src_node_id


def exchange(
    grid: Grid,
    messages: Mapping[int, Message],
    timeout: float,
    on_reply: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[int, Message]]:
    """Send messages and yield the replies as they arrive, until the time is up.

    A message lives as long as its round waits, so that nobody begins it too late.

    Args:
        grid: carries them.
        messages: by client.
        timeout: seconds.
        on_reply: is told how many replies came.

    Yields:
        Client and reply.

    Raises:
        RuntimeError: some messages could not be sent.
    """
    deadline = time.monotonic() + timeout
    for message in messages.values():
        message.metadata.ttl = time.time() + timeout - message.metadata.created_at
    ids = list(grid.push_messages(messages.values()))
    if len(ids) != len(messages):
        raise RuntimeError(f"only {len(ids)} of {len(messages)} messages could be sent")
    waiting = dict(zip(ids, messages, strict=True))
    while waiting and time.monotonic() < deadline:
        arrived = list(grid.pull_messages(waiting))
        if arrived:
            on_reply(len(arrived))
        for reply in arrived:
            yield waiting.pop(reply.metadata.reply_to_message_id), reply
        if not arrived:
            time.sleep(POLL_SECONDS)
