"""A site's pushes cannot end a run, and cannot hold up the replies of others.

The grid behaves as Flower's over a network: one question for several replies loses all of them if
one cannot be read, and lasts as long as one of them is still being uploaded.
"""

import threading
import time
from collections.abc import Callable, Iterable

import httpx
import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, MessageType, RecordDict

from fedpeft.server import pull
from fedpeft.server.limits import FRAME
from fedpeft.server.nodes import Nodes, exchange
from fedpeft.server.replies import reason
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.wire import identify

Spoil = Callable[[Message], list[Message]]


class Network(InProcessGrid):
    """Three nodes behind a network, one of which spoils what is pulled for it.

    Args:
        spoil: is called with the spoiling node's reply, and returns what a question gives.
        node: the spoiling node.
    """

    answers_here = False

    def __init__(self, spoil: Spoil, node: int = 3) -> None:
        identify()
        super().__init__(
            3, lambda messages, _: [Message(RecordDict(), reply_to=m) for m in messages]
        )
        self.spoil, self.node = spoil, node
        self.nodes: dict[str, int] = {}  # nodes by message
        self.asked: list[Message] = []
        self.sizes: list[int] = []  # sizes of the questions for replies

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = list(messages)
        self.asked += sent
        ids = super().push_messages(sent)
        self.nodes |= {i: m.metadata.dst_node_id for i, m in zip(ids, sent, strict=True)}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ids = list(message_ids)
        self.sizes.append(len(ids))
        while self._queue:
            self._work()
        replies = super().pull_messages(ids)
        spoilt = self.node in (self.nodes[i] for i in ids)
        return self.spoil(replies[0]) if spoilt and replies else replies


def messages() -> dict[int, Message]:
    return {c: Message(RecordDict(), c + 1, MessageType.TRAIN) for c in range(3)}


def raises(error: Exception) -> Spoil:
    def spoil(reply: Message) -> list[Message]:
        raise error

    return spoil


def test_a_reply_that_cannot_be_read_is_its_clients_alone() -> None:
    grid = Network(raises(UnicodeError("secret bytes")))
    sent = messages()
    replies = dict(exchange(grid, sent, 5))
    assert sorted(replies) == [0, 1, 2]
    assert not replies[0].has_error() and not replies[1].has_error()
    assert reason(replies[2]) == "its reply could not be read (UnicodeError)"
    assert set(grid.sizes) == {1}


def test_a_refused_request_is_its_clients_and_a_lost_grid_is_the_runs() -> None:
    request = httpx.Request("POST", "http://superlink")
    refused = httpx.HTTPStatusError("no", request=request, response=httpx.Response(400))
    replies = dict(exchange(Network(raises(refused)), messages(), 5))
    assert sorted(replies) == [0, 1, 2] and replies[2].has_error()
    grid = Network(raises(httpx.ConnectError("down")))
    with pytest.raises(httpx.ConnectError):
        dict(exchange(grid, messages(), 5))


def test_a_reply_to_another_message_is_ignored() -> None:
    def to_another(reply: Message) -> list[Message]:
        reply.metadata.__dict__["_reply_to_message_id"] = "junk"
        return [reply]

    grid, begun = Network(to_another), time.monotonic()
    assert sorted(dict(exchange(grid, messages(), 1))) == [0, 1]
    assert time.monotonic() - begun < 2


def test_an_upload_that_never_ends_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The site is late, the others' replies come, and one thread waits for it."""
    monkeypatch.setattr(pull, "STALLED", 0.2)
    ended = threading.Event()

    def withheld(reply: Message) -> list[Message]:
        ended.wait(20)
        return [reply]

    grid = Network(withheld, node=1)  # node 1 is asked first
    before, begun = threading.active_count(), time.monotonic()
    came: dict[int, float] = {}
    for client, _ in exchange(grid, messages(), 2):
        came[client] = time.monotonic() - begun
    assert sorted(came) == [1, 2] and max(came.values()) < 1
    assert 2 <= time.monotonic() - begun < 3
    assert threading.active_count() == before + 1
    ended.set()


