"""The clients' nodes, and the exchange of messages with them."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.server.limits import FRAME
from fedpeft.server.pull import Pull
from fedpeft.server.replies import reason
from fedpeft.wire import wire_bytes

POLL_SECONDS = 0.02  # the shortest and the longest pause between two questions
MOST_POLL_SECONDS = 1.0
POLL_SHARE = 0.02  # share of the time waited so far; over a network each question costs time


class Nodes:
    """Knows the node of each client; a node holds one partition, which is one client.

    Args:
        num_clients: partitions 0..num_clients-1.
        timeout: seconds to wait for all nodes before the first round.

    Attributes:
        of: node id by client.
        own_rows: clients that train on rows of their own, which the server does not know, also if
            they joined the run before it was resumed.
        left_out: the reason why a node holds no client of this run, by node id.
        goes_on: true in a resumed run, which goes on without nodes that do not come.
    """

    def __init__(self, num_clients: int, timeout: float) -> None:
        self.num_clients, self.timeout = num_clients, timeout
        self.of: dict[int, int] = {}
        self.own_rows: set[int] = set()
        self.left_out: dict[int, str] = {}
        self._silent: set[int] = set()  # nodes of ``left_out`` that have not said what they hold
        self._asked: dict[str, int] = {}  # nodes by the query that they have not answered
        self._pull: tuple[Grid, Pull] | None = None
        self.goes_on = self._begun = False

    def join(self, grid: Grid, cohort: Collection[int] = (), fewest: int = 0) -> None:
        """Ask new nodes which partition they hold, and wait for nodes that are needed.

        The first time all partitions are needed, later ``fewest`` clients of the round's cohort. A
        node that comes late, or returns with another id, takes its partition from the next round
        on. Node ids differ from run to run, so everything is ordered by partition.

        Args:
            grid: asked for the nodes.
            cohort: the round's clients.
            fewest: number of the cohort's clients that must have a node; after the timeout the
                round begins with fewer.

        Raises:
            TimeoutError: partitions of a new run are missing after the timeout.
        """
        begun = asked = time.monotonic()
        self._ask(grid)
        while self._too_few(cohort, fewest):
            if time.monotonic() > begun + self.timeout:
                if not (self._begun or self.goes_on):
                    raise TimeoutError(self._missing())
                break
            pause(begun, asked)
            asked = time.monotonic()
            self._ask(grid)
        self._begun = True

    def _too_few(self, cohort: Collection[int], fewest: int) -> bool:
        if not self._begun:
            return len(self.of) < self.num_clients
        return sum(client in self.of for client in cohort) < fewest

    def _ask(self, grid: Grid) -> None:
        """Ask the nodes that are new, and read the answers that have come."""
        here = set(grid.get_node_ids())
        if gone := {client for client, node in self.of.items() if node not in here}:
            self.of = {client: node for client, node in self.of.items() if client not in gone}
            self.left_out.clear()  # one of them may hold such a client
        # A node that returns with its id is asked again, because its answer may be lost.
        self._asked = {query: node for query, node in self._asked.items() if node in here}
        self.left_out = {node: why for node, why in self.left_out.items() if node in here}
        heard = self.left_out.keys() - self._silent
        known = {*self.of.values(), *heard, *self._asked.values()}
        if new := sorted(here - known):
            queries = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
            self._asked |= zip(grid.push_messages(queries), new, strict=True)
        if self._pull is None or self._pull[0] is not grid:
            self._pull = grid, Pull(grid, FRAME)
        for query, reply in self._pull[1](list(self._asked)) if self._asked else ():
            node = self._asked.pop(query, None)
            if node is not None:
                self._answered(node, reply)

    def _answered(self, node: int, reply: Message | Exception) -> None:
        """Note which client a node is, or why it is none."""
        if isinstance(reply, Exception) or reply.has_error():
            why = unreadable(reply) if isinstance(reply, Exception) else reason(reply)
            self.left_out[node] = f"node {node} could not be asked: {why}"
            self._silent.add(node)
            return
        self._silent.discard(node)
        self.left_out.pop(node, None)
        try:
            self._register(node, reply)
        except ValueError as error:
            self.left_out[node] = f"node {node} {error}"

    def _register(self, node: int, reply: Message) -> None:
        """Note which client a node is.

        Raises:
            ValueError: the node holds no partition of this run, or a partition that another node
                holds, or its reply is too large.
        """
        if (size := wire_bytes(reply.content)) > FRAME:
            raise ValueError(f"answered with {size} bytes, but at most {FRAME} may come")
        record = reply.content.metric_records.get("metrics", {})
        partition = record.get("partition-id")
        if not isinstance(partition, int) or not 0 <= partition < self.num_clients:
            raise ValueError(
                f"holds partition {partition!r:.20}, but num_clients="
                f"{self.num_clients}: start {self.num_clients} clients, or set num_clients"
            )
        if partition in self.of:
            raise ValueError(
                f"holds partition {partition}, as node {self.of[partition]} does, which came first"
            )
        self.of[partition] = node
        if record.get("own-rows") == 1:
            self.own_rows.add(partition)

    def _missing(self) -> str:
        missing = sorted(set(range(self.num_clients)) - self.of.keys())
        text = f"no client holds partitions {missing} of num_clients={self.num_clients}"
        return "; ".join([text, *self.left_out.values()])


def exchange(
    grid: Grid,
    messages: Mapping[int, Message],
    timeout: float,
    on_reply: Callable[[int], None] = lambda count: None,
    enough: Callable[[], bool] = lambda: False,
    wait: float | None = None,
    most: int = FRAME,
) -> Iterator[tuple[int, Message]]:
    """Send messages and yield the replies as they arrive, until the time is up.

    A message lives as long as its round waits, so that nobody begins it too late.

    Args:
        grid: carries the messages.
        messages: one message a client, by client.
        timeout: seconds.
        on_reply: is told how many replies came.
        enough: tells whether the replies so far are enough; the time left is then at most ``wait``.
        wait: seconds; null leaves the time as it is.
        most: bytes that the arrays of a reply may take.

    Yields:
        Client and reply.

    Raises:
        RuntimeError: a message could not be sent.
    """
    begun = time.monotonic()
    deadline = begun + timeout
    for message in messages.values():
        message.metadata.ttl = time.time() + timeout - message.metadata.created_at
    ids = list(grid.push_messages(messages.values()))
    if len(ids) != len(messages):
        raise RuntimeError(f"only {len(ids)} of {len(messages)} messages could be sent")
    waiting, pull = dict(zip(ids, messages, strict=True)), Pull(grid, most)
    while waiting and (asked := time.monotonic()) < deadline:
        arrived = [
            answer for answer in pull(list(waiting), deadline - asked) if answer[0] in waiting
        ]
        if arrived:
            on_reply(len(arrived))
        some = bool(arrived)
        while arrived:  # a reply that was read is not kept
            message_id, reply = arrived.pop(0)
            client = waiting.pop(message_id)
            if isinstance(reply, Exception):
                reply = Message(Error(0, unreadable(reply)), reply_to=messages[client])
            yield client, reply
        if wait is not None and enough():
            deadline, wait = min(deadline, time.monotonic() + wait), None
        if not some:
            pause(begun, asked)


def unreadable(error: Exception) -> str:
    """Return the words for a reply that could not be read, without a text of the client's."""
    return f"its reply could not be read ({type(error).__name__})"


def pause(begun: float, asked: float) -> None:
    """Sleep until the next question to a grid is due, the later the longer the wait has lasted.

    A local grid hands out work while it is asked and waits itself, so that its workers would stand
    idle if this slept as long again.

    Args:
        begun: time at which the wait began, by ``time.monotonic``.
        asked: time of the last question, by ``time.monotonic``.
    """
    now = time.monotonic()
    interval = min(MOST_POLL_SECONDS, max(POLL_SECONDS, POLL_SHARE * (now - begun)))
    time.sleep(max(0.0, asked + interval - now))
