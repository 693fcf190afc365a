"""A node's worker answers each message that has come, whatever becomes of another one."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedpeft.deployment import tasks as module
from fedpeft.deployment.tasks import Tasks
from fedpeft.errors import PartlyPublic

ECHO: Callable[[Any, Any], Any] = lambda message, context: message  # noqa: E731


class SuperNode:
    """Stands in for Flower's client of a SuperNode, which has these tasks by their tokens."""

    tokens: list[str]

    def __init__(self, credential: Any) -> None:
        self.token = credential

    @classmethod
    def from_server_address(cls, *_: Any, interceptors: list[Any], **__: Any) -> "SuperNode":
        return cls(interceptors[1])

    def AcquireTask(self, _: Any) -> Any:
        token = self.tokens.pop(0) if self.tokens else ""
        return SimpleNamespace(HasField=lambda name: bool(token), token=token)

    def close(self) -> None: ...


class Heartbeat:
    """Stands in for the thread that tells the SuperNode that a task goes on."""

    def __init__(self, _: Any) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand-ins for Flower's names; the list takes what is pushed and how tasks end."""
    said: list[Any] = []
    monkeypatch.setattr(module, "RuntimeHttpClient", SuperNode)
    monkeypatch.setattr(module, "RuntimeTokenHttpInterceptor", str)
    monkeypatch.setattr(module, "HeartbeatSender", Heartbeat)
    monkeypatch.setattr(module, "make_task_heartbeat_fn_http", lambda client: None)
    monkeypatch.setattr(module, "push_message", lambda c, reply, _: said.append(("pushed", reply)))
    monkeypatch.setattr(module, "push_task_output", lambda c, *a: said.append(("finished", *a)))
    return said


def answered_in_time(tasks: Tasks, app: Callable[[Any, Any], Any] = ECHO) -> None:
    """Answer one message, which comes within nine seconds."""
    deadline = time.monotonic() + 9
    while not tasks.answer(app):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_message_that_never_comes_stops_no_later_one(
    said: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SuperNode makes a task before it has the message, and keeps it if the run has ended."""
    never = threading.Event()

    def pull(client: SuperNode) -> Any:
        return never.wait() if client.token == "lost" else ("message", "context")

    monkeypatch.setattr(module, "pull_task_input", pull)
    SuperNode.tokens = ["lost"]
    tasks = Tasks("", b"secret")
    answers = [tasks.answer(ECHO) for _ in range(2)]
    assert answers == [False, False] and said == []
    SuperNode.tokens = ["here"]
    answered_in_time(tasks)
    assert said == [("pushed", "message"), ("finished", "context", "completed", "")]
    assert len(tasks.waiting) == 1 and not tasks.answer(ECHO)
    never.set()


def test_a_message_that_cannot_be_read_stops_no_later_one(
    said: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is the server can send one."""

    def pull(client: SuperNode) -> Any:
        if client.token == "broken":
            raise ValueError("no such object type")
        return "message", "context"

    monkeypatch.setattr(module, "pull_task_input", pull)
    tasks = Tasks("", b"secret")
    for token in ("broken", "here"):
        SuperNode.tokens = [token]
        answered_in_time(tasks)
    failed = ("finished", None, "failed", "the message could not be read")
    done = ("finished", "context", "completed", "")
    assert said == [failed, ("pushed", "message"), done]
    assert [(r.message, str(r.exc_info[1])) for r in caplog.records if r.exc_info] == [
        ("the message could not be read", "no such object type")
    ]


def test_a_node_tells_only_the_public_part_of_an_error(
    said: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = Message(RecordDict(), 5, "train")
    monkeypatch.setattr(module, "pull_task_input", lambda client: (message, "context"))

    def app(message: Any, context: Any) -> Any:
        raise PartlyPublic("row 3 has no label", ": tested positive")

    SuperNode.tokens = ["here"]
    answered_in_time(Tasks("", b"secret"), app)
    (_, reply), (_, _, status, details) = said
    assert status == "failed" and reply.error.reason == details
    assert details == "row 3 has no label (this node's log says more)"