class Many(InProcessGrid):
    """A network of many nodes, of which the last few have replied, and slow questions."""

    answers_here = False

    def __init__(self, nodes: int, replied: int, seconds: float) -> None:
        identify()
        super().__init__(nodes, lambda messages, _: [])
        self.seconds, self.replied = seconds, replied
        self.sent: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = list(messages)
        ids = super().push_messages(sent)
        self.sent |= dict(zip(ids, sent, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        time.sleep(self.seconds)
        message = self.sent[message_id]
        late = message.metadata.dst_node_id <= self.num_clients - self.replied
        return [] if late else [Message(RecordDict(), reply_to=message)]


def test_clients_late_in_the_list_are_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask for all lasts far longer than one question may."""
    monkeypatch.setattr(pull, "STALLED", 0.2)
    grid = Many(nodes=60, replied=10, seconds=0.02)
    sent = {c: Message(RecordDict(), c + 1, MessageType.TRAIN) for c in range(60)}
    assert sorted(dict(exchange(grid, sent, 3))) == list(range(50, 60))


def test_a_run_that_has_ended_ends_the_exchange() -> None:
    """Flower says so by an error that is no Exception."""

    class Ended(BaseException):
        pass

    def ended(reply: Message) -> list[Message]:
        raise Ended

    grid, begun = Network(ended), time.monotonic()
    with pytest.raises(Ended):
        dict(exchange(grid, messages(), 20))
    assert time.monotonic() - begun < 5


def test_a_node_whose_answer_is_slow_is_asked_once_more() -> None:
    """A failed question is followed by one other, not by one at every look."""
    failures = iter([True])

    def answer(reply: Message) -> list[Message]:
        if next(failures, False):
            return [Message(Error(3, "Node Unavailable"), reply_to=grid.asked[2])]
        time.sleep(0.5)
        return [reply]

    grid, nodes = Network(answer), Nodes(3, 5)
    nodes.join(grid)
    assert nodes.of == {0: 1, 1: 2, 2: 3} and nodes.left_out == {}
    assert [m.metadata.dst_node_id for m in grid.asked] == [1, 2, 3, 3]


def test_a_slow_upload_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "STALLED", 0.1)

    def slow(reply: Message) -> list[Message]:
        time.sleep(0.6)
        return [reply]

    grid = Network(slow, node=1)
    assert sorted(dict(exchange(grid, messages(), 5))) == [0, 1, 2]


def test_a_large_answer_of_a_node_is_not_taken() -> None:
    """It holds its partition as if it had not answered, and the others join."""

    def large(reply: Message) -> list[Message]:
        reply.content["more"] = ConfigRecord({"bytes": bytes(FRAME)})
        return [reply]

    nodes = Nodes(3, 0.3)
    with pytest.raises(
        TimeoutError, match=r"partitions \[2\] .*node 3 answered with \d+ bytes, but at "
    ):
        nodes.join(Network(large))
    assert nodes.of == {0: 1, 1: 2}


@pytest.mark.parametrize(("most", "here"), [(FRAME, [0, 1]), (2 * FRAME, [0, 1, 2])])
def test_large_arrays_are_not_put_together(most: int, here: list[int]) -> None:
    """Flower joins an array's chunks while a reply is pulled."""
    array = Array(np.zeros(FRAME, np.int8))
    content, parts = array.deflate(), dict(array.children or {})

    def large(reply: Message) -> list[Message]:
        Array.inflate(content, parts)
        return [reply]

    replies = dict(exchange(Network(large), messages(), 5, most=most))
    assert [c for c in sorted(replies) if not replies[c].has_error()] == here
    assert sorted(replies) == [0, 1, 2]


def test_a_node_that_could_not_be_asked_is_asked_again() -> None:
    """A failed question keeps no node out for the rest of the run."""
    failures = iter([True])

    def unavailable(reply: Message) -> list[Message]:
        if next(failures, False):
            return [Message(Error(3, "Node Unavailable"), reply_to=grid.asked[2])]
        return [reply]

    grid, nodes = Network(unavailable), Nodes(3, 5)
    nodes.join(grid)
    assert nodes.of == {0: 1, 1: 2, 2: 3} and nodes.left_out == {}
    assert [m.metadata.dst_node_id for m in grid.asked] == [1, 2, 3, 3]
