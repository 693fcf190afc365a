"""A Flower grid of this machine, on which every client is a node."""

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.client.app import app
from fedpeft.client.client import answer_all
from fedpeft.wire import empty_run, identify, number, sentence

AnswerAll = Callable[[Sequence[Message], Sequence[Context]], Sequence[Message | Exception]]
Grouping = Callable[[Sequence[int]], Sequence[Sequence[int]]]
MOST_EVALUATIONS = 64  # most calls for one evaluation, because each call costs milliseconds
POLL_SECONDS = 0.01


class LocalGrid(Grid):
    """Nodes 1 to ``num_clients``, each of which holds one partition.

    Messages of one Flower ``group_id`` may be answered together, so the grid hands them to workers
    in parcels. Subclasses say who the workers are.

    Args:
        num_clients: number of clients, one node each.

    Attributes:
        num_clients: may be set anew between two runs.
        state_folder: holds the clients' kept states; a temporary folder that lives as long as the
            grid if nobody sets another.
        groups: divides clients that may train together into the clients of each pass, in the order
            in which workers take them.
    """

    answers_here = True  # its replies were made by this process or its own workers

    def __init__(self, num_clients: int) -> None:
        identify()
        self._run = empty_run()
        self.num_clients, self._sent = num_clients, 0
        self._queue: deque[list[Message]] = deque()
        self._replies: dict[str, Message] = {}
        self._contexts: dict[int, Context] = {}
        self.state_folder = self._temporary = Path(mkdtemp(prefix="fedpeft-"))
        finalize(self, rmtree, self._temporary, ignore_errors=True)
        self.groups: Grouping = lambda clients: [[client] for client in clients]

    def set_run(self, run: Any) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run."""
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Make a message, as its constructor does."""
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(range(1, self.num_clients + 1))

    def prepare(self, overrides: str) -> None:
        """Let workers load model and rows of a configuration, while the server loads its own."""

    def node_config(self, node: int) -> dict[str, Any]:
        """Return a node's configuration."""
        partition = {"partition-id": node - 1, "num-partitions": self.num_clients}
        return partition | {"state-folder": str(self.state_folder)}

    def context(self, node: int) -> Context:
        """Return a node's context.

        Clients keep their state in files. What Flower's mods keep in a context lasts as long as
        the grid, unless somebody has set a state folder.
        """
        context = Context(1, node, self.node_config(node), RecordDict(), {})
        if self.state_folder != self._temporary:
            return context
        return self._contexts.setdefault(node, context)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages in parcels and return their ids; drop messages whose time is up."""
        self._forget()
        ids, groups = [], dict[str, list[Message]]()
        for message in messages:
            self._sent += 1
            number(message, str(self._sent))
            ids.append(str(self._sent))
            if message.metadata.message_type == MessageType.QUERY:
                self._reply(message, _tried(message, self.context(_node(message))))
            else:
                groups.setdefault(message.metadata.group_id or str(self._sent), []).append(message)
        for group in groups.values():
            self._queue.extend(self._in_parcels(group))
        self._hand_out()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived, after a short wait if there are none."""
        wanted = set(message_ids)
        if not wanted & self._replies.keys():
            self._work()
        return [self._replies.pop(i) for i in list(self._replies) if i in wanted]  # as they came

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return the replies that come in time.

        Args:
            messages: messages to any nodes.
            timeout: seconds; null waits for all replies.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            arrived = self.pull_messages(waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
            if not arrived:
                time.sleep(POLL_SECONDS)
        return replies

    def _in_parcels(self, group: list[Message]) -> Iterable[list[Message]]:
        """Divide the messages of one group into parcels."""
        if group[0].metadata.message_type == MessageType.EVALUATE:
            size = -(-len(group) // MOST_EVALUATIONS)
            return [group[i : i + size] for i in range(0, len(group), size)]
        by_client = {_node(message) - 1: message for message in group}
        return [[by_client[c] for c in together] for together in self.groups(list(by_client))]

    def _forget(self) -> None:
        """Drop messages and replies whose time is up."""
        now = time.time()
        parcels = ([m for m in group if _alive(m, now)] for group in self._queue)
        self._queue = deque(group for group in parcels if group)
        self._replies = {i: reply for i, reply in self._replies.items() if _alive(reply, now)}

    def _reply(self, message: Message, answer: Message | Exception) -> None:
        """Note the reply to a message; an exception becomes an error with its reason."""
        if isinstance(answer, Exception):
            answer = Message(Error(code=0, reason=sentence(answer)), reply_to=message)
        self._replies[message.metadata.message_id] = answer

    def _hand_out(self) -> None:  # noqa: B027
        """Give queued parcels to workers that have room; the base has no workers."""

    @abstractmethod
    def _work(self) -> None:
        """Wait shortly for replies, or make some."""


class InProcessGrid(LocalGrid):
    """Answers messages in this process, when they are pulled.

    Args:
        num_clients: number of clients, one node each.
        answer_all: answers the messages of a parcel; by default fedpeft's clients do.
    """

    def __init__(self, num_clients: int, answer_all: AnswerAll = answer_all) -> None:
        super().__init__(num_clients)
        self._answer_all = answer_all

    def _work(self) -> None:
        """Answer the oldest parcel."""
        if not self._queue:
            return
        group = self._queue.popleft()
        answers = _all_tried(self._answer_all, group, [self.context(_node(m)) for m in group])
        for message, answer in zip(group, answers, strict=True):
            self._reply(message, answer)


def _all_tried(
    answer_all: AnswerAll, messages: Sequence[Message], contexts: Sequence[Context]
) -> Sequence[Message | Exception]:
    """Answer a parcel; an error outside of one client's work becomes every client's answer."""
    try:
        return answer_all(messages, contexts)
    except Exception as error:
        return [error] * len(messages)


def _tried(message: Message, context: Context) -> Message | Exception:
    """Answer a message by fedpeft's ClientApp."""
    try:
        return app(message, context)
    except Exception as error:
        return error


def _node(message: Message) -> int:
    return message.metadata.dst_node_id


def _alive(message: Message, now: float) -> bool:
    return message.metadata.created_at + message.metadata.ttl > now
