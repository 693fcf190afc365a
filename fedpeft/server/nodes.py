"""Which node a client is on: its own, or in simulation any, several clients a message.

On real machines a node is a client. In simulation the nodes are as many as workers, whatever the
number of clients, and a message to one names the clients that it stands for. Each client's part of
such a message and of its reply is what would travel to and from a node of its own, and it is that
which is checked and counted.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.server.replies import reason

POLL_SECONDS = 0.02
CLIENTS = "clients"  # the record that names them


def joined(answers: dict[int, RecordDict | Exception]) -> RecordDict:
    """Several clients' answers in one content."""
    content = RecordDict()
    for client, answer in answers.items():
        if isinstance(answer, Exception):
            answer = RecordDict({"error": ConfigRecord({"reason": str(answer)})})
        for name, record in answer.items():
            content[f"{client}:{name}"] = record
    return content


def parted(reply: Message, sent: Message) -> Iterator[tuple[int, Message]]:
    """Each client's reply out of one to a message for several."""
    for client in clients_of(sent):
        prefix = f"{client}:"
        parts = {} if reply.has_error() else dict(reply.content.items())
        own = {n.removeprefix(prefix): part for n, part in parts.items() if n.startswith(prefix)}
        if reply.has_error():
            yield client, Message(reply.error, reply_to=sent)
        elif "error" in own:
            why = str(own["error"]["reason"])  # type: ignore[index]
            yield client, Message(Error(code=0, reason=why), reply_to=sent)
        else:
            yield client, Message(RecordDict(own), reply_to=sent)


def clients_of(message: Message) -> list[int]:
    """The clients that a message for several names."""
    return list(message.content.config_records[CLIENTS]["clients"])  # type: ignore[arg-type]


def folder_of(message: Message) -> str | None:
    """Where the clients that a message names keep what is theirs; null for a node's own client."""
    record = message.content.config_records.get(CLIENTS)
    return None if record is None else str(record["folder"])


def prepare(grid: Grid, overrides: str) -> None:
    """Has simulated nodes load model and rows while the server loads its own."""
    content = RecordDict({"config": ConfigRecord({"overrides": overrides})})
    grid.push_messages([Message(content, node, MessageType.QUERY) for node in grid.get_node_ids()])


class Hosts:
    """The nodes, and what is sent to them.

    Args:
        num_clients: partitions 0..num_clients-1.
        timeout: seconds to wait for all nodes.
        folder: where simulated clients keep what is theirs; null on real machines.
    """

    def __init__(self, num_clients: int, timeout: float, folder: str | None) -> None:
        self.num_clients, self.timeout, self.folder = num_clients, timeout, folder
        self.nodes: dict[int, int] = {}  # of each partition; in simulation of each worker
        self._clients: dict[str, int] = {}  # of each reply

    def join(self, grid: Grid) -> None:
        """Waits until every partition has a node, and maps them; in simulation until one is there.

        Node ids differ from run to run, so everything is ordered by partition.

        Raises:
            TimeoutError: partitions are missing after the timeout.
            ValueError: two nodes name the same partition, or a number out of range.
        """
        asked: set[int] = set()
        deadline = time.monotonic() + self.timeout
        while len(self.nodes) < (1 if self.folder else self.num_clients):
            new = [n for n in grid.get_node_ids() if n not in asked]
            asked.update(new)
            if self.folder:
                self.nodes = dict(enumerate(sorted(new)))
            else:
                self._ask(grid, new, max(1, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                missing = sorted(set(range(self.num_clients)) - self.nodes.keys())
                raise TimeoutError(
                    f"no client holds partitions {missing} of num_clients={self.num_clients}"
                )
            if not new:
                time.sleep(POLL_SECONDS)

    def _ask(self, grid: Grid, new: list[int], timeout: float) -> None:
        messages = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
        for _, reply in self._exchanged(grid, messages, timeout):
            self._register(reply)

    def _register(self, reply: Message) -> None:
        if reply.has_error():
            raise ValueError(f"a client could not be asked: {reason(reply)}")
        partition = int(reply.content.metric_records["metrics"]["partition-id"])  # type: ignore[arg-type]
        if not 0 <= partition < self.num_clients:
            raise ValueError(
                f"a client holds partition {partition}, but num_clients={self.num_clients}: start "
                f"{self.num_clients} clients, or set num_clients"
            )
        if partition in self.nodes:
            raise ValueError(f"two clients hold partition {partition}")
        self.nodes[partition] = reply.metadata.src_node_id

    def messages(
        self, kind: str, content: RecordDict, groups: Sequence[Sequence[int]]
    ) -> Iterator[Message]:
        """One content for groups of clients; on real machines each client is a group."""
        for i, group in enumerate(groups):
            if self.folder is None:
                yield Message(content, self.nodes[group[0]], kind)
            else:
                named = ConfigRecord({"clients": list(group), "folder": self.folder})
                whole = RecordDict({**content, CLIENTS: named})
                yield Message(whole, self.nodes[i % len(self.nodes)], kind)

    def exchange(
        self,
        grid: Grid,
        messages: Sequence[Message],
        timeout: float,
        on_reply: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Message]:
        """Sends messages; each client's reply as it arrives, if it does in time.

        Args:
            on_reply: told how many clients' replies came.
        """
        own = {node: partition for partition, node in self.nodes.items()}
        for sent, answer in self._exchanged(grid, messages, timeout):
            if self.folder is None:
                replies = [(own[sent.metadata.dst_node_id], answer)]
            else:
                replies = list(parted(answer, sent))
            on_reply(len(replies))
            for client, reply in replies:
                name = f"{reply.metadata.reply_to_message_id}:{client}"
                reply.metadata.__dict__["_reply_to_message_id"] = name
                self._clients[name] = client
                yield reply

    def client_of(self, reply: Message) -> int:
        """Whose reply it is."""
        return self._clients[reply.metadata.reply_to_message_id]

    def _exchanged(
        self, grid: Grid, messages: Sequence[Message], timeout: float
    ) -> Iterator[tuple[Message, Message]]:
        """Messages and their replies, as they arrive; a late message is not begun any more."""
        deadline = time.monotonic() + timeout
        for message in messages:
            message.metadata.ttl = time.time() + timeout - message.metadata.created_at
        ids = list(grid.push_messages(messages))
        if len(ids) != len(messages):
            raise RuntimeError(f"only {len(ids)} of {len(messages)} messages could be sent")
        waiting = dict(zip(ids, messages, strict=True))
        while waiting and time.monotonic() < deadline:
            arrived = list(grid.pull_messages(waiting))
            for reply in arrived:
                yield waiting.pop(reply.metadata.reply_to_message_id), reply
            if not arrived:
                time.sleep(POLL_SECONDS)
