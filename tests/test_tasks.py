"""A node's worker answers each message that has come, also while another one never comes."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from fedpeft.deployment import tasks as module
from fedpeft.deployment.tasks import Tasks


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


def test_a_message_that_never_comes_stops_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SuperNode makes a task before it has the message, and keeps it if the run has ended."""
    never = threading.Event()
    pushed: list[Any] = []
    finished: list[Any] = []

    def pull(client: SuperNode) -> Any:
        return never.wait() if client.token == "lost" else ("message", "context")

    def echo(message: Any, context: Any) -> Any:
        return message

    monkeypatch.setattr(module, "RuntimeHttpClient", SuperNode)
    monkeypatch.setattr(module, "RuntimeTokenHttpInterceptor", str)
    monkeypatch.setattr(module, "HeartbeatSender", Heartbeat)
    monkeypatch.setattr(module, "make_task_heartbeat_fn_http", lambda client: None)
    monkeypatch.setattr(module, "pull_task_input", pull)
    monkeypatch.setattr(module, "push_message", lambda client, reply, context: pushed.append(reply))
    monkeypatch.setattr(module, "push_task_output", lambda *a: finished.append(a[2]))
    SuperNode.tokens = ["lost"]
    tasks = Tasks("", b"secret")
    answers = [tasks.answer(echo) for _ in range(2)]
    assert answers == [False, False] and pushed == []
    SuperNode.tokens = ["here"]
    deadline = time.monotonic() + 9
    while not tasks.answer(echo):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert pushed == ["message"] and finished == ["completed"]
    assert len(tasks.waiting) == 1 and not tasks.answer(echo)
    never.set()
